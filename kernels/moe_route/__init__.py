"""Routing of tokens to experts: scores, selection, weights, expert order, and the sequence-wise balance loss.

    s = sqrt(softplus(z)),   chosen = top-k of (s + bias),   w = scale * s[chosen] / sum s[chosen]

The bias steers the selection only; it is moved by the load and never enters a weight. Hash-routed layers take their
experts from a table of token ids, and still weight them by their learned scores.

n tokens · e experts · k experts per token · b sequences · t tokens of a sequence
"""

import torch
from torch import Tensor

from ..backend import implementation
from .routing import Balance, Permutation, Routing, check_ids

__all__ = ["Balance", "Permutation", "Routing", "balance_loss", "moe_balance", "moe_permutation", "moe_route"]


def moe_route(
    logits: Tensor,
    *,
    top_k: int,
    scale: float,
    bias: Tensor | None = None,
    experts: Tensor | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose `top_k` experts for each token and weight them by their unbiased scores.

    `s = sqrt(softplus(z))`, `chosen = topk(s + bias)`, `w = scale * s[chosen] / (sum s[chosen] + 1e-20)`, in fp32 (fp64
    for fp64 logits). Chosen ids come in descending order of `s + bias`, ties to the lowest id; a NaN score is never
    preferred to another, so a NaN row selects the lowest ids and carries NaN weights, in that row only. Gradients reach
    `logits` through `scores` and `weights`; selection and bias have none. (V4 2.1.)

    Args:
        logits: `[n, e]`, any float dtype.
        top_k: experts per token.
        scale: the routed scaling factor (1.5 in V4-Flash, 2.5 in V4-Pro).
        bias: `[e]`, added for the selection only.
        experts: int64 `[n, k]`, given instead of selected (hash routing); they keep their order.

    Returns:
        `Routing(scores [n, e], experts [n, k], weights [n, k])`.

    Raises:
        ValueError: a shape or dtype does not fit, `top_k` is not in `1..e`, or both `bias` and `experts` are given.
        IndexError: a given expert id is outside `0..e-1` (checked for CPU tensors).
    """
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected [tokens, experts]")
    n, e = logits.shape
    if not 1 <= top_k <= e:
        raise ValueError(f"top_k={top_k}: allowed is 1..{e}, the number of experts")
    if bias is not None and bias.shape != (e,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected [{e}]")
    if experts is not None:
        if bias is not None:
            raise ValueError("bias and experts are both given: hash-routed layers have no selection to bias")
        if experts.shape != (n, top_k) or experts.dtype != torch.int64:
            raise ValueError(f"experts is {experts.dtype} {tuple(experts.shape)}: expected torch.int64 [{n}, {top_k}]")
        check_ids("experts", experts, e)
    run = implementation("moe_route", backend, logits)
    return run.moe_route(logits, top_k=top_k, scale=scale, bias=bias, experts=experts)


def moe_permutation(
    experts: Tensor, num_experts: int, real: Tensor | None = None, *, backend: str | None = None
) -> Permutation:
    """Sort the (token, slot) pairs by expert, stably, without a host synchronisation.

    Args:
        experts: int64 `[n, k]`.
        num_experts: `e`.
        real: bool `[n]`; False marks padding. Padded tokens keep their place in the order but are not counted.

    Returns:
        `Permutation(order [n k], counts [e], inverse [n, k])`: row `r` of the expert order is the pair
        `order[r] = token * k + slot`, and the pair `(token, slot)` lies in row `inverse[token, slot]`.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: an expert id is outside `0..e-1` (checked for CPU tensors).
    """
    if experts.ndim != 2 or experts.dtype != torch.int64:
        raise ValueError(f"experts is {experts.dtype} {tuple(experts.shape)}: expected torch.int64 [tokens, slots]")
    if real is not None and (real.shape != experts.shape[:1] or real.dtype != torch.bool):
        raise ValueError(f"real is {real.dtype} {tuple(real.shape)}: expected torch.bool [{experts.shape[0]}]")
    check_ids("experts", experts, num_experts)
    return implementation("moe_route", backend, experts).moe_permutation(experts, num_experts, real)


def balance_loss(scores: Tensor, experts: Tensor, real: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The loss of `moe_balance` alone."""
    return moe_balance(scores, experts, real, backend=backend).loss


def moe_balance(scores: Tensor, experts: Tensor, real: Tensor | None = None, *, backend: str | None = None) -> Balance:
    """Load of the experts, and the sequence-wise balance loss: 1 when every expert of a sequence gets the same load,
    more when load follows score.

    `L = mean_b sum_e f_e P_e`, `f_e = e / (k t) * count_e` (detached), `P_e = mean_t (s_te / sum_e s_te)`, over the
    real tokens of each sequence and over the sequences that have any. The caller applies the coefficient (1e-4).
    (V3 2.1.2; V4 2.1.)

    Args:
        scores: `[b, t, e]`, the unbiased scores.
        experts: int64 `[b, t, k]`, the picks that count: `moe_route`'s, or the top-k of the scores without a bias, as
            in V3's equations 17 to 20.
        real: bool `[b, t]`; False marks padding.

    Returns:
        `Balance(loss, counts [e])`: a scalar of `scores`' dtype, 0 if no token is real, and how often real tokens visit
        each expert, int64.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if scores.ndim != 3 or experts.ndim != 3 or scores.shape[:2] != experts.shape[:2] or experts.dtype != torch.int64:
        raise ValueError(
            f"scores {tuple(scores.shape)} and experts {experts.dtype} {tuple(experts.shape)}: "
            "expected [sequences, tokens, experts] and torch.int64 [sequences, tokens, slots]"
        )
    if real is not None and (real.shape != scores.shape[:2] or real.dtype != torch.bool):
        raise ValueError(f"real is {real.dtype} {tuple(real.shape)}: expected torch.bool {list(scores.shape[:2])}")
    return implementation("moe_route", backend, scores).moe_balance(scores, experts, real)
