"""The routed experts: gather, grouped product, clamped SwiGLU times the routing weight, grouped product, combine.

    g = min(w1 x, limit),   u = clamp(w3 x, -limit, limit),   a = silu(g) * u * weight,   y = w2 a,   out = sum_slots y

The routing weight multiplies the activation, before w2 and in fp32, as in the released model; the clamp comes before
the product, and the shared expert is clamped alike (`swiglu`).

n tokens · k slots (experts per token) · e experts · d width · f expert width
"""

import torch
from torch import Tensor

from ..backend import implementation
from ..moe_route.routing import check_ids
from ..precision import compute_dtype

__all__ = ["moe_experts", "swiglu"]


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float | None,
    shared: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Send each token through its experts and add up what they return.

    `out_n = sum_k w2[e] (silu(min(w1[e] x_n, limit)) * clamp(w3[e] x_n, -limit, limit) * weights_nk)` with
    `e = experts_nk`; SwiGLU and the sum over slots in fp32, in slot order. Under autocast x, w13 and w2 are cast as a
    linear layer would. For the backward pass it keeps x, the pre-activations `[n k, 2 f]` and the routing. An expert
    without tokens costs nothing and gets a zero gradient. (DeepSeekMoE; V4 2.1, clamp: V4 4.2.3.)

    Args:
        x: `[n, d]`.
        experts: int64 `[n, k]`.
        weights: `[n, k]`.
        w13: `[e, 2 f, d]`, the rows of w1 (gate), then those of w3 (up).
        w2: `[e, d, f]`.
        limit: the SwiGLU clamp (10 in V4); None for no clamp.
        shared: `[n, d]`, what the shared expert made of each token; added after the slots, before rounding.

    Returns:
        `[n, d]` in the dtype of x (of autocast, where that is on).

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: an expert id is outside `0..e-1` (checked for CPU tensors).
    """
    _check_shapes(x, experts, weights, w13, w2)
    if shared is not None and shared.shape != x.shape:
        raise ValueError(f"shared has shape {tuple(shared.shape)}: expected {tuple(x.shape)}, that of x")
    check_ids("experts", experts, w13.shape[0])
    x, w13, w2 = (t.to(compute_dtype(t)) for t in (x, w13, w2))
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x is {x.dtype}, w13 {w13.dtype}, w2 {w2.dtype}: they must agree (or use autocast)")
    run = implementation("moe_experts", backend, x).moe_experts
    return run(x, experts, weights, w13, w2, limit=limit, shared=shared)


def swiglu(h: Tensor, limit: float | None, weight: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`silu(min(g, limit)) * clamp(u, -limit, limit) * weight` for `h = [g, u]`, in fp32, rounded once.

    The clamp passes gradients on where its input lies within the bounds or on one, and none outside, whatever
    `torch.clamp` does at a bound (it passed them on up to torch 2.13, not since). (V4 4.2.3.)

    Args:
        h: `[..., 2 f]`, gate and up side by side.
        limit: the clamp; None for none.
        weight: `[...]`, one factor per row.

    Returns:
        `[..., f]` in the dtype of h.

    Raises:
        ValueError: the last axis of h is odd, or weight does not have its leading shape.
    """
    if h.ndim < 1 or h.shape[-1] % 2:
        raise ValueError(f"h has shape {tuple(h.shape)}: the last axis must hold gate and up, an even number")
    if weight is not None and weight.shape != h.shape[:-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected {tuple(h.shape[:-1])}")
    return implementation("moe_experts", backend, h).swiglu(h, limit, weight)


def _check_shapes(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [tokens, width]")
    if experts.ndim != 2 or experts.shape[0] != x.shape[0] or experts.dtype != torch.int64:
        raise ValueError(
            f"experts is {experts.dtype} {tuple(experts.shape)}: expected torch.int64 [{x.shape[0]}, slots]"
        )
    if weights.shape != experts.shape:
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected {tuple(experts.shape)}, that of experts")
    if w13.ndim != 3 or w13.shape[1] % 2 or w13.shape[2] != x.shape[1]:
        raise ValueError(f"w13 has shape {tuple(w13.shape)}: expected [experts, 2 * expert width, {x.shape[1]}]")
    if w2.shape != (w13.shape[0], x.shape[1], w13.shape[1] // 2):
        raise ValueError(f"w2 has shape {tuple(w2.shape)}: expected {[w13.shape[0], x.shape[1], w13.shape[1] // 2]}")
