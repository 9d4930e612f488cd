"""The router in Triton: one pass for scores, selection and weights, one for their gradient, a counting sort for the
expert order. No host synchronisation, no float atomics: the same bits on each run, for each row whatever the batch.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ...triton.launch import next_power, on_device
from ..eager import ASYMPTOTE, balance_loss
from ..routing import Permutation, Routing

__all__ = ["balance_loss", "moe_permutation", "moe_route"]  # the loss: torch ops; its counts are exact in any order

LOW = tl.constexpr(ASYMPTOTE)
TAKEN = tl.constexpr(-(2**63))
PAIRS = 128  # of one program of the sort
SPAN = 8  # programs that share a column of its table


def moe_route(
    logits: Tensor, *, top_k: int, scale: float, bias: Tensor | None = None, experts: Tensor | None = None
) -> Routing:
    """See `kernels.moe_route.moe_route`."""
    scores, chosen, weights = _route(logits, None if bias is None else bias.detach(), experts, top_k, scale)
    return Routing(scores, chosen if experts is None else experts, weights)


def moe_permutation(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Permutation:
    """See `kernels.moe_route.moe_permutation`."""
    return Permutation(*_permutation(experts, num_experts, real))


# scores and selection ------------------------------------------------------------------------------------------------


@triton.jit
def _sqrt_softplus(z):
    """`sqrt(log(1 + exp z))` in fp32, right to the last bits for every z."""
    softplus = tl.where(z > 0, z, 0.0) + libdevice.log1p(tl.exp(-tl.abs(z)))
    return tl.where(z < LOW, tl.exp(z / 2), tl.sqrt(softplus))


@triton.jit
def _descending_key(value, index):
    """int64 that sorts like value, then like -index; NaN as -inf. A score plus a bias is never -0.0."""
    value = tl.where(value == value, value, float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _route_forward(
    logits, bias, given, scores, experts, weights, n, e, k, scale,
    BIASED: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """s = sqrt(softplus(z)); k rounds of "the largest s + bias, then the lowest id"; w = scale s[chosen] / sum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert, slot = tl.arange(0, E)[None, :], tl.arange(0, K)[None, :]
    inside = (row < n) & (expert < e)
    z = tl.load(logits + row * e + expert, mask=inside, other=0.0).to(tl.float32)
    s = _sqrt_softplus(z)
    tl.store(scores + row * e + expert, s, mask=inside)
    picked = (row < n) & (slot < k)
    if GIVEN:
        ids = tl.load(given + row * k + slot, mask=picked, other=0)
    else:
        ids = tl.zeros((ROWS, K), tl.int64)
        if BIASED:
            s += tl.load(bias + expert, mask=expert < e, other=0.0).to(tl.float32)
        key = tl.where(expert < e, _descending_key(s, expert), TAKEN)
        for i in range(k):
            best = tl.max(key, axis=1)[:, None]
            ids = tl.where(slot == i, 0x7FFFFFFF - (best & 0x7FFFFFFF), ids)
            key = tl.where(key == best, TAKEN, key)
    known = picked & (ids >= 0) & (ids < e)  # an id outside the table weighs NaN
    z = tl.load(logits + row * e + ids, mask=known, other=float("nan")).to(tl.float32)
    s = tl.where(slot < k, _sqrt_softplus(z), 0.0)
    tl.store(experts + row * k + slot, ids, mask=picked)
    tl.store(weights + row * k + slot, s / (tl.sum(s, axis=1)[:, None] + 1e-20) * scale, mask=picked)


