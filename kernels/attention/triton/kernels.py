"""The kernels of attention: one query and a group of its heads to a program, forward and for dq; one tile of keys to a
program for dkv. No atomics but where they are asked for; sums in one fixed order.

    p_k = exp(s_k - lse),   ds_k = scale p_k (<do, kv_k> - <do, o>)
    dq = sum over keys of ds_k kv_k,   dkv_k = sum over queries and heads of p_k do + ds_k q

What a query sees besides its window is named by ENTRIES: "none", "range" [start, end), "list" (index, its first `end`
slots) or, backward, "counts": a range with the number of times that each of its entries was picked. Exponents are to
base 2.

Where queries are few, a query and a group of its heads is shared among programs, each with a split of its keys, and a
second kernel combines them.

b batch · t queries · n queries of a chunk · s window rows · p entries · k picks · h heads · d head dim
D power of two that holds d · BH heads of a program · TK keys of a step · KEYS, ROWS, COLUMNS of the product for dkv
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

FINITE = tl.constexpr(1e30)  # stands for an infinite sink
LOWEST = tl.constexpr(-3e38)  # the largest logit of no key
LOG2E = tl.constexpr(1.4426950408889634)
LENGTHS = ["chunk", "n", "t", "s", "p", "k", "kv_rows", "entry_rows"]  # vary: no kernel of its own for 1 or 16
BOUNDS = ["window_start", "start", "end", "index", "counts"]  # are read one by one: nor for their alignment


# what a query sees ---------------------------------------------------------------------------------------------------


@triton.jit
def _load(at, real, d: tl.constexpr, D: tl.constexpr):
    """Rows of d channels at these addresses as [rows, D], zero where not real: what is not seen is not read either."""
    column = tl.arange(0, D)[None, :]
    real = real[:, None] if d == D else real[:, None] & (column < d)
    return tl.load(at[:, None] + column, mask=real, other=0.0)


@triton.jit
def _window(window_start, query, row, window, DOCUMENTS: tl.constexpr):
    """First row that a query sees."""
    first = tl.maximum(row - window + 1, 0)
    if DOCUMENTS:
        first = tl.maximum(first, tl.load(window_start + query).to(tl.int32))
    return first


@triton.jit
def _entries(start, end, query, p, k, ENTRIES: tl.constexpr):
    """The entries that a query sees, from and to; of a list the slots."""
    first, last = 0, 0
    if ENTRIES == "list":
        last = k if end is None else tl.minimum(tl.load(end + query), k).to(tl.int32)
    elif ENTRIES != "none":
        first = tl.maximum(tl.load(start + query), 0).to(tl.int32)
        last = tl.minimum(tl.load(end + query), p).to(tl.int32)
    return first, last


@triton.jit
def _steps(first, last, TK: tl.constexpr):
    """How many steps of TK keys it takes from first to before last."""
    return tl.cdiv(tl.maximum(last - first, 0), TK)


@triton.jit
def _keys(kv, compressed, index, query, own, key, stop, p, k, d: tl.constexpr, ENTRIES: tl.constexpr):
    """Addresses of the keys of a step and which of them are seen: rows of kv if `own`, else entries or slots of the
    list, those before `stop`.

    All that can be is a scalar, the choice between the tensors too: triton 3.8 reads from a block of chosen pointers
    two bytes at a time. On AMD the choice is between numbers: triton 3.6 fails on one between pointers.
    """
    base, row, seen = kv, key, key < stop
    if ENTRIES == "list":
        entry = tl.load(index + query.to(tl.int64) * k + key, mask=seen & (not own), other=-1).to(tl.int32)
        row, seen = tl.where(own, key, entry), tl.where(own, seen, (entry >= 0) & (entry < p))
    if ENTRIES != "none":
        if is_hip():
            base = tl.where(own, kv.to(tl.int64), compressed.to(tl.int64)).to(kv.dtype)
        else:
            base = tl.where(own, kv, compressed)
    return base + row.to(tl.int64) * d, seen


# forward -------------------------------------------------------------------------------------------------------------


@triton.jit
def first_key(split, SPLIT):
    """Where a split begins, counted in keys: all have SPLIT of them, but from the 16th on each eighth doubles them."""
    doubled = (split // 8 - 1) * (split >= 16)
    return ((split - 8 * doubled) * SPLIT) << doubled


@triton.jit
def _logit_of_sink(sink, head, real):
    rest = tl.load(sink + head, mask=real, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(rest, -FINITE), FINITE)


@triton.jit
def _log_sum_exp(top, total, rest):
    """ln(total 2^top), exactly the sink where there is nothing else."""
    alone = (total == 1) & (top == rest * LOG2E)
    value = tl.where(alone, rest, (top + tl.log2(total)) / LOG2E)
    return tl.where(tl.abs(value) >= FINITE, value * float("inf"), value)


@triton.jit(do_not_specialize=[*LENGTHS, "window_splits"], do_not_specialize_on_alignment=BOUNDS)
def attention_forward(
    q, kv, compressed, sink, window_start, start, end, index, out, lse,
    t, s, p, k, kv_rows, entry_rows, window_splits, window, scale,
    h: tl.constexpr, d: tl.constexpr, DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """out and lse of one query for BH heads: the softmax starts from the sink, so that it is never empty.

    SPLIT: of one split of the keys, those of the window before those of the entries, without the sink and before the
    division: out [splits, b t, h, d], and as lse [splits, 2, b t, h] the largest logit and the sum.
    """
    groups = tl.cdiv(h, BH)
    query, head = tl.program_id(0) // groups, tl.program_id(0) % groups * BH + tl.arange(0, BH)
    batch, row = (query // t).to(tl.int64), s - t + query % t
    real, place = head < h, query.to(tl.int64) * h
    first, last = _window(window_start, query, row, window, DOCUMENTS), row + 1
    low, high = _entries(start, end, query, p, k, ENTRIES)
    qs = _load(q + place * d + head * d, real, d, D)
    if SPLIT:
        split, rows = tl.program_id(1), (tl.num_programs(0) // groups).to(tl.int64) * h
        last = tl.minimum(last, first + first_key(split + 1, SPLIT))
        first += first_key(split, SPLIT)
        high = tl.minimum(high, first_key(split - window_splits + 1, SPLIT))
        low = tl.maximum(low, first_key(split - window_splits, SPLIT))
        top, total = tl.full((BH,), LOWEST, tl.float32), tl.zeros((BH,), tl.float32)
    else:
        rest = _logit_of_sink(sink, head, real)
        top, total = rest * LOG2E, tl.full((BH,), 1.0, tl.float32)
    o = tl.zeros((BH, D), tl.float32)
    kv += batch * kv_rows * d
    if ENTRIES != "none":
        compressed += batch * entry_rows * d
    steps = _steps(first, last, TK)
    for i in tl.range(0, steps + _steps(low, high, TK), disable_licm=True):
        own = i < steps
        key = tl.where(own, first + i * TK, low + (i - steps) * TK) + tl.arange(0, TK)
        stop = tl.where(own, last, high)
        at, seen = _keys(kv, compressed, index, query, own, key, stop, p, k, d, ENTRIES)
        keys = _load(at, seen, d, D)
        logits = tl.dot(qs, keys.T, input_precision="ieee") * (scale * LOG2E)
        logits = tl.where(logits == float("-inf"), float("nan"), logits)  # an infinite key spoils all that see it
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        ps, fade = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        o = tl.dot(ps.to(keys.dtype), keys, o * fade[:, None], input_precision="ieee")
        top, total = higher, total * fade + tl.sum(ps, axis=1)
    column = tl.arange(0, D)[None, :]
    at, inside = head[:, None] * d + column, real[:, None] & (column < d)
    if SPLIT:
        tl.store(out + (split * rows + place) * d + at, o, mask=inside & (total != 0)[:, None])
        lse += 2 * split * rows + place + head
        tl.store(lse, top, mask=real)
        tl.store(lse + rows, total, mask=real)
    else:
        o = o / total[:, None]
        tl.store(out + place * d + at, o, mask=inside)
        tl.store(lse + place + head, _log_sum_exp(top, total, rest), mask=real)


@triton.jit(do_not_specialize=["splits"])
def combine_splits(
    parts, tops, sink, out, lse, splits, h: tl.constexpr, d: tl.constexpr, D: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """out and lse of one query and head from its splits, in their order; one without keys adds exactly nothing.

    parts [splits, b t h, d] and tops [splits, 2, b t h] are what `attention_forward` found.
    """
    place, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, D)
    rest = _logit_of_sink(sink, tl.program_id(0) % h, True)
    top, total, o = rest * LOG2E, tl.full((), 1.0, tl.float32), tl.zeros((D,), tl.float32)
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
    tl.store(lse + place, _log_sum_exp(top, total, rest))


# gradient of queries -------------------------------------------------------------------------------------------------


@triton.jit
def _q_and_do(q, dout, heads, d: tl.constexpr, D: tl.constexpr, BH: tl.constexpr):
    """[2 BH, D]: up to BH heads of q, then of dout: 128 rows are what eight warps of Hopper multiply at once."""
    row, column = tl.arange(0, 2 * BH)[:, None], tl.arange(0, D)[None, :]
    head = row % BH
    at, real = head * d + column, (head < heads) & (column < d)
    return tl.load(dout + at, mask=real & (row >= BH), other=tl.load(q + at, mask=real & (row < BH), other=0.0))


@triton.jit(do_not_specialize=[*LENGTHS, "slot_tiles"], do_not_specialize_on_alignment=BOUNDS)
def attention_backward(
    q, kv, compressed, window_start, start, end, index, counts, out, lse, dout, dq, delta, pairs,
    chunk, n, slot_tiles, t, s, p, k, kv_rows, entry_rows, window, scale, h: tl.constexpr, d: tl.constexpr,
    DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr, NEED_Q: tl.constexpr, NEED_KEYS: tl.constexpr,
    WINDOW_SLOTS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, PART: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """delta = <do, o> and dq of one query of the chunk for BH heads; pairs [b n, 2, h, slots]: its p and its ds."""
    SCALAR: tl.constexpr = q.dtype.element_ty == tl.float32  # whose products take no tensor cores: joined ones spill
    groups = tl.cdiv(h, BH)
    i_query, first_head, head = tl.program_id(0) // groups, tl.program_id(0) % groups * BH, tl.arange(0, BH)
    batch, query = (i_query // n).to(tl.int64), i_query // n * t + chunk + i_query % n
    row, real = s - t + chunk + i_query % n, head < h - first_head
    place = query.to(tl.int64) * h + first_head  # scalars, not blocks, go by the group: triton 3.9 spills else
    d_o = tl.zeros((BH,), tl.float32)
    for first_column in range(0, d, PART):
        at = place * d + head[:, None] * d + first_column + tl.arange(0, PART)[None, :]
        inside = real[:, None] & (first_column + tl.arange(0, PART) < d)[None, :]
        do_part, o_part = tl.load(dout + at, mask=inside, other=0.0), tl.load(out + at, mask=inside, other=0.0)
        d_o += tl.sum(do_part.to(tl.float32) * o_part.to(tl.float32), axis=1)
    tl.store(delta + place + head, d_o, mask=real)
    if NEED_Q or NEED_KEYS:
        first = _window(window_start, query, row, window, DOCUMENTS)
        low, high = _entries(start, end, query, p, k, ENTRIES)
        if SCALAR:
            qs, do = _load(q + place * d + head * d, real, d, D), _load(dout + place * d + head * d, real, d, D)
        else:
            both = _q_and_do(q + place * d, dout + place * d, h - first_head, d, D, BH)
        dqs = tl.zeros((BH, D), tl.float32)
        norm = tl.load(lse + place + head, mask=real, other=0.0)
        kv += batch * kv_rows * d
        if ENTRIES != "none":
            compressed += batch * entry_rows * d
        slots = slot_tiles * KEYS
        if NEED_KEYS:
            pairs += (2 * i_query.to(tl.int64) * h + first_head) * slots
        if ENTRIES == "counts":
            counts += i_query.to(tl.int64) * p
        origin, low_origin, base = first // TK * TK, low // TK * TK, _first_slot(row, window, KEYS)
        steps = _steps(origin, row + 1, TK)
        IN_SHARED: tl.constexpr = BH == 64  # q and dout, for wgmma; else triton 3.9 copies them there in each step
        for i in tl.range(0, steps + _steps(low_origin, high, TK), disable_licm=IN_SHARED):
            own = i < steps
            key = tl.where(own, origin + i * TK, low_origin + (i - steps) * TK) + tl.arange(0, TK)
            stop = tl.where(own, row + 1, high)
            at, seen = _keys(kv, compressed, index, query, own, key, stop, p, k, d, ENTRIES)
            seen = seen & (key >= tl.where(own, first, low))
            if ENTRIES == "counts":
                times = tl.load(counts + key, mask=seen & (not own), other=1)
                seen = seen & (times > 0)
            keys = _load(at, seen, d, D)
            if SCALAR:
                logits, dp = tl.dot(qs, keys.T, input_precision="ieee"), tl.dot(do, keys.T, input_precision="ieee")
            else:
                logits, dp = tl.split(tl.dot(both, keys.T).reshape(2, BH, TK).permute(1, 2, 0))
            ps = tl.where(seen[None, :], tl.exp2((logits * scale - norm[:, None]) * LOG2E), 0.0)
            if ENTRIES == "counts":
                ps *= times.to(tl.float32)[None, :]
            ds = tl.where(seen[None, :], ps * (dp - d_o[:, None]) * scale, 0.0).to(keys.dtype)
            if NEED_Q:
                dqs = tl.dot(ds, keys, dqs, input_precision="ieee")
            if NEED_KEYS:
                to = pairs + tl.where(own, -base, WINDOW_SLOTS) + (head[:, None] * slots + key[None, :])
                tl.store(to, ps, mask=real[:, None])
                tl.store(to + h * slots, ds, mask=real[:, None])
        if NEED_Q:
            column = tl.arange(0, D)[None, :]
            tl.store(dq + place * d + head[:, None] * d + column, dqs, mask=real[:, None] & (column < d))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def used_slots(index, used, k, AT_ONCE: tl.constexpr):
    """used [b t]: the slots of a query up to the last that holds a pick.

    A kernel of its own because a number that is loaded is known to be that of the whole warp, and one that is reduced
    is not: the loop that it ends would keep in registers what belongs into uniform ones.
    """
    query, last = tl.program_id(0).to(tl.int64), tl.zeros((AT_ONCE,), tl.int32)
    for first in range(0, k, AT_ONCE):
        slot = first + tl.arange(0, AT_ONCE)
        entry = tl.load(index + query * k + slot, mask=slot < k, other=-1)
        last = tl.where(entry >= 0, slot + 1, last)
    tl.store(used + query, tl.max(last, axis=0))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def count_picks(index, counts, chunk, n, t, p, k, AT_ONCE: tl.constexpr):
    """counts [b n, p] += how often a query of the chunk picked each entry: whole numbers, the same in any order."""
    i = tl.program_id(0)
    query = (i // n * t + chunk + i % n).to(tl.int64)
    for first in range(0, k, AT_ONCE):
        slot = first + tl.arange(0, AT_ONCE)
        entry = tl.load(index + query * k + slot, mask=slot < k, other=-1)
        tl.atomic_add(counts + i.to(tl.int64) * p + entry, 1, mask=(entry >= 0) & (entry < p))


# gradient of keys ----------------------------------------------------------------------------------------------------


@triton.jit
def _first_slot(row, window, KEYS: tl.constexpr):
    """The kv row that lies in slot 0 of a query's p and ds: tiles of KEYS rows lie alike for all queries."""
    return tl.maximum(row - window + 1, 0) // KEYS * KEYS


