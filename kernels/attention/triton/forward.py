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
    all_rows,
    column_of,
    entries,
    finite_rows,
    first_row,
    least,
    load_counts,
    load_rows,
    most,
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
    logit = tl.load(sink + head, mask=real, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(logit, -FINITE), FINITE)


@triton.jit
def log_sum_exp(top, total, sink_logit):
    """ln(total 2^top), exactly the sink where there is nothing else."""
    alone = (total == 1) & (top == sink_logit * LOG2E)
    value = tl.where(alone, sink_logit, (top + tl.log2(total)) / LOG2E)
    return tl.where(tl.abs(value) >= FINITE, value * float("inf"), value)


@triton.jit
def _logits(either, qs, keys):
    """q k^T; both branches are the same. Triton gives a product that meets the next one where it is made to warps in
    rows, of which 64 are too few for two warpgroups: each element would be made twice. What leaves a branch, all share.
    """
    xs = keys.T
    return tl.dot(qs, xs, input_precision="ieee") if either else tl.dot(qs, xs, input_precision="ieee")  # noqa: RUF034


@triton.jit
def empty_sum(top, D: tl.constexpr, TK: tl.constexpr):
    """l of the sink alone, 1. Wide heads keep a sum for each key of a step: warps add theirs at the end alone."""
    MANY: tl.constexpr = TK if D > 128 else 1
    return tl.full((top.shape[0], MANY), 1 / MANY, tl.float32)


@triton.jit
def _added(top, total, o, logits, many, values, always, COUNTED: tl.constexpr):
    """m, l and o with one more step of keys; l key by key, until the end.

    What is in an `if` comes behind the copies of the next step, which then run beside this product: a condition that
    holds `always` does it, as long as the compiler does not know.
    """
    higher = tl.maximum(top, tl.max(logits, axis=1))
    ps, fade = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
    if COUNTED:
        ps *= many
    if always:
        o = tl.dot(ps.to(values.dtype), values, o * fade[:, None], input_precision="ieee")
    if total.shape[1] == 1:
        ps = tl.sum(ps, axis=1)[:, None]
    return higher, total * fade[:, None] + ps, o


