"""The kernels of the router: scores, selection and weights of a block of rows, their gradient, and a counting sort.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..eager import ASYMPTOTE

LOW = tl.constexpr(ASYMPTOTE)
TAKEN = tl.constexpr(-(2**63))


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


@triton.jit(do_not_specialize=["n"])
def route_forward(
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


@triton.jit(do_not_specialize=["n"])
def route_backward(
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


@triton.jit(do_not_specialize=["r", "spans"])
def count(
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


@triton.jit(do_not_specialize=["r", "spans"])
def place(
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
