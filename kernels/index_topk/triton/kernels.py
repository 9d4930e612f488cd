"""The kernels of the indexer's choice: scores of a tile of queries and entries, then an exact top-k of each row.

    I_{t,s} = sum_h w_{t,h} ReLU(<q_{t,h}, k_s>)          heads in their order, fp32

Scores are kept for the visible entries of crowded queries alone, those with more entries than picks; the others take
all they see. A score becomes an unsigned number of the same order, so that the k-th largest is found bit by bit, or
eight bits at a time; among those equal to it the lowest entries are taken. Nothing is sorted, and no order of execution
can be seen in the result.

b batch · t queries · h index heads · d index head dim · p entries · k picks · BQ, BP queries and entries of a tile
"""

import triton
import triton.language as tl

LENGTHS = ["first", "t", "p", "rows", "k", "kept", "sixteens", "queries"]  # vary: no kernel of its own for 1 or 16
BOUNDS = ["start", "end"]  # are read one by one: nor for their alignment

# scores --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def index_scores(
    q, weights, keys, start, end, out, first, t, h, d, p, rows, k, sixteens,
    BQ: tl.constexpr, BP: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """out [tile - first, query of the tile, entry] of one tile of queries and BP entries, if a crowded query sees any
    of them; nothing is written to hidden tiles. A row of out has 16 `sixteens` entries; keys of a sequence begin `rows`
    behind those of the one before.
    """
    blocks = tl.cdiv(p, BP)
    tile, s = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BP
    batch = ((first + tile) // tl.cdiv(t, BQ)).to(tl.int64)
    query = (first + tile) % tl.cdiv(t, BQ) * BQ + tl.arange(0, BQ)
    token, real = batch * t + query, query < t
    low, high = tl.load(start + token, mask=real, other=0), tl.load(end + token, mask=real, other=0)
    crowded = high - low > k
    if (s >= tl.max(tl.where(crowded, high, 0), 0)) | (s + BP <= tl.min(tl.where(crowded, low, p), 0)):
        return
    entry, column = s + tl.arange(0, BP), tl.arange(0, D)
    at = keys + (batch * rows + entry[:, None]) * d + column[None, :]
    key = tl.load(at, mask=(entry < p)[:, None] & (column < d)[None, :], other=0.0)
    inside = real[:, None] & (column < d)[None, :]
    q += token[:, None] * h * d + column[None, :]
    weights += token * h
    total = tl.zeros((BQ, BP), tl.float32)
    for head in range(h):
        x = tl.load(q + head * d, mask=inside, other=0.0)
        weight = tl.load(weights + head, mask=real, other=0.0).to(tl.float32)
        hits = tl.dot(x, key.T, input_precision="ieee")
        total += tl.where(hits < 0, 0.0, hits) * weight[:, None]  # NaN stays NaN
    at = out + (tile.to(tl.int64) * BQ + tl.arange(0, BQ)[:, None]) * (16 * sixteens) + entry[None, :]
    tl.store(at, total, mask=real[:, None] & (entry < p)[None, :])


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def index_scores_of_few(
    q, weights, keys, start, end, out, first, t, h, d, p, rows, k, sixteens,
    BH: tl.constexpr, BP: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The same of one query: BH of its heads are the rows of a product, summed as a tree."""
    blocks = tl.cdiv(p, BP)
    row, s = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BP
    token = (first + row).to(tl.int64)
    low, high = tl.load(start + token), tl.load(end + token)
    if (high - low <= k) | (s >= high) | (s + BP <= low):
        return
    entry, column = s + tl.arange(0, BP), tl.arange(0, D)
    at = keys + (token // t * rows + entry[:, None]) * d + column[None, :]
    key = tl.load(at, mask=(entry < p)[:, None] & (column < d)[None, :], other=0.0)
    total = tl.zeros((BP,), tl.float32)
    for i in range(0, h, BH):
        head = i + tl.arange(0, BH)
        to = q + (token * h + head[:, None]) * d + column[None, :]
        x = tl.load(to, mask=(head < h)[:, None] & (column < d)[None, :], other=0.0)
        weight = tl.load(weights + token * h + head, mask=head < h, other=0.0).to(tl.float32)
        hits = tl.dot(x, key.T, input_precision="ieee")
        total += tl.sum(tl.where((hits < 0) | (head >= h)[:, None], 0.0, hits) * weight[:, None], axis=0)
    tl.store(out + row.to(tl.int64) * (16 * sixteens) + entry, total, mask=entry < p)


# top-k ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _ranks(scores, entry, low, high):
    """uint32 that sort like the scores of a row, NaN as -inf and -0.0 as 0.0; 0, below all, for hidden entries."""
    seen = (entry >= low) & (entry < high)
    x = tl.load(scores + entry, mask=seen, other=0.0)
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -(2**31)).to(tl.uint32, bitcast=True)
    return tl.where(seen, rank, 0)


@triton.jit
def _cut_held(rank, k):
    """The k-th largest of the ranks in registers, bit by bit, and how many of that rank are picked."""
    cut, bit = tl.zeros((), tl.uint32), tl.full((), 2**31, tl.uint32)
    for _ in range(32):  # the largest number that k ranks reach
        cut = tl.where(tl.sum((rank >= (cut | bit)).to(tl.int32), 0) >= k, cut | bit, cut)
        bit = bit >> 1
    return cut, k - tl.sum((rank > cut).to(tl.int32), 0)


@triton.jit
def _cut_streamed(scores, low, high, k, N: tl.constexpr):
    """The same of the row in memory, eight bits in each pass over it, N entries at a time."""
    cut, room = tl.zeros((), tl.uint32), tl.zeros((), tl.int32) + k
    for i in range(4):
        shift = 24 - 8 * i
        counts = tl.zeros((256,), tl.int32)
        for j in range(low // N * N, high, N):
            rank = _ranks(scores, j + tl.arange(0, N), low, high)
            alike = ((rank ^ cut) >> shift) >> 8 == 0  # in the bits found so far
            counts += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=alike)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        mine = (above < room) & (above + counts >= room)
        cut = cut | (tl.sum(tl.where(mine, tl.arange(0, 256), 0), 0) << shift).to(tl.uint32)
        room -= tl.sum(tl.where(mine, above, 0), 0)
    return cut, room


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def select(
    scores, start, end, picks, first, t, k, kept, sixteens, queries,
    HELD: tl.constexpr, N: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """picks [token, kept] of one query; tiles have so many queries.

    HELD: a row of at most N entries lies in registers; else N at a time stream through. Then all above the k-th largest
    and the first of those equal to it are written, C entries at a time.
    """
    row = tl.program_id(0)
    tile = first + row // queries
    query = tile % tl.cdiv(t, queries) * queries + row % queries
    if query >= t:
        return
    token = (tile // tl.cdiv(t, queries)).to(tl.int64) * t + query
    low, high = tl.load(start + token).to(tl.int32), tl.load(end + token).to(tl.int32)
    picks += token * kept
    if high - low <= k:
        for i in range(0, kept, C):
            slot = i + tl.arange(0, C)
            tl.store(picks + slot, tl.where(low + slot < high, low + slot, -1), mask=slot < kept)
        return
    scores += row.to(tl.int64) * (16 * sixteens)
    if HELD:
        cut, room = _cut_held(_ranks(scores, tl.arange(0, N), low, high), k)
    else:
        cut, room = _cut_streamed(scores, low, high, k, N)
    for i in range(low // C * C, high, C):
        entry = i + tl.arange(0, C)
        rank = _ranks(scores, entry, low, high)
        above, equal = rank > cut, rank == cut
        before = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # of both, in the halves of a word
        picked = above | (equal & ((before >> 16) <= room))
        tl.store(picks + (before & 0xFFFF) + tl.minimum(before >> 16, room) - 1, entry, mask=picked)
        equals = tl.sum(equal.to(tl.int32), 0)
        picks += tl.sum(above.to(tl.int32), 0) + tl.minimum(equals, room)
        room = tl.maximum(room - equals, 0)
