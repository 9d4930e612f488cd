"""The kernels of the routed experts. Rows lie in expert order; a tile is up to BM consecutive rows of one expert.

Every program owns what it writes and sums in one fixed order: no atomics, the same bits on each run, and for each token
the same bits whatever the rest of the batch. Sums, and everything between two products, are fp32.

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order · BM BN BK blocks of a product
"""

import triton
import triton.language as tl

# which rows ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total"])
def schedule(counts, offsets, tiles, e, total, BM: tl.constexpr, E: tl.constexpr, TILES: tl.constexpr):
    """tiles [total, 2]: expert (-1 past the last) and first row; offsets [e + 1]: first row of each expert."""
    expert = tl.arange(0, E)
    count = tl.load(counts + expert, mask=expert < e, other=0)
    tiles_of = (count + BM - 1) // BM
    last_row, last_tile = tl.cumsum(count, 0), tl.cumsum(tiles_of, 0)
    first = tl.program_id(0) == 0
    tl.store(offsets + expert, last_row - count, mask=(expert < e) & first)
    tl.store(offsets + expert + 1, last_row, mask=(expert == e - 1) & first)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    mine = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # how many experts end before this tile
    row_of_tile_0 = last_row - count - (last_tile - tiles_of) * BM
    row = tl.sum(tl.where(expert[None, :] == mine[:, None], row_of_tile_0[None, :], 0), axis=1) + tile * BM
    tl.store(tiles + 2 * tile, tl.where(mine < e, mine, -1), mask=tile < total)
    tl.store(tiles + 2 * tile + 1, row, mask=tile < total)


@triton.jit
def _tile_and_block(total, blocks, GROUP: tl.constexpr):
    """Row tile and column block of this program; GROUP tiles take each column block in turn, while L2 holds it."""
    program = tl.program_id(0)
    first = program // (GROUP * blocks) * GROUP
    size = tl.minimum(total - first, GROUP)
    return first + program % (GROUP * blocks) % size, program % (GROUP * blocks) // size


