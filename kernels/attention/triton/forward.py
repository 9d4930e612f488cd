"""Attention forward. One program: a tile of queries by heads, which share the keys of their windows and of a range; or
one query, which shares its list of picks with none. One loop over steps of TK keys; exponents are to base 2.

    s = scale q k^T,   m' = max(m, s),   l' = l 2^(m - m') + sum 2^(s - m'),   o' = o 2^(m - m') + 2^(s - m') k

The softmax starts from the sink, so that it is never empty.

Keys that are not finite: p of what is not seen is 0, but 0 * inf is nan. A tile that meets one is read again, with
zeros in their place for all but those that see them.

b batch · t queries · s window rows · p entries · k picks · h heads · d head dim
D power of two that holds d · BQ, BH queries and heads of a program · TK keys of a step
"""

import triton
import triton.language as tl

from .seen import (
    BOUNDS,
    LENGTHS,
    UNIT,
    column_of,
    entries,
    finite_rows,
    first_row,
    least,
    load_counts,
    load_rows,
    most,
    picked,
    query_of_rows,
    rows_of,
    source,
    spoiled,
    steps_of,
)  # fmt: skip

FINITE = tl.constexpr(1e30)  # stands for an infinite sink
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logit_of_sink(sink, head, real):
    rest = tl.load(sink + head, mask=real, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(rest, -FINITE), FINITE)


@triton.jit
def log_sum_exp(top, total, rest):
    """ln(total 2^top), exactly the sink where there is nothing else."""
    alone = (total == 1) & (top == rest * LOG2E)
    value = tl.where(alone, rest, (top + tl.log2(total)) / LOG2E)
    return tl.where(tl.abs(value) >= FINITE, value * float("inf"), value)


@triton.jit
def _divided(own, qs, keys):
    """q k^T, divided among all warps. Triton gives a product that meets the next one where it is made to warps in rows,
    of which 64 are too few for two warpgroups: they would make each element twice. What leaves a branch it divides.
    """
    xs = keys.T
    return tl.dot(qs, xs, input_precision="ieee") if own else tl.dot(qs, xs, input_precision="ieee")  # noqa: RUF034


