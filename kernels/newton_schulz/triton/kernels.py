"""The kernels of the Newton-Schulz iteration.

Every program owns what it writes and sums in one fixed order, set by the matrix's shape alone: the same bits on each
run and in any batch. Sums are fp32.

e matrices · r <= c sides · [ROWS, COLUMNS] a panel of elementwise work · BM BN BK blocks of a product
"""

import triton
import triton.language as tl

ONE = tl.constexpr(2.0**48)  # of 2^13 squares, at most 1 each, the sum fits into 63 bits

# |M|_F ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _or_one(size):
    """Something to divide by; NaN stays NaN."""
    return tl.where(size == 0, 1.0, size)


@triton.jit
def _panel(x, stride_e, stride_r, stride_c, r, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's panel of one matrix of x, as the addresses, which of them are inside, and the matrix."""
    across = tl.cdiv(c, COLUMNS)
    panels = tl.cdiv(r, ROWS) * across
    matrix, panel = tl.program_id(0) // panels, tl.program_id(0) % panels
    row = (panel // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (panel % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    at = x + matrix.to(tl.int64) * stride_e + row.to(tl.int64) * stride_r + column.to(tl.int64) * stride_c
    return at, (row < r) & (column < c), matrix


@triton.jit
def measure(x, parts, stride_e, stride_r, stride_c, r, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """parts [program, 2]: the largest |x| of a panel, and the sum of (x / largest)^2, which no finite x overflows.

    The squares are added as multiples of 1 / ONE: which thread has which of them goes by the strides, and floats would
    add up to other bits.
    """
    at, inside, _ = _panel(x, stride_e, stride_r, stride_c, r, c, ROWS, COLUMNS)
    size = tl.abs(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    largest = tl.max(tl.max(size, axis=1), axis=0)
    share = size / _or_one(largest)
    is_number = share == share
    squares = tl.where(is_number, share * share * ONE, 0.0).to(tl.int64)
    total = tl.sum(tl.sum(squares, axis=1), axis=0).to(tl.float32) / ONE
    all_numbers = tl.min(tl.min(is_number.to(tl.int32), axis=1), axis=0) == 1
    part = parts + 2 * tl.program_id(0).to(tl.int64)
    tl.store(part, largest)
    tl.store(part + 1, tl.where(all_numbers, total, float("nan")))


@triton.jit
def combine(parts, norms, panels, BLOCK: tl.constexpr):
    """norms [e, 2]: largest |x| of a matrix and |x / largest|_F, from its panels in order."""
    matrix, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    parts += matrix * panels * 2
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, panels, BLOCK):
        top = tl.maximum(top, tl.load(parts + 2 * (start + lane), mask=start + lane < panels, other=0.0))
    largest = tl.max(top, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, panels, BLOCK):
        inside = start + lane < panels
        share = tl.load(parts + 2 * (start + lane), mask=inside, other=0.0) / _or_one(largest)
        total += tl.load(parts + 2 * (start + lane) + 1, mask=inside, other=0.0) * share * share
    tl.store(norms + 2 * matrix, largest)
    tl.store(norms + 2 * matrix + 1, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit
def normalise(x, norms, out, stride_e, stride_r, stride_c, r, c, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [e, r, c] = x / |x|_F, a panel to a program."""
    at, inside, matrix = _panel(x, stride_e, stride_r, stride_c, r, c, ROWS, COLUMNS)
    largest, norm = tl.load(norms + 2 * matrix), tl.load(norms + 2 * matrix + 1)
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32) / _or_one(largest) / _or_one(norm)
    to, inside, _ = _panel(out, r * c, c, 1, r, c, ROWS, COLUMNS)
    tl.store(to, y, mask=inside)


# products ------------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(tiles, blocks, GROUP: tl.constexpr):
    """Matrix, row tile and column block of this program; GROUP tiles take each column block in turn, while L2 holds
    it."""
    matrix, program = tl.program_id(0) // (tiles * blocks), tl.program_id(0) % (tiles * blocks)
    first = program // (GROUP * blocks) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    return matrix, first + program % (GROUP * blocks) % size, program % (GROUP * blocks) // size


@triton.jit
def _block(x, matrix, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """`x[matrix, row : row + ROWS, column : column + COLUMNS]` of x `[e, rows, columns]`, zero past its edges."""
    if TMA:
        block = x.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        i, j = (row + tl.arange(0, ROWS))[:, None], (column + tl.arange(0, COLUMNS))[None, :]
        at = x + matrix.to(tl.int64) * rows * columns + i.to(tl.int64) * columns + j
        block = tl.load(at, mask=(i < rows) & (j < columns), other=0.0)
    return block


@triton.jit
def symmetric(
    x, x_again, plus, out, r, inner, alpha, beta, PLUS: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """out [e, r, r] = alpha x x^T (+ beta plus), x [e, r, inner]: one triangle, each element stored on both sides."""
    matrix, tile, block = _tile(tl.cdiv(r, BM), tl.cdiv(r, BN), GROUP)
    if (tile + 1) * BM <= block * BN:
        return  # above the diagonal
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, inner, BK):
        left = _block(x, matrix, tile * BM, k, r, inner, BM, BK, TMA)
        right = _block(x_again, matrix, block * BN, k, r, inner, BN, BK, TMA)
        y = tl.dot(left, right.T, y, input_precision="ieee")
    y *= alpha
    i, j = (tile * BM + tl.arange(0, BM))[:, None], (block * BN + tl.arange(0, BN))[None, :]
    start, below = matrix.to(tl.int64) * r * r, (i < r) & (j <= i)
    if PLUS:
        y += beta * tl.load(plus + start + i.to(tl.int64) * r + j, mask=below, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty)
    tl.store(out + start + i.to(tl.int64) * r + j, y, mask=below)
    tl.store(out + start + j.to(tl.int64) * r + i, y, mask=below & (j < i))


@triton.jit
def product(
    b, x, x_again, out, stride_e, stride_r, stride_c, r, c, alpha, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """out [e, r, c] = alpha x + b x, b [e, r, r]; out lies by its strides. x_again: x without a descriptor."""
    matrix, tile, block = _tile(tl.cdiv(r, BM), tl.cdiv(c, BN), GROUP)
    y = tl.zeros((BM, BN), tl.float32)
    for k in range(0, r, BK):
        left = _block(b, matrix, tile * BM, k, r, r, BM, BK, TMA)
        y = tl.dot(left, _block(x, matrix, k, block * BN, r, c, BK, BN, TMA), y, input_precision="ieee")
    out += matrix.to(tl.int64) * stride_e
    left, right = y.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()  # one after the other fits in registers
    for half in tl.static_range(2):
        column = block * BN + half * (BN // 2)
        i, j = (tile * BM + tl.arange(0, BM))[:, None], (column + tl.arange(0, BN // 2))[None, :]
        near = _block(x_again, matrix, tile * BM, column, r, c, BM, BN // 2, False).to(tl.float32)
        at = out + i.to(tl.int64) * stride_r + j.to(tl.int64) * stride_c
        tl.store(at, alpha * near + (right if half else left), mask=(i < r) & (j < c))