@triton.jit
def _who_sees(start, end, queries, begin, stop, key, KEYS: tl.constexpr, STEP: tl.constexpr):
    """Of the queries from begin to stop, the first and the last + 1 whose range meets the tile of keys."""
    first, last = stop, begin
    for at in range(begin, stop, STEP):
        query = at + tl.arange(0, STEP)
        low = tl.load(start + queries + query, mask=query < stop, other=0)
        high = tl.load(end + queries + query, mask=query < stop, other=0)
        sees = (high > key) & (low < key + KEYS)
        first = tl.minimum(first, tl.min(tl.where(sees, query, stop), axis=0))
        last = tl.maximum(last, tl.max(tl.where(sees, query + 1, begin), axis=0))
    return first, last


@triton.jit(
    do_not_specialize=[*LENGTHS, "first_tile", "tiles", "splits", "span", "slot_tiles", "past"],
    do_not_specialize_on_alignment=BOUNDS,
)
def keys_backward(
    q, dout, pairs, start, end, index, out, first_tile, tiles, splits, span,
    chunk, n, slot_tiles, t, past, p, k, window, h: tl.constexpr, d: tl.constexpr,
    KIND: tl.constexpr, ATOMIC: tl.constexpr, WINDOW_SLOTS: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """sum over (query, head) rows of p^T do + ds^T q, for a tile of keys and COLUMNS channels.

    KIND "window" and "range": queries of one split, ascending; out [splits, b, tiles KEYS, d]. "list": the picks of one
    query; out [b n, k, d], or added to the entries out [b, p, d] in any order.
    """
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles % splits
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    owner = tl.program_id(0) // (tiles * splits)  # the sequence; of a list, the query of the chunk
    key = (first_tile + tile) * KEYS + tl.arange(0, KEYS)
    begin, stop = chunk + split * span, tl.minimum(chunk + split * span + span, chunk + n)
    batch = owner
    if KIND == "window":
        begin = (first_tile + tile) * KEYS - past + split * span
        stop = tl.minimum(begin + span, chunk + n)
        begin = tl.maximum(begin, chunk)
    elif KIND == "range":
        begin, stop = _who_sees(start, end, batch * t, begin, stop, (first_tile + tile) * KEYS, KEYS, 128)
    else:
        batch = owner // n
        begin = chunk + owner % n
        stop = begin + 1
    dout += batch.to(tl.int64) * t * h * d
    q += batch.to(tl.int64) * t * h * d
    slots, total = slot_tiles * KEYS, tl.zeros((KEYS, COLUMNS), tl.float32)
    for at in range(begin * h, stop * h, ROWS):
        pair = at + tl.arange(0, ROWS)
        real, query = pair < stop * h, pair // h
        if KIND == "window":
            row = past + query
            slot = key[:, None] - _first_slot(row, window, KEYS)[None, :]
            seen = real[None, :] & (key[:, None] <= row[None, :]) & (key[:, None] > row[None, :] - window)
        else:
            slot = WINDOW_SLOTS + key[:, None]
            seen = real[None, :]
        place = ((batch * n + query - chunk).to(tl.int64) * 2 * h + pair % h) * slots
        shares = pairs + place[None, :] + slot
        rows = pair.to(tl.int64)[:, None] * d + column[None, :]
        inside = real[:, None] & (column < d)[None, :]
        ps, do = tl.load(shares, mask=seen, other=0.0), tl.load(dout + rows, mask=inside, other=0.0)
        total = tl.dot(ps, do, total, input_precision="ieee")
        ds, qs = tl.load(shares + h * slots, mask=seen, other=0.0), tl.load(q + rows, mask=inside, other=0.0)
        total = tl.dot(ds, qs, total, input_precision="ieee")
    inside = (column < d)[None, :]
    if ATOMIC:
        entry = tl.load(index + (batch.to(tl.int64) * t + begin) * k + key, mask=key < k, other=-1)
        at_entry = out + (batch.to(tl.int64) * p + entry)[:, None] * d + column[None, :]
        tl.atomic_add(at_entry, total, mask=inside & ((entry >= 0) & (entry < p))[:, None], sem="relaxed")
    elif KIND == "list":
        tl.store(
            out + (owner.to(tl.int64) * k + key)[:, None] * d + column[None, :], total, mask=inside & (key < k)[:, None]
        )
    else:
        batches = tl.num_programs(0) // (tiles * splits)
        at_key = (split * batches + batch).to(tl.int64) * tiles * KEYS + tile * KEYS + tl.arange(0, KEYS)
        tl.store(out + at_key[:, None] * d + column[None, :], total, mask=inside)