@triton.jit
def _route_backward(
    dscores, dweights, scores, experts, dlogits, n, e, k, scale,
    DSCORES: tl.constexpr, DWEIGHTS: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """ds = dscores, and scale (dw - <dw, s> / S) / S where chosen, S = sum s[chosen]; dz = ds (1 - exp(-s^2)) / 2s."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    expert, slot = tl.arange(0, E)[None, :], tl.arange(0, K)[None, :]
    inside = (row < n) & (expert < e)
    s = tl.load(scores + row * e + expert, mask=inside, other=1.0)
    ds = tl.zeros((ROWS, E), tl.float32)
    if DSCORES:
        ds = tl.load(dscores + row * e + expert, mask=inside, other=0.0)
    if DWEIGHTS:
        picked = (row < n) & (slot < k)
        ids = tl.load(experts + row * k + slot, mask=picked, other=0)
        chosen = tl.load(scores + row * e + ids, mask=picked, other=0.0)
        dw = tl.load(dweights + row * k + slot, mask=picked, other=0.0)
        total = tl.sum(chosen, axis=1)[:, None] + 1e-20
        mean = tl.sum(chosen * dw, axis=1)[:, None] / total
        for i in range(k):
            at = tl.load(experts + row * k + i, mask=row < n, other=-1)
            dw_at = tl.load(dweights + row * k + i, mask=row < n, other=0.0)
            ds += tl.where(expert == at, (dw_at - mean) / total * scale, 0.0)
    slope = tl.where(s < 1e-8, s / 2, -libdevice.expm1(-s * s) / (2 * s))
    tl.store(dlogits + row * e + expert, ds * slope, mask=inside)


def _blocks(n: int, e: int, k: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and blocks of the router: about 2,048 scores to a program, whatever the number of tokens."""
    wide = next_power(e)
    rows = max(2048 // wide, 1)
    return (triton.cdiv(n, rows),), {"ROWS": rows, "E": wide, "K": next_power(k), "num_warps": 4 if wide <= 2048 else 8}


@torch.library.custom_op("abyssal::moe_route", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, experts: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, e = logits.shape
    logits, bias, given = (t if t is None else t.contiguous() for t in (logits, bias, experts))
    scores, chosen, weights = _route_outputs(logits, bias, experts, top_k, scale)
    grid, blocks = _blocks(n, e, top_k)
    flags = {"BIASED": bias is not None, "GIVEN": given is not None}
    with on_device(logits):
        _route_forward[grid](logits, bias, given, scores, chosen, weights, n, e, top_k, scale, **flags, **blocks)
    return scores, chosen, weights


@_route.register_fake
def _route_outputs(
    logits: Tensor, bias: Tensor | None, experts: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, e = logits.shape
    scores, weights = (logits.new_empty(n, width, dtype=torch.float32) for width in (e, top_k))
    return scores, logits.new_empty(n, top_k, dtype=torch.int64), weights


@torch.library.custom_op("abyssal::moe_route_backward", mutates_args=())
def _route_gradient(
    dscores: Tensor | None, dweights: Tensor | None, scores: Tensor, experts: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    n, e = scores.shape
    dscores, dweights = (t if t is None else t.contiguous() for t in (dscores, dweights))
    dlogits = scores.new_empty(scores.shape, dtype=dtype)
    grid, blocks = _blocks(n, e, experts.shape[1])
    flags = {"DSCORES": dscores is not None, "DWEIGHTS": dweights is not None}
    with on_device(scores):
        _route_backward[grid](
            dscores, dweights, scores, experts, dlogits, n, e, experts.shape[1], scale, **flags, **blocks
        )
    return dlogits


@_route_gradient.register_fake
def _(dscores: Any, dweights: Any, scores: Tensor, experts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return scores.new_empty(scores.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtype, ctx.scale = inputs[0].dtype, inputs[4]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:2])


def _gradient(ctx: Any, dscores: Tensor | None, _: None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, experts = ctx.saved_tensors
    if dscores is None and dweights is None:
        return None, None, None, None, None
    return _route_gradient(dscores, dweights, scores, experts, ctx.scale, ctx.dtype), None, None, None, None


_route.register_autograd(_gradient, setup_context=_keep)


# expert order --------------------------------------------------------------------------------------------------------


@triton.jit
def _count(
    experts, real, table, counted, r, e, k, spans,
    REAL: tl.constexpr, SPAN: tl.constexpr, PAIRS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """How often each expert occurs in one span of pairs, and how often for real tokens; unknown ids count as e."""
    span, bins = tl.program_id(0), tl.zeros((E,), tl.int32)
    real_bins = tl.zeros((E,), tl.int32)
    for i in range(SPAN):
        pair = (span.to(tl.int64) * SPAN + i) * PAIRS + tl.arange(0, PAIRS)
        ids = tl.load(experts + pair, mask=pair < r, other=e)
        ids = tl.where((ids >= 0) & (ids < e), ids, e).to(tl.int32)
        bins += tl.histogram(ids, E, mask=pair < r)
        if REAL:
            real_bins += tl.histogram(ids, E, mask=tl.load(real + pair // k, mask=pair < r, other=0) != 0)
    at = tl.arange(0, E) * spans + span
    tl.store(table + at, bins, mask=tl.arange(0, E) <= e)
    tl.store(counted + at, real_bins if REAL else bins, mask=tl.arange(0, E) <= e)


@triton.jit
def _place(
    experts, ends, table, order, inverse, r, e, spans,
    SPAN: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Row of a pair = pairs of lower experts + those of its expert in earlier spans + those before it in its own."""
    block = tl.program_id(0)
    first = block.to(tl.int64) // SPAN * SPAN * PAIRS  # of the span
    place = block % SPAN * PAIRS + tl.arange(0, PAIRS)
    pair = first + place
    ids = tl.load(experts + pair, mask=pair < r, other=-1).to(tl.int32)
    before = tl.zeros((PAIRS,), tl.int32)
    for start in range(0, (block % SPAN + 1) * PAIRS, STEP):
        earlier = start + tl.arange(0, STEP)
        theirs = tl.load(experts + first + earlier, mask=first + earlier < r, other=-1).to(tl.int32)
        same = (theirs[:, None] == ids[None, :]) & (earlier[:, None] < place[None, :])
        before += tl.sum(tl.where(same, 1, 0), axis=0)
    known = (pair < r) & (ids >= 0) & (ids < e)
    at = ids.to(tl.int64) * spans + block // SPAN
    row = tl.load(ends + at, mask=known, other=0) - tl.load(table + at, mask=known, other=0) + before
    tl.store(order + row, pair, mask=known)
    tl.store(inverse + pair, tl.where(known, row, -1), mask=pair < r)


@torch.library.custom_op("abyssal::moe_permutation", mutates_args=())
def _permutation(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    experts, real = experts.contiguous(), real if real is None else real.contiguous()
    r, k = experts.numel(), experts.shape[1]
    order, counts, inverse = _permutation_outputs(experts, num_experts, real)
    blocks = triton.cdiv(r, PAIRS)
    spans = triton.cdiv(blocks, SPAN)
    table, counted = experts.new_empty(2, num_experts + 1, spans, dtype=torch.int32)
    with on_device(experts):
        _count[(spans,)](
            experts, real, table, counted, r, num_experts, k, spans,
            REAL=real is not None, SPAN=SPAN, PAIRS=PAIRS, E=next_power(num_experts + 1),
        )  # fmt: skip
        ends = table.flatten().cumsum(0)
        torch.sum(counted[:-1], dim=1, out=counts)
        _place[(blocks,)](
            experts, ends, table, order, inverse, r, num_experts, spans, SPAN=SPAN, PAIRS=PAIRS, STEP=min(PAIRS, 64)
        )
    return order, counts, inverse


@_permutation.register_fake
def _permutation_outputs(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    empty = experts.new_empty
    return empty(experts.numel()), empty(num_experts), empty(experts.shape)
