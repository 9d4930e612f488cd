"""The kernels of the router: scores, selection and weights of a block of rows, a counting sort, the balance.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs · b sequences · t tokens of a sequence
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


# choice --------------------------------------------------------------------------------------------------------------


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


# order ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["r"])
def count(
    experts, real, table, counted, r, e, k, REAL: tl.constexpr, SPAN: tl.constexpr, PAIRS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """table [spans, E]: how often each expert occurs in a span of pairs; counted: for real tokens. No unknown ids."""
    span, bins = tl.program_id(0).to(tl.int64), tl.zeros((E,), tl.int32)
    real_bins = tl.zeros((E,), tl.int32)
    for i in range(SPAN):
        pair = (span * SPAN + i) * PAIRS + tl.arange(0, PAIRS)
        ids = tl.load(experts + pair, mask=pair < r, other=-1)
        known = (ids >= 0) & (ids < e)
        ids = tl.where(known, ids, 0).to(tl.int32)
        bins += tl.histogram(ids, E, mask=known)
        if REAL:
            known &= tl.load(real + pair // k, mask=pair < r, other=0) != 0
            real_bins += tl.histogram(ids, E, mask=known)
    at = span * E + tl.arange(0, E)
    tl.store(table + at, bins)
    if REAL:
        tl.store(counted + at, real_bins)


@triton.jit(do_not_specialize=["spans"])
def scan(
    table, counted, before, offsets, counts, e, spans, E: tl.constexpr, SPANS: tl.constexpr
):  # fmt: skip
    """before [spans, E]: pairs of an expert in earlier spans; offsets [E]: of lower experts; counts: of `counted`."""
    expert, total, real_total = tl.arange(0, E), tl.zeros((E,), tl.int32), tl.zeros((E,), tl.int32)
    for start in range(0, spans, SPANS):
        span = start + tl.arange(0, SPANS)[:, None]
        at = span.to(tl.int64) * E + expert[None, :]
        number = tl.load(table + at, mask=span < spans, other=0)
        real_total += tl.sum(tl.load(counted + at, mask=span < spans, other=0), axis=0)
        tl.store(before + at, total[None, :] + tl.cumsum(number, 0) - number, mask=span < spans)
        total += tl.sum(number, axis=0)
    tl.store(offsets + expert, tl.cumsum(total, 0) - total)
    tl.store(counts + expert, real_total, mask=expert < e)


@triton.jit(do_not_specialize=["r"])
def place(
    experts, spans_before, offsets, order, inverse, r, e,
    SPAN: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, E: tl.constexpr
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
    at = spans_before + (block // SPAN).to(tl.int64) * E + ids
    row = tl.load(offsets + ids, mask=known, other=0) + tl.load(at, mask=known, other=0) + before
    tl.store(order + row, pair, mask=known)
    tl.store(inverse + pair, tl.where(known, row, -1), mask=pair < r)


# balance -------------------------------------------------------------------------------------------------------------


@triton.jit
def _shares(scores, real, row, inside, e, expert, REAL: tl.constexpr):
    """Scores [ROWS, E] of some tokens, one over the sum of each [ROWS, 1], and which tokens count."""
    if REAL:
        inside &= tl.load(real + row, mask=inside, other=0) != 0
    s = tl.load(scores + row * e + expert, mask=inside & (expert < e), other=0.0).to(tl.float32)
    return s, 1 / (tl.sum(s, axis=1)[:, None] + 1e-20), inside


@triton.jit(do_not_specialize=["t", "strips", "steps"])
def balance_strips(
    scores, experts, real, shares, visits, lengths, t, e, k, strips, steps,
    REAL: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Of `steps` blocks of ROWS tokens: sums of the shares s / sum s and of visits [E], and how many are real."""
    strip, b, expert = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, E)[None, :]
    share, visited, length = tl.zeros((E,), tl.float32), tl.zeros((E,), tl.int32), tl.zeros((ROWS,), tl.int32)
    for step in range(strip * steps, (strip + 1) * steps):
        token = step * ROWS + tl.arange(0, ROWS)[:, None]
        row = b * t + token
        s, inverse, counts = _shares(scores, real, row, token < t, e, expert, REAL)
        share += tl.sum(tl.where(counts, s * inverse, 0.0), axis=0)
        length += tl.sum(counts.to(tl.int32), axis=1)
        for slot in range(k):
            ids = tl.load(experts + row * k + slot, mask=counts, other=-1)
            visited += tl.sum((ids == expert).to(tl.int32), axis=0)
    at = (b * strips + strip) * E + tl.arange(0, E)
    tl.store(shares + at, share)
    tl.store(visits + at, visited)
    tl.store(lengths + b * strips + strip, tl.sum(length, axis=0))


@triton.jit(do_not_specialize=["b", "strips"])
def balance_sum(
    shares, visits, lengths, loss, counts, slopes, share, b, e, k, strips, STRIPS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """loss = mean over sequences of sum_e f_e P_e; slopes [b, e] = f / length, share = 1 / sequences with a token."""
    expert, total, sequences = tl.arange(0, E), 0.0, 0
    everyone = tl.zeros((E,), tl.int32)
    for i in range(b):
        mass, visited, lengths_of = (
            tl.zeros((E,), tl.float32), tl.zeros((E,), tl.int32), tl.zeros((STRIPS,), tl.int32)
        )  # fmt: skip
        for start in range(0, strips, STRIPS):
            strip = start + tl.arange(0, STRIPS)
            first = i * strips + strip
            at = first[:, None] * E + expert[None, :]
            mass += tl.sum(tl.load(shares + at, mask=(strip < strips)[:, None], other=0.0), axis=0)
            visited += tl.sum(tl.load(visits + at, mask=(strip < strips)[:, None], other=0), axis=0)
            lengths_of += tl.load(lengths + first, mask=strip < strips, other=0)
        length = tl.sum(lengths_of, axis=0)
        tokens = tl.maximum(length, 1).to(tl.float32)
        slope = visited.to(tl.float32) * (e / (k * tokens)) / tokens
        total += tl.sum(slope * mass, axis=0)
        sequences += (length > 0).to(tl.int32)
        everyone += visited
        tl.store(slopes + i * e + expert, slope, mask=expert < e)
    part = 1 / tl.maximum(sequences, 1).to(tl.float32)
    tl.store(share, part)
    tl.store(loss, total * part)
    tl.store(counts + expert, everyone, mask=expert < e)


@triton.jit(do_not_specialize=["n", "t"])
def balance_backward(
    dloss, scores, real, slopes, share, dscores, n, t, e, REAL: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """ds = dloss share (f - <f, s> / sum s) / sum s of each real token, f the slopes of its sequence."""
    row, expert = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, E)[None, :]
    scale = tl.load(dloss).to(tl.float32) * tl.load(share)
    s, inverse, counts = _shares(scores, real, row, row < n, e, expert, REAL)
    f = tl.load(slopes + row // t * e + expert, mask=counts & (expert < e), other=0.0)
    mean = tl.sum(f * s, axis=1)[:, None] * inverse
    ds = tl.where(counts, scale * inverse * (f - mean), 0.0)
    tl.store(dscores + row * e + expert, ds, mask=(row < n) & (expert < e))
