"""Gradients of attention. A program of `queries_*`: a tile, or one query, as in forward, for dq; of wide heads it
leaves p and ds of each (query, head) in memory. A program of `keys_*`: a tile of keys, or the picks of one query, for
dkv, with p and ds as they were left, or made again. No atomics but where they are asked for; sums in one fixed order.

    p = exp(s - lse),   ds = scale p (do k^T - <do, o>),   dq = ds k,   dkv = p^T do + ds^T q

What one kernel leaves and another takes: pairs [b n, 2, h, slots], first the rows of a query's window, from a multiple
of KEYS on, so that tiles of keys lie alike for all queries; then its entries, or the slots of its list. Both sides go
by the same units of UNIT keys: of those that hold a seen key every number is written, and no other is read.

dq lies in an `if`: Triton lets a product whose sum goes on in the loop run beside the next step, and the assembler,
which sees that step clear its own sums meanwhile, would wait for each instruction of every product.

b batch · t queries · n queries of a chunk · s window rows · p entries · k picks · h heads · d head dim
D power of two that holds d · BQ, BH queries and heads of a program · TK keys of a step · KEYS, ROWS, COLUMNS of dkv
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

LOG2E = tl.constexpr(1.4426950408889634)


# queries -------------------------------------------------------------------------------------------------------------


@triton.jit
def _left(x, to, inside):
    """x, left in memory and loaded again, so that it need not lie in registers as it was made; else what is computed
    with it has to, too.
    """
    tl.store(to, x, mask=inside)
    tl.debug_barrier()
    return tl.load(to, mask=inside, other=0.0)


@triton.jit
def _inner(x, y, row, real, d: tl.constexpr, PART: tl.constexpr):
    """<x, y> of these rows, a few channels at a time."""
    total, column = tl.zeros(row.shape, tl.float32), tl.arange(0, PART)[None, :]
    for part in range(0, d, PART):
        at, inside = row[:, None] * d + part + column, real[:, None] & (part + column < d)
        total += tl.sum(tl.load(x + at, mask=inside, other=0.0) * tl.load(y + at, mask=inside, other=0.0), axis=1)
    return total


@triton.jit
def _inputs(
    q, dout, out, delta, queries, group, h, d: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr,
    JOINED: tl.constexpr
):  # fmt: skip
    """Rows of a tile of q and dout [BQ BH, D], and <do, o>, which is left in memory. JOINED, q and dout lie one above
    the other: eight warps of Hopper multiply 128 rows.
    """
    _, real, place = rows_of(tl.arange(0, BQ * BH), queries, group, h, BH)
    if q.dtype.element_ty == tl.float32:  # before its factors lie in registers, whole rows to a thread
        d_o = _left(_inner(out, dout, place, real, d, 64), delta + place, real)
    if JOINED:
        half, column = tl.arange(0, 2 * BQ * BH), tl.arange(0, D)[None, :]
        _, inside, at = rows_of(half % (BQ * BH), queries, group, h, BH)
        qs = load_rows(q, at, inside & (half < BQ * BH), d, D)
        below = (inside & (half >= BQ * BH))[:, None] & (column < d)
        qs = tl.load(dout + (at[:, None] * d + column), mask=below, other=qs)
        do = qs
    else:
        qs, do = load_rows(q, place, real, d, D), load_rows(dout, place, real, d, D)
    if q.dtype.element_ty != tl.float32:
        of_out = load_rows(out, place, real, d, D).to(tl.float32)
        if JOINED:
            both = tl.sum(qs.reshape(2, BQ * BH, D).to(tl.float32) * of_out[None], axis=2)
            _, inner = tl.split(both.permute(1, 0))
        else:
            inner = tl.sum(do.to(tl.float32) * of_out, axis=1)
        d_o = _left(inner, delta + place, real)
    return qs, do, d_o


@triton.jit
def _p_and_ds(
    qs, do, keys, seen, many, norm, d_o, scale, COUNTED: tl.constexpr, JOINED: tl.constexpr
):  # fmt: skip
    """p and ds of a step of keys, zero where it is not seen."""
    if JOINED:
        both = tl.dot(qs, keys.T, input_precision="ieee").reshape(2, qs.shape[0] // 2, keys.shape[0])
        logits, dp = tl.split(both.permute(1, 2, 0))
    else:
        logits, dp = tl.dot(qs, keys.T, input_precision="ieee"), tl.dot(do, keys.T, input_precision="ieee")
    ps = tl.where(seen, tl.exp2(logits * (scale * LOG2E) - norm[:, None]), 0.0)
    if COUNTED:
        ps *= many
    return ps, tl.where(seen, ps * (dp - d_o[:, None]) * scale, 0.0).to(keys.dtype)


@triton.jit
def _row_of_slot_0(row, window, KEYS: tl.constexpr):
    """The row of kv whose p and ds of a query lie in slot 0."""
    return tl.maximum(row - window + 1, 0) // KEYS * KEYS


@triton.jit
def _kept(key, low, high):
    """Whether p and ds of a key are kept for a query that sees those from low to before high."""
    return (key >= low // UNIT * UNIT) & (key < tl.where(low < high, tl.cdiv(high, UNIT) * UNIT, 0))


@triton.jit
def _read_tile(
    qs, do, norm, d_o, memory, counted, seen_by, reach, kept, scale, need_q, d: tl.constexpr,
    KEEP: tl.constexpr, ENTRIES: tl.constexpr, JOINED: tl.constexpr, WINDOW_SLOTS: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, TK: tl.constexpr, CLEAN: tl.constexpr
):  # fmt: skip
    """dq of a tile, which leaves its p and ds; what it sees as in forward, steps from multiples of TK on."""
    kv, compressed = memory
    counts, queries, width = counted
    row, first, low, high = seen_by
    origin, last, begin, stop = reach
    pairs, of_row, to_ds, row_0, real = kept
    dqs, of_rows, of_entries = tl.zeros((norm.shape[0], D), tl.float32), origin // TK * TK, begin // TK * TK
    steps = steps_of(of_rows, last, TK)
    turns = steps + steps_of(of_entries, stop, TK)
    if not KEEP:
        turns = tl.where(need_q != 0, turns, 0)
    for i in tl.range(0, tl.maximum(turns, 1) if CLEAN else turns, disable_licm=True):  # CLEAN: not 0, or none spoiled
        own = i < steps
        first_key, step = tl.where(own, of_rows + i * TK, of_entries + (i - steps) * TK), tl.arange(0, TK)
        x, key = source(own, kv, compressed, ENTRIES) + first_key.to(tl.int64) * d, first_key + step
        fine = (step >= tl.where(own, origin, begin) - first_key) & (step < tl.where(own, last, stop) - first_key)
        if CLEAN:
            fine = finite_rows(x, step, fine, d, 8)
        many = 1.0
        if ENTRIES == "counts" and BQ == 1:  # what it did not pick is not read
            many = tl.load(counts + key, mask=fine & (not own), other=1.0).to(tl.float32)
            fine, many = fine & (many > 0), many[None, :]
        keys = load_rows(x, step, fine, d, D)
        from_key, to_key = tl.where(own, first, low), tl.where(own, row + 1, high)
        seen = (step[None, :] >= from_key - first_key) & (step[None, :] < to_key - first_key)
        if ENTRIES == "counts":
            if BQ > 1:
                each = load_counts(counts, key, queries, tl.where(own, 0, width // UNIT * UNIT), BQ)  # whole UNITs
                of_query = query_of_rows(counts.dtype.element_ty, BQ, norm.shape[0] // BQ)
                many = tl.where(own, 1.0, tl.dot(of_query, each, input_precision="ieee"))
            seen = seen & (many > 0)
        ps, ds = _p_and_ds(qs, do, keys, seen, many, norm, d_o, scale, ENTRIES == "counts", JOINED)
        if need_q:
            dqs = tl.dot(ds, keys, dqs, input_precision="ieee")
        if KEEP and not CLEAN:
            to = pairs + (of_row + tl.where(own, key[None, :] - row_0, WINDOW_SLOTS + key[None, :]))
            here = real[:, None] & _kept(key[None, :], from_key, to_key)
            tl.store(to, ps, mask=here)
            tl.store(to + to_ds, ds, mask=here)
    return dqs


@triton.jit(do_not_specialize=[*LENGTHS, "slots", "need_q"], do_not_specialize_on_alignment=BOUNDS)
def queries_tile(
    q, kv, compressed, window_start, start, end, counts, lse, delta, out, dout, dq, pairs,
    chunk, n, slots, t, s, p, kv_rows, entry_rows, bound_rows, width, window, scale, need_q,
    h: tl.constexpr, d: tl.constexpr, KEEP: tl.constexpr, DOCUMENTS: tl.constexpr, ENTRIES: tl.constexpr,
    JOINED: tl.constexpr, WINDOW_SLOTS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """dq of BQ queries of the chunk for BH heads, and their p and ds (KEEP). ENTRIES: "none", "range" or "counts"."""
    groups, tiles = tl.cdiv(h, BH), tl.cdiv(n, BQ)
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    batch, first_query, after = (tile // tiles).to(tl.int64), chunk + tile % tiles * BQ, chunk + n
    pair = tl.arange(0, BQ * BH)
    head, real, place = rows_of(pair, after - first_query, group, h, BH)
    base = (batch * t + first_query) * h
    qs, do, d_o = _inputs(
        q + base * d, dout + base * d, out + base * d, delta + base, after - first_query, group, h, d, D, BQ, BH, JOINED
    )
    norm = tl.load(lse + base + place, mask=real, other=0.0) * LOG2E
    query = column_of(first_query, BQ, BH)
    row, bound = s - t + query, batch * bound_rows + query
    first = first_row(window_start, bound, row, window, query < after, DOCUMENTS)
    low, high = entries(start, end, bound, p, query < after, ENTRIES)
    origin, last, begin, stop = least(first, BQ), tl.minimum(s - t + first_query + BQ, s), 0, 0
    kv += batch * kv_rows * d
    if ENTRIES != "none":
        compressed += batch * entry_rows * d
        begin, stop = least(low, BQ), most(high, BQ)
    counted = 0, 0, 0
    if ENTRIES == "counts":
        counted = counts + (batch * t + first_query) * width, after - first_query, width
    slots = slots if JOINED else slots // KEYS * KEYS  # of products that are split, p and ds lie one by one: stores
    # that are known to be aligned would take them in another layout, and all that leads to them twice
    pairs += (batch * n + first_query - chunk) * 2 * h * slots
    memory, seen_by, reach = (kv, compressed), (row, first, low, high), (origin, last, begin, stop)
    kept = pairs, ((pair // BH * 2 * h + head) * slots)[:, None], h * slots, _row_of_slot_0(row, window, KEYS), real
    dqs = _read_tile(
        qs, do, norm, d_o, memory, counted, seen_by, reach, kept, scale, need_q,
        d, KEEP, ENTRIES, JOINED, WINDOW_SLOTS, D, BQ, TK, False
    )  # fmt: skip
    if BQ > 1 and tl.max(spoiled(dqs).to(tl.int32)) > 0:
        dqs = _read_tile(
            qs, do, norm, d_o, memory, counted, seen_by, reach, kept, scale, need_q,
            d, KEEP, ENTRIES, JOINED, WINDOW_SLOTS, D, BQ, TK, True
        )  # fmt: skip
    column = tl.arange(0, D)[None, :]
    tl.store(dq + base * d + (place[:, None] * d + column), dqs, mask=real[:, None] & (column < d) & (need_q != 0))


@triton.jit
def _clear(pairs, head, to_ds, slots, row_0, first, row, real):
    """Zeros beside a window, for what of its units a query does not see."""
    for key in tl.static_range(2):
        at = (first if key == 0 else row) // UNIT * UNIT + tl.arange(0, UNIT)
        to = pairs + (head[:, None] * slots + at[None, :] - row_0)
        nothing = real[:, None] & ((at < first) | (at > row))[None, :]
        tl.store(to, 0.0, mask=nothing)
        tl.store(to + to_ds, 0.0, mask=nothing)


@triton.jit(do_not_specialize=[*LENGTHS, "slots", "need_q"], do_not_specialize_on_alignment=BOUNDS)
def queries_list(
    q, kv, lists, ends, lse, delta, out, dout, dq, pairs,
    chunk, n, slots, t, s, rows, width, window, scale, need_q, h: tl.constexpr, d: tl.constexpr,
    KEEP: tl.constexpr, JOINED: tl.constexpr, WINDOW_SLOTS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, BH: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """The same of one query and its list of rows of kv [b, rows, d]."""
    groups = tl.cdiv(h, BH)
    group, i_query = tl.program_id(0) % groups, tl.program_id(0) // groups
    batch, query = (i_query // n).to(tl.int64), chunk + i_query % n
    head, real, place = rows_of(tl.arange(0, BH), 1, group, h, BH)
    base = (batch * t + query) * h
    norm = tl.load(lse + base + place, mask=real, other=0.0) * LOG2E
    own, end = tl.load(ends + 2 * (batch * t + query)), tl.load(ends + 2 * (batch * t + query) + 1)
    lists += (batch * t + query) * width
    kv += batch * rows * d
    row, slots = s - t + query, slots if JOINED else slots // KEYS * KEYS  # see `queries_tile`
    row_0, first = _row_of_slot_0(row, window, KEYS), row + 1 - own
    pairs += i_query.to(tl.int64) * 2 * h * slots
    if KEEP:
        _clear(pairs, head, h * slots, slots, row_0, first, row, real & (own > 0))
    dqs, stop, step = tl.zeros((BH, D), tl.float32), own + tl.cdiv(end - own, UNIT) * UNIT, tl.arange(0, TK)
    if not KEEP:
        stop = tl.where(need_q != 0, stop, 0)
    key = tl.load(lists + step)
    qs, do, d_o = _inputs(q + base * d, dout + base * d, out + base * d, delta + base, 1, group, h, d, D, 1, BH, JOINED)
    for i in tl.range(0, tl.cdiv(stop, TK), disable_licm=True):
        seen, keys = key < rows - 1, all_rows(kv, key.to(tl.int64), d, D)
        key = tl.load(lists + (i + 1) * TK + step)  # a step ahead: addresses wait for them
        ps, ds = _p_and_ds(qs, do, keys, seen[None, :], 1.0, norm, d_o, scale, False, JOINED)
        if need_q:
            dqs = tl.dot(ds, keys, dqs, input_precision="ieee")
        if KEEP:
            at = i * TK + step
            here = real[:, None] & (at < stop)[None, :]
            to = pairs + (head[:, None] * slots + (at + tl.where(at < own, first - row_0, WINDOW_SLOTS - own))[None, :])
            tl.store(to, ps, mask=here)
            tl.store(to + h * slots, ds, mask=here)
    column = tl.arange(0, D)[None, :]
    tl.store(dq + base * d + (place[:, None] * d + column), dqs, mask=real[:, None] & (column < d) & (need_q != 0))


# keys ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _who_sees(start, end, before, begin, stop, key, KEYS: tl.constexpr, STEP: tl.constexpr):
    """Of the queries from begin to stop, the first and the last + 1 whose range meets the tile of keys."""
    first, last = stop, begin
    for at in range(begin, stop, STEP):
        query = at + tl.arange(0, STEP)
        low = tl.load(start + before + query, mask=query < stop, other=0)
        high = tl.load(end + before + query, mask=query < stop, other=0)
        sees = (high > key) & (low < key + KEYS)
        first = tl.minimum(first, tl.min(tl.where(sees, query, stop), axis=0))
        last = tl.maximum(last, tl.max(tl.where(sees, query + 1, begin), axis=0))
    return first, last


@triton.jit
def _split_of_queries(start, end, before, key, split, span, first, stop, past, OWN: tl.constexpr, KEYS: tl.constexpr):
    """The queries of this split that may see a tile of keys: from, to before. OWN: splits count from the first that
    sees the tile; else from the first of all, and end where no range meets it.
    """
    if OWN:
        begin = key - past + split * span
        stop = tl.minimum(begin + span, stop)
        begin = tl.maximum(begin, first)
    else:
        begin, stop = first + split * span, tl.minimum(first + split * span + span, stop)
        begin, stop = _who_sees(start, end, before, begin, stop, key, KEYS, 128)
    return begin, stop


@triton.jit
def _own_or_entries(
    window_start, start, end, bound, row, window, p, real, OWN: tl.constexpr, DOCUMENTS: tl.constexpr
):  # fmt: skip
    """Which rows of kv (OWN) or entries queries see: from, to before."""
    if OWN:
        low, high = first_row(window_start, bound, row, window, real, DOCUMENTS), row + 1
    else:
        low, high = entries(start, end, bound, p, real, "range")
    return low, high


@triton.jit(
    do_not_specialize=[*LENGTHS, "first_tile", "tiles", "splits", "span", "slot_tiles", "past"],
    do_not_specialize_on_alignment=BOUNDS,
)
def keys_tile(
    q, dout, pairs, window_start, start, end, out, first_tile, tiles, splits, span,
    chunk, n, slot_tiles, t, past, p, bound_rows, window, h: tl.constexpr, d: tl.constexpr,
    OWN: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW_SLOTS: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [splits, b, tiles KEYS, d]: p^T do + ds^T q of a tile of keys, rows of kv (OWN) or entries of a range, and
    COLUMNS channels, over the (query, head) rows of one split of the chunk's queries, ascending.
    """
    parts = tl.cdiv(d, COLUMNS)
    work, column = tl.program_id(0) // parts, tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    tile, split, batch = work % tiles, work // tiles % splits, (work // (tiles * splits)).to(tl.int64)
    first_key = (first_tile + tile) * KEYS
    key, inside = (first_key + tl.arange(0, KEYS))[None, :], (column < d)[None, :]
    begin, stop = _split_of_queries(
        start, end, batch * bound_rows, first_key, split, span, chunk, chunk + n, past, OWN, KEYS
    )  # fmt: skip
    q += batch * t * h * d
    dout += batch * t * h * d
    slots, total = slot_tiles * KEYS, tl.zeros((KEYS, COLUMNS), tl.float32)
    for at in range(begin * h, stop * h, ROWS):
        pair = at + tl.arange(0, ROWS)
        real, query = (pair < stop * h)[:, None], (pair // h)[:, None]
        bound, row = batch * bound_rows + query, past + query
        low, high = _own_or_entries(window_start, start, end, bound, row, window, p, real, OWN, DOCUMENTS)
        slot = key - _row_of_slot_0(row, window, KEYS) if OWN else WINDOW_SLOTS + key
        kept = real & _kept(key, low, high)
        share = pairs + ((batch * n + query - chunk) * 2 * h + (pair % h)[:, None]) * slots + slot
        rows = pair.to(tl.int64)[:, None] * d + column[None, :]
        do, ps = tl.load(dout + rows, mask=real & inside, other=0.0), tl.load(share, mask=kept, other=0.0)
        qs, ds = tl.load(q + rows, mask=real & inside, other=0.0), tl.load(share + h * slots, mask=kept, other=0.0)
        total = tl.dot(ps.T, do, total, input_precision="ieee")
        total = tl.dot(ds.T, qs, total, input_precision="ieee")
    batches = tl.num_programs(0) // (parts * tiles * splits)
    at = ((split * batches + batch) * tiles + tile) * KEYS + tl.arange(0, KEYS)
    tl.store(out + at[:, None] * d + column[None, :], total, mask=inside)


@triton.jit(
    do_not_specialize=[*LENGTHS, "first_tile", "tiles", "splits", "span", "past"],
    do_not_specialize_on_alignment=BOUNDS,
)
def keys_again(
    q, x, lse, delta, dout, window_start, start, end, counts, out, first_tile, tiles, splits, span,
    t, past, p, rows, bound_rows, width, window, scale, h: tl.constexpr, d: tl.constexpr,
    OWN: tl.constexpr, DOCUMENTS: tl.constexpr, COUNTED: tl.constexpr,
    D: tl.constexpr, KEYS: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """The same where heads are narrow: of x, which is kv or the entries, p and ds are made again. To write and read
    them would take longer than two products of few channels.
    """
    work, step = tl.program_id(0), tl.arange(0, KEYS)
    tile, split, batch = work % tiles, work // tiles % splits, (work // (tiles * splits)).to(tl.int64)
    first_key, groups = (first_tile + tile) * KEYS, tl.cdiv(h, BH)
    key, after = (first_key + step)[:, None], t + past if OWN else p
    keys = load_rows(x + (batch * rows + first_key) * d, step, first_key + step < after, d, D)
    begin, stop = _split_of_queries(start, end, batch * bound_rows, first_key, split, span, 0, t, past, OWN, KEYS)
    total = tl.zeros((KEYS, D), tl.float32)
    if COUNTED:
        of_query = query_of_rows(counts.dtype.element_ty, BQ, BH).T
    for i in range(0, tl.cdiv(stop - begin, BQ) * groups):
        first_query = begin + i // groups * BQ
        _, real, place = rows_of(tl.arange(0, BQ * BH), stop - first_query, i % groups, h, BH)
        query, base = (first_query + tl.arange(0, BQ * BH) // BH)[None, :], (batch * t + first_query) * h
        qs, do = load_rows(q + base * d, place, real, d, D), load_rows(dout + base * d, place, real, d, D)
        norm = tl.load(lse + base + place, mask=real, other=0.0) * LOG2E
        d_o = tl.load(delta + base + place, mask=real, other=0.0)
        ps = tl.exp2(tl.dot(keys, qs.T, input_precision="ieee") * (scale * LOG2E) - norm[None, :])
        if COUNTED:
            counted = counts + (batch * t + first_query) * width
            each = load_counts(counted, first_key + step, stop - first_query, width, BQ)
            many = tl.dot(each.T, of_query, input_precision="ieee")
            seen, ps = real[None, :] & (many > 0), ps * many
        else:
            bound, row = batch * bound_rows + query, past + query
            low, high = _own_or_entries(
                window_start, start, end, bound, row, window, p, real[None, :], OWN, DOCUMENTS
            )  # fmt: skip
            seen = real[None, :] & (key >= low) & (key < high)
        dp = tl.dot(keys, do.T, input_precision="ieee")
        ps = tl.where(seen, ps, 0.0)
        ds = tl.where(seen, ps * (dp - d_o[None, :]) * scale, 0.0).to(qs.dtype)
        total = tl.dot(ps.to(do.dtype), do, total, input_precision="ieee")
        total = tl.dot(ds, qs, total, input_precision="ieee")
    batches, column = tl.num_programs(0) // (tiles * splits), tl.arange(0, D)[None, :]
    at = (((split * batches + batch) * tiles + tile) * KEYS + step)[:, None]
    tl.store(out + (at * d + column), total, mask=column < d)


@triton.jit(do_not_specialize=[*LENGTHS, "slot_tiles"], do_not_specialize_on_alignment=BOUNDS)
def keys_list(
    q, dout, pairs, index, ends, out, chunk, n, slot_tiles, t, p, k, h: tl.constexpr, d: tl.constexpr,
    ATOMIC: tl.constexpr, WINDOW_SLOTS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [b n, k, d]: p^T do + ds^T q of the picks of one query and COLUMNS channels, or, ATOMIC, added to the entries
    out [b, p, d] in any order. Rows behind the used slots are left as they are.
    """
    parts = tl.cdiv(d, COLUMNS)
    i_query, column = tl.program_id(0) // parts, tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    batch, head, inside = (i_query // n).to(tl.int64), tl.arange(0, HEADS), (column < d)[None, :]
    query, slots = batch * t + chunk + i_query % n, slot_tiles * KEYS
    rows, real = (query * h + head)[:, None] * d + column[None, :], (head < h)[:, None]
    do, qs = tl.load(dout + rows, mask=real & inside, other=0.0), tl.load(q + rows, mask=real & inside, other=0.0)
    pairs += ((i_query.to(tl.int64) * 2 * h + head) * slots)[:, None] + WINDOW_SLOTS
    last = tl.load(ends + 2 * query + 1) - tl.load(ends + 2 * query)
    for first in range(0, last, KEYS):
        slot = first + tl.arange(0, KEYS)
        kept = real & (slot < tl.cdiv(last, UNIT) * UNIT)[None, :]
        ps = tl.load(pairs + slot[None, :], mask=kept, other=0.0)
        ds = tl.load(pairs + h * slots + slot[None, :], mask=kept, other=0.0)
        total = tl.dot(ps.T, do, input_precision="ieee")
        total = tl.dot(ds.T, qs, total, input_precision="ieee")
        if ATOMIC:
            entry = tl.load(index + query * k + slot, mask=slot < last, other=-1)
            at = out + (batch * p + entry)[:, None] * d + column[None, :]
            tl.atomic_add(at, total, mask=inside & ((entry >= 0) & (entry < p))[:, None], sem="relaxed")
        else:
            at = out + (i_query.to(tl.int64) * k + slot)[:, None] * d + column[None, :]
            tl.store(at, total, mask=inside & (slot < last)[:, None])
