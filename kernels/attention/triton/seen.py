"""What a query sees, for all kernels of attention: rows of its window, then entries by a range, counts or a list.

A tile is BQ queries by BH of their heads: ROWS rows of one product. What differs between its queries is a column
[ROWS, 1] here, or a number where BQ is 1: a number that was loaded is known to be that of the whole warp, and loops
that it ends keep registers free.

A step is of rows of kv, a query's `own`, or of entries.

t queries · s window rows · p entries · k picks · d head dim · D power of two that holds d
"""

import triton
import triton.language as tl
from triton.language.target_info import is_hip

UNIT = tl.constexpr(16)  # keys that are kept or left out together in p and ds: what lies side by side is copied at once
LENGTHS = ["chunk", "n", "t", "s", "p", "k", "kv_rows", "entry_rows", "bound_rows", "rows"]  # none for 1 or 16s
BOUNDS = ["window_start", "start", "end", "index", "lists", "ends"]  # are read one by one: nor for their alignment


@triton.jit
def load_rows(x, row, real, d: tl.constexpr, D: tl.constexpr):
    """These rows of x [.., d] as [rows, D], zero where not real: what is not seen is not read either."""
    column = tl.arange(0, D)[None, :]
    real = real[:, None] if d == D else real[:, None] & (column < d)
    return tl.load(x + (row[:, None] * d + column), mask=real, other=0.0)


@triton.jit
def all_rows(x, row, d: tl.constexpr, D: tl.constexpr):
    """The same where all are real."""
    column = tl.arange(0, D)[None, :]
    at = x + (row[:, None] * d + column)
    return tl.load(at) if d == D else tl.load(at, mask=column < d, other=0.0)


