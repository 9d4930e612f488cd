"""The experts in Triton, as operators that torch.compile, autograd, autocast, checkpointing and CUDA graphs see whole.

`kernels` holds the kernels, `launch` their order and their blocks. Between forward and backward live
x, the pre-activations h and the routing: 2 n d + 4 n k f bytes in half precision, and 20 n k.

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order
"""

from typing import Any

import torch
from torch import Tensor

from ...moe_route.routing import Permutation
from ...moe_route.triton import moe_permutation
from . import launch

__all__ = ["moe_experts", "swiglu"]


def moe_experts(
    x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor,
    *, limit: float | None, shared: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `kernels.moe_experts.moe_experts`."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, w13, w2))
    rows = moe_permutation(experts, w13.shape[0])
    return _experts(x, weights, w13, w2, *rows, limit, keep, shared)[0]


def swiglu(h: Tensor, limit: float | None, weight: Tensor | None = None) -> Tensor:
    """See `kernels.moe_experts.swiglu`."""
    rows = h.reshape(h.shape[:-1].numel(), h.shape[-1])
    out = _swiglu(rows, None if weight is None else weight.flatten(), limit)
    return out.view(*h.shape[:-1], h.shape[-1] // 2)


# experts -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::moe_experts", mutates_args=())
def _experts(
    x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, order: Tensor, counts: Tensor, inverse: Tensor,
    limit: float | None, keep: bool, shared: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    operands, rows = launch.Operands(x, weights, w13, w2), Permutation(order, counts, inverse)
    out, h, plan = launch.forward(operands, rows, limit, keep=keep, shared=shared)
    return out, h, *plan


@_experts.register_fake
def _(
    x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, order: Tensor, counts: Tensor, inverse: Tensor,
    limit: float | None, keep: bool, shared: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = launch.new_schedule(counts, len(order), launch.tiles_for(w2).rows)
    return x.new_empty(x.shape), x.new_empty(len(order) if keep else 0, w13.shape[1]), *plan


@torch.library.custom_op("abyssal::moe_experts_backward", mutates_args=())
def _experts_backward(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, w13: Tensor, w2: Tensor,
    order: Tensor, inverse: Tensor, tiles: Tensor, offsets: Tensor,
    limit: float | None, need_x: bool, need_w13: bool, need_w2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    operands, rows, plan = launch.Operands(x, weights, w13, w2), launch.Rows(order, inverse), (tiles, offsets)
    needs = {"need_x": need_x, "need_w13": need_w13, "need_w2": need_w2}
    found = launch.backward(dout, h, operands, rows, launch.Schedule(*plan), limit, **needs)
    dx, dweights, dw13, dw2 = (x.new_empty(0) if g is None else g for g in found)
    return dx, dweights, dw13, dw2


@_experts_backward.register_fake
def _(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, w13: Tensor, w2: Tensor,
    order: Tensor, inverse: Tensor, tiles: Tensor, offsets: Tensor,
    limit: float | None, need_x: bool, need_w13: bool, need_w2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needed = ((x, need_x), (weights, True), (w13, need_w13), (w2, need_w2))
    dx, dweights, dw13, dw2 = (t.new_empty(t.shape if need else (0,)) for t, need in needed)
    return dx, dweights, dw13, dw2


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, w13, w2, order, _, inverse, ctx.limit, _, shared = inputs
    _, h, tiles, offsets = output
    ctx.shared = None if shared is None else shared.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, weights, w13, w2, order, inverse, tiles, offsets)


def _gradients(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 10
    needs = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs[:4]):  # else h was not kept: the shared expert alone learns
        grads = _experts_backward(dout, *ctx.saved_tensors, ctx.limit, needs[0], needs[2], needs[3])
    dshared = dout.to(ctx.shared) if needs[9] else None
    return *(g if need else None for g, need in zip(grads, needs)), None, None, None, None, None, dshared


_experts.register_autograd(_gradients, setup_context=_keep)


# SwiGLU --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::swiglu", mutates_args=())
def _swiglu(h: Tensor, weight: Tensor | None, limit: float | None) -> Tensor:
    return launch.swiglu(h, weight, limit)


@_swiglu.register_fake
def _(h: Tensor, weight: Tensor | None, limit: float | None) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.custom_op("abyssal::swiglu_backward", mutates_args=())
def _swiglu_backward(grad: Tensor, h: Tensor, weight: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor]:
    return launch.swiglu_backward(grad, h, weight, limit)


@_swiglu_backward.register_fake
def _(grad: Tensor, h: Tensor, weight: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _keep_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, ctx.limit = inputs
    ctx.save_for_backward(h, weight)


def _swiglu_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    dh, dweight = _swiglu_backward(grad, h, weight, ctx.limit)
    return dh, None if weight is None else dweight, None


_swiglu.register_autograd(_swiglu_gradients, setup_context=_keep_swiglu)