@triton.jit
def _pairs(order, row, real, K: tl.constexpr):
    """Pairs of these rows, all below 2^31, and their tokens as int64: in 32 bits, by a constant, it is no division."""
    pair = tl.load(order + row, mask=real, other=0).to(tl.int32)
    return pair, (pair // K).to(tl.int64)


@triton.jit
def _weight(w, expert, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """`w[expert, row : row + ROWS, column : column + COLUMNS]` of w `[e, rows, columns]`, zero past its edges."""
    if TMA:
        block = w.load([expert, row, column]).reshape(ROWS, COLUMNS)
    else:
        i, j = (row + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLUMNS))[None, :]
        at = w + expert.to(tl.int64) * rows * columns + i.to(tl.int64) * columns + j
        block = tl.load(at, mask=(i < rows) & (j < columns), other=0.0)
    return block


# SwiGLU --------------------------------------------------------------------------------------------------------------


@triton.jit
def _clamped(g, u, limit):
    """`min(g, limit), clamp(u, -limit, limit)`; NaN stays NaN."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(g, limit, propagate_nan=nan), tl.clamp(u, -limit, limit, propagate_nan=nan)


@triton.jit
def _swiglu(g, u, limit):
    g, u = _clamped(g, u, limit)
    return g / (1 + tl.exp(-g)) * u


@triton.jit
def _swiglu_slopes(g, u, limit):
    """`a = silu(g) u` after the clamp, and its slopes da/dg, da/du: zero outside the clamp, not at equality."""
    gc, uc = _clamped(g, u, limit)
    sigmoid = 1 / (1 + tl.exp(-gc))
    silu = gc * sigmoid
    dg = tl.where(g > limit, 0.0, uc * (sigmoid + silu * (1 - sigmoid)))
    du = tl.where(tl.abs(u) > limit, 0.0, silu)
    return silu * uc, dg, du


@triton.jit(do_not_specialize=["r"])
def swiglu_forward(h, weight, out, r, f, limit, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [r, f] = swiglu(h [r, 2 f]) weight [r], a block of rows to a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < r) & (column < f)
    g = tl.load(h + row * 2 * f + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(h + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
    a = _swiglu(g, u, limit)
    if WEIGHTED:
        a *= tl.load(weight + row, mask=row < r, other=0.0).to(tl.float32)
    tl.store(out + row * f + column, a, mask=inside)


@triton.jit(do_not_specialize=["r"])
def swiglu_backward(
    h, weight, grad, dh, dweight, r, f, limit, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dh = grad weight (slopes), dweight = <grad, a>, a block of rows to a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    w = tl.full((ROWS, 1), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(weight + row, mask=row < r, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, f, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < r) & (column < f)
        g = tl.load(h + row * 2 * f + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(h + row * 2 * f + f + column, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(grad + row * f + column, mask=inside, other=0.0).to(tl.float32)
        a, dg, du = _swiglu_slopes(g, u, limit)
        total += da * a
        tl.store(dh + row * 2 * f + column, da * w * dg, mask=inside)
        tl.store(dh + row * 2 * f + f + column, da * w * du, mask=inside)
    if WEIGHTED:
        tl.store(dweight + row, tl.sum(total, axis=1)[:, None], mask=row < r)


# grouped products ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total"])
def grouped_swiglu(
    x, w13, weights, order, tiles, offsets, h, a, total, d, f, limit, K: tl.constexpr,
    KEEP: tl.constexpr, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """h = [g, u] = w13[expert] x[token], a = swiglu(h) weight: one tile of rows, BN columns of g and the same of u."""
    tile, block = _tile_and_block(total, tl.cdiv(f, BN), GROUP)
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    row = first + tl.arange(0, BM)[:, None]
    real = row < tl.load(offsets + expert + 1)
    pair, token = _pairs(order, row, real, K)
    g, u = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for i in range(0, d, BK):
        at = i + tl.arange(0, BK)[None, :]
        xs = tl.load(x + token * d + at, mask=real & (at < d), other=0.0)
        w1 = _weight(w13, expert, block * BN, i, 2 * f, d, BN, BK, TMA)
        w3 = _weight(w13, expert, f + block * BN, i, 2 * f, d, BN, BK, TMA)
        g = tl.dot(xs, w1.T, g, input_precision="ieee")
        u = tl.dot(xs, w3.T, u, input_precision="ieee")
    g, u = g.to(h.dtype.element_ty), u.to(h.dtype.element_ty)  # as the backward pass will read them
    row, column = tl.arange(0, BM)[:, None], block * BN + tl.arange(0, BN)[None, :]
    inside = real & (column < f)
    if KEEP:
        h += first.to(tl.int64) * 2 * f
        tl.store(h + row * 2 * f + column, g, mask=inside)
        tl.store(h + row * 2 * f + f + column, u, mask=inside)
    weight = tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)
    activation = _swiglu(g.to(tl.float32), u.to(tl.float32), limit) * weight
    tl.store(a + first.to(tl.int64) * f + row * f + column, activation, mask=inside)


@triton.jit(do_not_specialize=["total"])
def grouped_swiglu_backward(
    dout, w2, weights, order, tiles, offsets, h, dh, a, dweight, total, d, f, limit, K: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """da = dout[token] w2[expert]; from h again a, and dh = da weight (slopes); dweight [pair, block] = <da, a>."""
    blocks = tl.cdiv(f, BN)
    tile, block = _tile_and_block(total, blocks, GROUP)
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    row = first + tl.arange(0, BM)[:, None]
    real = row < tl.load(offsets + expert + 1)
    pair, token = _pairs(order, row, real, K)
    da = tl.zeros((BM, BN), tl.float32)
    for i in range(0, d, BK):
        at = i + tl.arange(0, BK)[None, :]
        dy = tl.load(dout + token * d + at, mask=real & (at < d), other=0.0)
        da = tl.dot(dy, _weight(w2, expert, i, block * BN, d, f, BK, BN, TMA), da, input_precision="ieee")
    weight = tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)
    h, dh = h + first.to(tl.int64) * 2 * f, dh + first.to(tl.int64) * 2 * f
    a += first.to(tl.int64) * f
    total = _swiglu_gradient(da, weight, h, dh, a, real, block * BN, f, limit, BM, BN)
    tl.store(dweight + pair.to(tl.int64) * blocks + block, total[:, None], mask=real)


@triton.jit
def _swiglu_gradient(da, weight, h, dh, a, real, start, f, limit, BM: tl.constexpr, BN: tl.constexpr):
    """Writes a and dh for these rows and the BN columns from `start`, 32 after the other, as more do not fit in
    registers; returns their share of dweight [BM]."""
    if BN > 32:
        left, right = da.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        total = _swiglu_gradient(left, weight, h, dh, a, real, start, f, limit, BM, BN // 2)
        total += _swiglu_gradient(right, weight, h, dh, a, real, start + BN // 2, f, limit, BM, BN // 2)
    else:
        column = start + tl.arange(0, BN)[None, :]
        inside = real & (column < f)
        at = tl.arange(0, BM)[:, None] * 2 * f + column
        g = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(h + at + f, mask=inside, other=0.0).to(tl.float32)
        activation, dg, du = _swiglu_slopes(g, u, limit)
        tl.store(a + tl.arange(0, BM)[:, None] * f + column, activation * weight, mask=inside)
        total = tl.sum(tl.where(inside, da * activation, 0.0), axis=1)
        da *= weight
        tl.store(dh + at, da * dg, mask=inside)
        tl.store(dh + at + f, da * du, mask=inside)
    return total


@triton.jit(do_not_specialize=["total"])
def grouped(
    a, w, tiles, offsets, out, total, inner, outer, TRANSPOSED: tl.constexpr, A_TMA: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """out [r, outer] = a [r, inner] times w[expert] [inner, outer], or its transpose where w is [e, outer, inner]."""
    tile, block = _tile_and_block(total, tl.cdiv(outer, BN), GROUP)
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first = tl.load(tiles + 2 * tile + 1)
    row = (first + tl.arange(0, BM)[:, None]).to(tl.int64)
    real = row < tl.load(offsets + expert + 1)
    y = tl.zeros((BM, BN), tl.float32)
    for i in range(0, inner, BK):
        if A_TMA:
            rows = a.load([first, i])  # those past the expert's last are computed and not stored
        else:
            at = i + tl.arange(0, BK)[None, :]
            rows = tl.load(a + row * inner + at, mask=real & (at < inner), other=0.0)
        if TRANSPOSED:
            ws = _weight(w, expert, block * BN, i, outer, inner, BN, BK, TMA).T
        else:
            ws = _weight(w, expert, i, block * BN, inner, outer, BK, BN, TMA)
        y = tl.dot(rows, ws, y, input_precision="ieee")
    column = block * BN + tl.arange(0, BN)[None, :]
    tl.store(out + row * outer + column, y, mask=real & (column < outer))


@triton.jit
def grouped_outer(
    p, q, order, offsets, out, m, n, K: tl.constexpr, GATHER: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out[expert] [m, n] = sum over its rows of p^T q, in row order; one of them lies by token. No rows: zeros."""
    across = tl.cdiv(n, BN)
    blocks = tl.cdiv(m, BM) * across
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    down, right = block // across * BM, block % across * BN
    i, j = down + tl.arange(0, BM), right + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    last = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), last, BK):
        row = start + tl.arange(0, BK)[:, None]
        real = row < last
        _, token = _pairs(order, row, real, K)
        p_row, q_row = token if GATHER == "p" else row.to(tl.int64), token if GATHER == "q" else row.to(tl.int64)
        ps = tl.load(p + p_row * m + i[None, :], mask=real & (i < m)[None, :], other=0.0)
        qs = tl.load(q + q_row * n + j[None, :], mask=real & (j < n)[None, :], other=0.0)
        total = tl.dot(ps.T, qs, total, input_precision="ieee")
    if TMA:
        out.store([expert, down, right], total.to(out.dtype).reshape(1, BM, BN))
    else:
        at = out + expert.to(tl.int64) * m * n + i.to(tl.int64)[:, None] * n + j[None, :]
        tl.store(at, total, mask=(i < m)[:, None] & (j < n)[None, :])


# back to tokens ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def combine(
    rows, inverse, shared, out, n, k, d, SHARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[token] = sum over slots of rows[inverse[token, slot]], in slot order, then shared[token]; an unknown expert
    (-1) gives NaN."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (token < n) & (column < d)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in range(k):
        row = tl.load(inverse + token * k + slot, mask=token < n, other=-1)
        total += tl.load(rows + row * d + column, mask=inside & (row >= 0), other=float("nan")).to(tl.float32)
    if SHARED:
        total += tl.load(shared + token * d + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * d + column, total, mask=inside)


@triton.jit(do_not_specialize=["r"])
def sum_blocks(parts, out, r, blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """out [r] = sum of parts [r, blocks] over the blocks."""
    row, block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCKS)
    inside = (row < r)[:, None] & (block < blocks)[None, :]
    part = tl.load(parts + row[:, None] * blocks + block[None, :], mask=inside, other=0.0)
    tl.store(out + row, tl.sum(part, axis=1), mask=row < r)