@triton.jit
def _read_tile(
    qs, memory, counted, seen_by, reach, top, scale, always,
    d: tl.constexpr, ENTRIES: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, TK: tl.constexpr, STAGES: tl.constexpr, CLEAN: tl.constexpr
):  # fmt: skip
    """m, l and o of a tile. Its queries see rows of kv from `first` to `row`, and entries from `low` to before `high`;
    all of them together from the origin to before the last, and from begin to stop.
    """
    kv, compressed = memory
    counts, of_query, queries, width = counted
    row, first, low, high = seen_by
    origin, last, begin, stop = reach
    total, o = empty_sum(top, D, TK), tl.zeros((top.shape[0], D), tl.float32)
    steps = steps_of(origin, last, TK)
    for i in tl.range(0, steps + steps_of(begin, stop, TK), disable_licm=True, num_stages=STAGES):
        own = i < steps
        first_key, step = tl.where(own, origin + i * TK, begin + (i - steps) * TK), tl.arange(0, TK)
        x = source(own, kv, compressed, ENTRIES) + first_key.to(tl.int64) * d
        real = step < tl.where(own, last, stop) - first_key
        fine = finite_rows(x, step, real, d, 8) if CLEAN else real
        keys = load_rows(x, step, fine, d, D)
        logits = _logits(own, qs, keys) * scale
        from_step, to_step = tl.where(own, first, low) - first_key, tl.where(own, row + 1, high) - first_key
        seen = (step[None, :] >= from_step) & (step[None, :] < to_step)
        many = 1.0
        if ENTRIES == "counts":
            counted_up_to = tl.where(own, 0, width // UNIT * UNIT)  # whole UNITs: aligned
            each = load_counts(counts, first_key + step, queries, counted_up_to, BQ)
            many = tl.where(own, 1.0, tl.dot(of_query, each, input_precision="ieee"))
            seen = seen & (many > 0)
        if CLEAN:
            logits += tl.where(fine, 0.0, float("nan"))[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        top, total, o = _added(top, total, o, logits, many, keys, always, ENTRIES == "counts")
    return top, tl.sum(total, axis=1), o


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def attention_tile(
    q, kv, compressed, sink, window_start, start, end, counts, out, lse,
    t, s, p, kv_rows, entry_rows, bound_rows, width, window, scale, h: tl.constexpr, d: tl.constexpr,
    DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr,
    TK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """out and lse of BQ queries for BH heads. ENTRIES: "none", "range", or "counts" of them within a range.

    Steps begin at multiples of TK where queries differ, so that no bit depends on who else is in the tile.
    """
    groups, tiles = tl.cdiv(h, BH), tl.cdiv(t, BQ)
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    batch, first_query = (tile // tiles).to(tl.int64), tile % tiles * BQ
    head, real, place = rows_of(tl.arange(0, BQ * BH), t - first_query, group, h, BH)
    base = (batch * t + first_query) * h
    qs, sink_logit = load_rows(q + base * d, place, real, d, D), logit_of_sink(sink, head, real)
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
    start_at, scale = sink_logit * LOG2E, scale * LOG2E
    top, total, o = _read_tile(
        qs, memory, counted, seen_by, reach, start_at, scale, t > 0, d, ENTRIES, D, BQ, TK, STAGES, False
    )
    broken = spoiled(o)
    if BQ == 1:
        total = tl.where(broken, float("nan"), total)
    elif tl.max(broken.to(tl.int32)) > 0:
        top, total, o = _read_tile(
            qs, memory, counted, seen_by, reach, start_at, scale, t > 0, d, ENTRIES, D, BQ, TK, STAGES, True
        )
    column = tl.arange(0, D)[None, :]
    tl.store(
        out + base * d + (place[:, None] * d + column), o * (1 / total)[:, None], mask=real[:, None] & (column < d)
    )
    tl.store(lse + base + place, log_sum_exp(top, total, sink_logit), mask=real)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def attention_list(
    q, kv, sink, lists, ends, out, lse, t, rows, width, scale, h: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """out and lse of one query for BH heads: its list of rows of kv [b, rows, d], see `list_keys`."""
    groups = tl.cdiv(h, BH)
    group, query = tl.program_id(0) % groups, tl.program_id(0) // groups
    head, real, place = rows_of(tl.arange(0, BH), 1, group, h, BH)
    base = query.to(tl.int64) * h
    qs, sink_logit = load_rows(q + base * d, place, real, d, D), logit_of_sink(sink, head, real)
    lists, end = lists + query.to(tl.int64) * width, tl.load(ends + 2 * query + 1)
    kv += (query // t).to(tl.int64) * rows * d
    top, total, o = sink_logit * LOG2E, empty_sum(sink_logit, D, TK), tl.zeros((BH, D), tl.float32)
    scale *= LOG2E
    step = tl.arange(0, TK)
    key = tl.load(lists + step)
    for i in tl.range(0, tl.cdiv(end, TK), disable_licm=True, num_stages=STAGES):
        seen, keys = key < rows - 1, all_rows(kv, key.to(tl.int64), d, D)
        key = tl.load(lists + (i + 1) * TK + step)  # a step ahead: addresses wait for them
        logits = tl.where(seen[None, :], _logits(i == 0, qs, keys) * scale, float("-inf"))
        top, total, o = _added(top, total, o, logits, 1.0, keys, t > 0, False)
    total = tl.where(spoiled(o), float("nan"), tl.sum(total, axis=1))
    column = tl.arange(0, D)[None, :]
    tl.store(
        out + base * d + (place[:, None] * d + column), o * (1 / total)[:, None], mask=real[:, None] & (column < d)
    )
    tl.store(lse + base + place, log_sum_exp(top, total, sink_logit), mask=real)
