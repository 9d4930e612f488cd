"""The kernels of the indexer's choice: scores of a tile of queries and entries, then an exact top-k of each row.

    I_{t,s} = sum_h w_{t,h} ReLU(<q_{t,h}, k_s>)          heads in their order, fp32

Scores are kept for the visible entries of crowded queries alone, those with more entries than picks; the others take
all they see. A score becomes an unsigned number of the same order, so that the k-th largest is found bit by bit, or
eight bits at a time; among those equal to it the lowest entries are taken. Nothing is sorted, and no order of execution
can be seen in the result. Of a long row, the groups of entries that have the k largest maxima hold all picks.

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
        total += tl.where(hits <= 0, 0.0, hits) * weight[:, None]  # NaN stays NaN
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
        total += tl.sum(tl.where((hits <= 0) | (head >= h)[:, None], 0.0, hits) * weight[:, None], axis=0)
    tl.store(out + row.to(tl.int64) * (16 * sixteens) + entry, total, mask=entry < p)


# top-k ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _ranks(x, seen):
    """uint32 that sort like scores, NaN as -inf and -0.0 as 0.0; 0, below all, for what is not seen."""
    x = tl.where(x == x, x, float("-inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, ~bits, bits ^ -(2**31)).to(tl.uint32, bitcast=True)
    return tl.where(seen, rank, 0)


@triton.jit
def _read(scores, entry, low, high, width):
    """Scores of a row of so many, a multiple of 16, and which of them are seen."""
    return tl.load(scores + entry, mask=entry < width, other=0.0), (entry >= low) & (entry < high)


@triton.jit
def _cut_held(rank, k):
    """The k-th largest of the ranks in registers, bit by bit, and how many of that rank are picked."""
    cut, bit = tl.zeros((), tl.uint32), tl.full((), 2**31, tl.uint32)
    for _ in range(32):  # the largest number that k ranks reach
        cut = tl.where(tl.sum((rank >= (cut | bit)).to(tl.int32), 0) >= k, cut | bit, cut)
        bit = bit >> 1
    return cut, k - tl.sum((rank > cut).to(tl.int32), 0)


@triton.jit
def _cut_streamed(scores, low, high, width, k, N: tl.constexpr):
    """The same of the row in memory, eight bits in each pass over it, N entries at a time."""
    cut, room = tl.zeros((), tl.uint32), tl.zeros((), tl.int32) + k
    for i in range(4):
        shift = 24 - 8 * i
        counts = tl.zeros((256,), tl.int32)
        for j in range(low // N * N, high, N):
            x, seen = _read(scores, j + tl.arange(0, N), low, high, width)
            rank = _ranks(x, seen)
            alike = ((rank ^ cut) >> shift) >> 8 == 0  # in the bits found so far
            counts += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=alike)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        mine = (above < room) & (above + counts >= room)
        cut = cut | (tl.sum(tl.where(mine, tl.arange(0, 256), 0), 0) << shift).to(tl.uint32)
        room -= tl.sum(tl.where(mine, above, 0), 0)
    return cut, room


@triton.jit
def _write(to, number, rank, cut, room):
    """The numbers whose rank is above the cut, and the first `room` of those equal to it; how many these two are."""
    above, equal = rank > cut, rank == cut
    before = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # of both, in the halves of a word
    picked = above | (equal & ((before >> 16) <= room))
    tl.store(to + (before & 0xFFFF) + tl.minimum(before >> 16, room) - 1, number, mask=picked)
    return tl.sum(above.to(tl.int32), 0), tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _candidates(scores, picks, low, high, width, k, N: tl.constexpr, G: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """The entries, ascending, of the k groups of G with the largest maxima, of equal ones the first: each of these has
    an entry before those of any other group. k is at most K, W entries of each group are read at a time.
    """
    group, top = tl.arange(0, N // G), tl.full((N // G,), float("-inf"), tl.float32)
    for j in range(0, G, W):
        x, seen = _read(scores, group[:, None] * G + j + tl.arange(0, W)[None, :], low, high, width)
        top = tl.maximum(top, tl.max(tl.where(seen & (x == x), x, float("-inf")), axis=1))
    rank = _ranks(top, (group * G + G > low) & (group * G < high))
    cut, room = _cut_held(rank, k)
    _write(picks, group, rank, cut, room)
    tl.debug_barrier()
    slot = tl.arange(0, K)
    chosen = tl.load(picks + slot, mask=slot < k, other=N // G).to(tl.int32)
    tl.debug_barrier()
    return tl.reshape(chosen[:, None] * G + tl.arange(0, G)[None, :], (K * G,))


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def select(
    scores, start, end, picks, first, t, k, kept, sixteens, queries,
    HELD: tl.constexpr, N: tl.constexpr, G: tl.constexpr, W: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """picks [token, kept] of one query; tiles have so many queries.

    HELD: of a row of at most N entries all lie in registers, or those of k groups of G; else N at a time stream
    through. Then all above the k-th largest and the first of those equal to it are written, C entries of what streams
    at a time.
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
    width = 16 * sixteens
    scores += row.to(tl.int64) * width
    if HELD:
        entry = tl.arange(0, N) if G == 1 else _candidates(scores, picks, low, high, width, k, N, G, W, K)
        x, seen = _read(scores, entry, low, high, width)
        rank = _ranks(x, seen)
        cut, room = _cut_held(rank, k)
        _write(picks, entry, rank, cut, room)
    else:
        cut, room = _cut_streamed(scores, low, high, width, k, N)
        for i in range(low // C * C, high, C):
            entry = i + tl.arange(0, C)
            x, seen = _read(scores, entry, low, high, width)
            above, equal = _write(picks, entry, _ranks(x, seen), cut, room)
            picks += above + tl.minimum(equal, room)
            room = tl.maximum(room - equal, 0)