@triton.jit
def rows_of(pair, queries, group, h, BH: tl.constexpr):
    """Of the pairs of a tile of so many queries: head, whether it is real, row of q counted from the tile's first."""
    head = group * BH + pair % BH
    return head, (pair // BH < queries) & (head < h), pair // BH * h + head


@triton.jit
def column_of(first, BQ: tl.constexpr, BH: tl.constexpr):
    """The query of each row of a tile."""
    return first if BQ == 1 else (first + tl.arange(0, BQ * BH) // BH)[:, None]


@triton.jit
def least(x, BQ: tl.constexpr):
    """Of the queries of a tile."""
    return x if BQ == 1 else tl.min(x)


@triton.jit
def most(x, BQ: tl.constexpr):
    """Of the queries of a tile."""
    return x if BQ == 1 else tl.max(x)


@triton.jit
def first_row(window_start, bound, row, window, real, DOCUMENTS: tl.constexpr):
    """The first row of kv that a query with this row sees; window_start[bound] is that of its document."""
    first = tl.maximum(row - window + 1, 0)
    if DOCUMENTS:
        begin = tl.load(window_start + bound, mask=real, other=0)
        first = tl.maximum(first, tl.minimum(begin, row + 1).to(tl.int32))
    return first


@triton.jit
def entries(start, end, bound, p, real, ENTRIES: tl.constexpr):
    """The entries that a query sees, from and to before."""
    first, last = p, 0
    if ENTRIES != "none":
        first = tl.minimum(tl.maximum(tl.load(start + bound, mask=real, other=p), 0), p).to(tl.int32)
        last = tl.minimum(tl.maximum(tl.load(end + bound, mask=real, other=0), 0), p).to(tl.int32)
    return first, last


@triton.jit
def steps_of(first, last, TK: tl.constexpr):
    """How many steps of TK keys it takes from first to before last."""
    return tl.cdiv(tl.maximum(last - first, 0), TK)


@triton.jit
def source(own, kv, compressed, ENTRIES: tl.constexpr):
    """Where the keys of a step lie: a scalar, as triton 3.8 reads from a block of chosen pointers two bytes at a time.
    On AMD the choice is between numbers: triton 3.6 fails on one between pointers.
    """
    base = kv
    if ENTRIES != "none":
        if is_hip():
            base = tl.where(own, kv.to(tl.int64), compressed.to(tl.int64)).to(kv.dtype)
        else:
            base = tl.where(own, kv, compressed)
    return base


# counts --------------------------------------------------------------------------------------------------------------


@triton.jit
def query_of_rows(dtype: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr):
    """[ROWS, 16 or more]: 1 where the row is one of the query's. A product with it spreads what belongs to queries over
    their heads, exactly, and where products lie in registers.
    """
    QUERIES: tl.constexpr = BQ if BQ > 16 else 16
    return ((tl.arange(0, BQ * BH) // BH)[:, None] == tl.arange(0, QUERIES)[None, :]).to(dtype)


@triton.jit
def load_counts(counts, key, queries, width, BQ: tl.constexpr):
    """Counts [16 or more, TK] of a tile's queries, of which there are so many, for keys up to the width."""
    QUERIES: tl.constexpr = BQ if BQ > 16 else 16
    query = tl.arange(0, QUERIES)[:, None]
    real = (query < queries) & (query < BQ) & (key < width)[None, :]
    return tl.load(counts + (query * width + key[None, :]), mask=real, other=0.0)


# keys that are not finite --------------------------------------------------------------------------------------------


@triton.jit
def spoiled(x):
    """Which rows hold what is not finite: times zero, that is nan."""
    nothing = tl.sum(x * 0.0, axis=1)
    return nothing != nothing


@triton.jit
def finite_rows(x, row, real, d: tl.constexpr, PART: tl.constexpr):
    """Which of these rows of x [.., d] are finite, looked at a few channels at a time."""
    fine, column = real, tl.arange(0, PART)[None, :]
    for first in range(0, d, PART):
        at = x + (row[:, None] * d + first + column)
        part = tl.load(at, mask=real[:, None] & (first + column < d), other=0.0)
        fine = fine & ~spoiled(part.to(tl.float32))
    return fine


# lists ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def list_keys(
    window_start, index, lists, ends, t, s, p, k, bound_rows, width, window,
    DOCUMENTS: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """lists [b t, width]: what a query reads of kv, compressed and a row of zeros, one behind the other: its window,
    then what each slot of its picks holds, the zeros where that is nothing, and behind. ends [b t, 2]: how many of
    them are its window, and how many all are up to the last pick.

    A kernel of its own for what it saves in a loop that waits for addresses; and because numbers that are loaded are
    known to be those of the whole warp, as the one that ends the loop has to be.
    """
    query, last = tl.program_id(0), tl.zeros((AT_ONCE,), tl.int32)
    row, bound = s - t + query % t, (query // t).to(tl.int64) * bound_rows + query % t
    first = first_row(window_start, bound, row, window, True, DOCUMENTS)
    own = tl.maximum(row + 1 - first, 0)
    lists += query.to(tl.int64) * width
    for place in range(0, own, AT_ONCE):
        at = place + tl.arange(0, AT_ONCE)
        tl.store(lists + at, first + at, mask=at < own)
    for slot in range(0, width - own, AT_ONCE):
        slots = slot + tl.arange(0, AT_ONCE)
        entry = tl.load(index + query.to(tl.int64) * k + slots, mask=slots < k, other=-1)
        real = (entry >= 0) & (entry < p)
        tl.store(lists + own + slots, tl.where(real, s + entry, s + p).to(tl.int32), mask=slots < width - own)
        last = tl.where(real, slots + 1, last)
    tl.store(ends + 2 * query, own)
    tl.store(ends + 2 * query + 1, own + tl.max(last, axis=0))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def count_picks(index, counts, start, end, p, k, width, P: tl.constexpr, AT_ONCE: tl.constexpr):
    """counts [b t, width]: how often a query picked each of p entries; from start to before end lie all picks."""
    query, entry = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    many = tl.zeros((P,), tl.int32)
    for first in range(0, k, AT_ONCE):
        slot = first + tl.arange(0, AT_ONCE)
        pick = tl.load(index + query * k + slot, mask=slot < k, other=-1)
        real = (pick >= 0) & (pick < p)
        many += tl.histogram(tl.where(real, pick, 0).to(tl.int32), P, mask=real)
    tl.store(counts + query * width + entry, many.to(counts.dtype.element_ty), mask=entry < width)
    tl.store(start + query, tl.min(tl.where(many > 0, entry, P)))
    tl.store(end + query, tl.max(tl.where(many > 0, entry + 1, 0)))
