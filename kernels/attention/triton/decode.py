"""Attention of a few queries, as in decoding: the keys of one query are shared among programs, each with a split of
them, and `combine_splits` adds up in their order what those have found.

b batch · t queries · s window rows · p entries · k picks · h heads · d head dim
D power of two that holds d · BH heads of a program · TK keys of a step
"""

import triton
import triton.language as tl

from .forward import LOG2E, log_sum_exp, logit_of_sink
from .seen import BOUNDS, LENGTHS, entries, first_row, load_rows, rows_of, source, steps_of

LOWEST = tl.constexpr(-3e38)  # the largest logit of no key


@triton.jit
def first_key(split, SPLIT):
    """Where a split begins, counted in keys: all have SPLIT of them, but from the 16th on each eighth doubles them."""
    doubled = (split // 8 - 1) * (split >= 16)
    return ((split - 8 * doubled) * SPLIT) << doubled


@triton.jit(do_not_specialize=[*LENGTHS, "window_splits"], do_not_specialize_on_alignment=BOUNDS)
def attention_split(
    q, kv, compressed, window_start, start, end, index, out, tops,
    t, s, p, k, kv_rows, entry_rows, bound_rows, window_splits, window, scale, h: tl.constexpr, d: tl.constexpr,
    DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """Of one query, BH heads and one split of the keys, those of the window before those of the entries: out
    [splits, b t, h, d] without the sink and before the division, tops [splits, 2, b t, h] the largest logit and sum.
    """
    groups = tl.cdiv(h, BH)
    group, query, split = tl.program_id(0) % groups, tl.program_id(0) // groups, tl.program_id(1)
    batch, row = (query // t).to(tl.int64), s - t + query % t
    _, real, place = rows_of(tl.arange(0, BH), 1, group, h, BH)
    place += query.to(tl.int64) * h
    qs, bound = load_rows(q, place, real, d, D), batch * bound_rows + query % t
    first, last = first_row(window_start, bound, row, window, True, DOCUMENTS), row + 1
    if ENTRIES == "picks":
        low, high = 0, k
        index += query.to(tl.int64) * k
    else:
        low, high = entries(start, end, bound, p, True, ENTRIES)
    last = tl.minimum(last, first + first_key(split + 1, SPLIT))
    first += first_key(split, SPLIT)
    high = tl.minimum(high, first_key(split - window_splits + 1, SPLIT))
    low = tl.maximum(low, first_key(split - window_splits, SPLIT))
    top, total, o = tl.full((BH,), LOWEST, tl.float32), tl.zeros((BH,), tl.float32), tl.zeros((BH, D), tl.float32)
    kv += batch * kv_rows * d
    if ENTRIES != "none":
        compressed += batch * entry_rows * d
    steps = steps_of(first, last, TK)
    for i in tl.range(0, steps + steps_of(low, high, TK), disable_licm=True):
        own = i < steps
        key = tl.where(own, first + i * TK, low + (i - steps) * TK) + tl.arange(0, TK)
        seen = key < tl.where(own, last, high)
        if ENTRIES == "picks":
            entry = tl.load(index + key, mask=seen & (not own), other=-1)
            key, seen = tl.where(own, key, entry.to(tl.int32)), tl.where(own, seen, (entry >= 0) & (entry < p))
        keys = load_rows(source(own, kv, compressed, ENTRIES), key.to(tl.int64), seen, d, D)
        logits = tl.dot(qs, keys.T, input_precision="ieee") * (scale * LOG2E)
        logits = tl.where(logits == float("-inf"), float("nan"), logits)  # an infinite key spoils all that see it
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        ps, fade = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        o = tl.dot(ps.to(keys.dtype), keys, o * fade[:, None], input_precision="ieee")
        top, total = higher, total * fade + tl.sum(ps, axis=1)
    rows, column = (tl.num_programs(0) // groups).to(tl.int64) * h, tl.arange(0, D)[None, :]
    at, inside = (split * rows + place)[:, None] * d + column, real[:, None] & (column < d)
    tl.store(out + at, o, mask=inside & (total != 0)[:, None])
    tops += 2 * split * rows + place
    tl.store(tops, top, mask=real)
    tl.store(tops + rows, total, mask=real)


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    parts, tops, sink, out, lse, splits, h: tl.constexpr, d: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """out and lse of one query and head from its splits, in their order; one without keys adds exactly nothing."""
    place, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, D)
    sink_logit = logit_of_sink(sink, tl.program_id(0) % h, True)
    top, total, o = sink_logit * LOG2E, tl.full((), 1.0, tl.float32), tl.zeros((D,), tl.float32)
    for first in range(0, splits, AT_ONCE):
        split = (first + tl.arange(0, AT_ONCE)).to(tl.int64)
        at = tops + 2 * split * rows + place
        highest = tl.load(at, mask=split < splits, other=LOWEST)
        totals = tl.load(at + rows, mask=split < splits, other=0.0)
        at = parts + (split * rows + place)[:, None] * d + column[None, :]
        os = tl.load(at, mask=(totals != 0)[:, None] & (column < d)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(highest, axis=0))
        shares, fade = tl.exp2(highest - higher), tl.exp2(top - higher)
        o = o * fade + tl.sum(os * shares[:, None], axis=0)
        top, total = higher, total * fade + tl.sum(totals * shares, axis=0)
    tl.store(out + place * d + column, o / total, mask=column < d)
    tl.store(lse + place, log_sum_exp(top, total, sink_logit))