@triton.jit
def _added(top, total, o, logits, many, values, COUNTED: tl.constexpr):
    """m, l and o with one more step of keys."""
    higher = tl.maximum(top, tl.max(logits, axis=1))
    ps, fade = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
    if COUNTED:
        ps *= many
    o = tl.dot(ps.to(values.dtype), values, o * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(ps, axis=1), o


@triton.jit
def _read_tile(
    qs, memory, counted, seen_by, reach, top, scale,
    d: tl.constexpr, ENTRIES: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, TK: tl.constexpr, CLEAN: tl.constexpr
):  # fmt: skip
    """m, l and o of a tile. Its queries see rows of kv from `first` to `row`, and entries from `low` to before `high`;
    all of them together from the origin to before the last, and from begin to stop.
    """
    kv, compressed = memory
    counts, of_query, queries, width = counted
    row, first, low, high = seen_by
    origin, last, begin, stop = reach
    total, o = tl.full(top.shape, 1.0, tl.float32), tl.zeros((top.shape[0], D), tl.float32)
    steps = steps_of(origin, last, TK)
    for i in tl.range(0, steps + steps_of(begin, stop, TK), disable_licm=True):
        own = i < steps
        key = tl.where(own, origin + i * TK, begin + (i - steps) * TK) + tl.arange(0, TK)
        real = key < tl.where(own, last, stop)
        at = source(own, kv, compressed, ENTRIES) + key.to(tl.int64) * d
        fine = finite_rows(at, real, d, 8) if CLEAN else real
        keys = load_rows(at, fine, d, D)
        logits = _divided(own, qs, keys) * scale
        seen = (key[None, :] >= tl.where(own, first, low)) & (key[None, :] < tl.where(own, row + 1, high))
        many = 1.0
        if ENTRIES == "counts":
            each = load_counts(counts, key, queries, tl.where(own, 0, width // UNIT * UNIT), BQ)
            many = tl.where(own, 1.0, tl.dot(of_query, each, input_precision="ieee"))
            seen = seen & (many > 0)
        if CLEAN:
            logits += tl.where(fine, 0.0, float("nan"))[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        top, total, o = _added(top, total, o, logits, many, keys, ENTRIES == "counts")
    return top, total, o


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def attention_tile(
    q, kv, compressed, sink, window_start, start, end, counts, out, lse,
    t, s, p, kv_rows, entry_rows, bound_rows, width, window, scale, h: tl.constexpr, d: tl.constexpr,
    DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr,
    TK: tl.constexpr
):  # fmt: skip
    """out and lse of BQ queries for BH heads. ENTRIES: "none", "range", or "counts" of them within a range.

    Steps begin at multiples of TK where queries differ, so that no bit depends on who else is in the tile.
    """
    groups, tiles = tl.cdiv(h, BH), tl.cdiv(t, BQ)
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    batch, first_query = (tile // tiles).to(tl.int64), tile % tiles * BQ
    head, real, place = rows_of(tl.arange(0, BQ * BH), first_query, t, group, batch * t, h, BQ, BH)
    qs, rest = load_rows(q + place * d, real, d, D), logit_of_sink(sink, head, real)
    query = column_of(first_query, BQ, BH)
    row, bound = s - t + query, batch * bound_rows + query
    first = first_row(window_start, bound, row, window, query < t, DOCUMENTS)
    low, high = entries(start, end, bound, p, query < t, ENTRIES)
    origin, last, begin, stop = least(first, BQ), tl.minimum(s - t + first_query + BQ, s), 0, 0
    kv += batch * kv_rows * d
    if ENTRIES != "none":
        compressed += batch * entry_rows * d
        begin, stop = least(low, BQ), most(high, BQ)
    if BQ > 1:
        origin, begin = origin // TK * TK, begin // TK * TK
    counted = 0, 0, 0, 0
    if ENTRIES == "counts":
        of_query = query_of_rows(counts.dtype.element_ty, BQ, BH)
        counted = counts + (batch * t + first_query) * width, of_query, t - first_query, width
    memory, seen_by, reach = (kv, compressed), (row, first, low, high), (origin, last, begin, stop)
    start_at, scale = rest * LOG2E, scale * LOG2E
    top, total, o = _read_tile(qs, memory, counted, seen_by, reach, start_at, scale, d, ENTRIES, D, BQ, TK, False)
    broken = spoiled(o)
    if BQ == 1:
        total = tl.where(broken, float("nan"), total)
    elif tl.max(broken.to(tl.int32)) > 0:
        top, total, o = _read_tile(qs, memory, counted, seen_by, reach, start_at, scale, d, ENTRIES, D, BQ, TK, True)
    column = tl.arange(0, D)[None, :]
    tl.store(out + place[:, None] * d + column, o / total[:, None], mask=real[:, None] & (column < d))
    tl.store(lse + place, log_sum_exp(top, total, rest), mask=real)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def attention_picks(
    q, kv, compressed, sink, window_start, index, used, out, lse,
    t, s, p, k, kv_rows, entry_rows, bound_rows, window, scale, h: tl.constexpr, d: tl.constexpr,
    DOCUMENTS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """out and lse of one query for BH heads: its window, then the used slots of its list."""
    groups = tl.cdiv(h, BH)
    group, query = tl.program_id(0) % groups, tl.program_id(0) // groups
    batch, row = (query // t).to(tl.int64), s - t + query % t
    head, real, place = rows_of(tl.arange(0, BH), query, query + 1, group, tl.zeros((), tl.int64), h, 1, BH)
    qs, rest = load_rows(q + place * d, real, d, D), logit_of_sink(sink, head, real)
    first = first_row(window_start, batch * bound_rows + query % t, row, window, True, DOCUMENTS)
    index, last = index + query.to(tl.int64) * k, tl.load(used + query)
    top, total, o = rest * LOG2E, tl.full((BH,), 1.0, tl.float32), tl.zeros((BH, D), tl.float32)
    kv += batch * kv_rows * d
    compressed += batch * entry_rows * d
    scale *= LOG2E
    steps = steps_of(first, row + 1, TK)
    entry = picked(index, -steps, last, TK)
    for i in tl.range(0, steps + tl.cdiv(last, TK), disable_licm=True):
        own = i < steps
        key = tl.where(own, first + i * TK + tl.arange(0, TK), entry)
        seen = (key >= 0) & (key < tl.where(own, row + 1, p))
        keys = load_rows(source(own, kv, compressed, "list") + key.to(tl.int64) * d, seen, d, D)
        entry = picked(index, i + 1 - steps, last, TK)  # a step ahead: addresses wait for them
        logits = tl.where(seen[None, :], _divided(own, qs, keys) * scale, float("-inf"))
        top, total, o = _added(top, total, o, logits, 1.0, keys, False)
    total = tl.where(spoiled(o), float("nan"), total)
    column = tl.arange(0, D)[None, :]
    tl.store(out + place[:, None] * d + column, o / total[:, None], mask=real[:, None] & (column < d))
    tl.store(lse + place, log_sum_exp(top, total, rest), mask=real)
