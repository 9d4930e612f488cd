"""The kernels of the number formats, in integer arithmetic on the bits of float32: the same bits on any device.

    format  M mantissa bits  least exponent      code = nearest multiple of 2^(max(exponent, least) - M), ties to even
    e4m3          3               -6
    e2m1          1                0

Every product with a scale is by a power of two that float32 holds; nothing is divided.

A program has G blocks in registers, each as a flat run of elements, row after row; a block too large for that is read
twice. n blocks of all matrices · R C rows and columns of a matrix · r c those of a block · e of a block
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr((0x01C00000, 0x38D1B717))  # e2m1: 6 * 2^-126, e4m3: 1e-4, as bits
TOP = tl.constexpr((0x400000, 0x600000))  # mantissas of 6 and 448
TOP_EXPONENT = tl.constexpr((2, 8))
SIGN = tl.constexpr(-(2**31))


# one value -----------------------------------------------------------------------------------------------------------


@triton.jit
def _power(byte):
    """2^(byte - 127); 255 is NaN."""
    bits = tl.where(byte == 0, 0x400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _value(code, M: tl.constexpr, LEAST: tl.constexpr):
    """The value of a code without its sign."""
    normal = ((code << (23 - M)) + ((126 + LEAST) << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < (1 << M), code.to(tl.float32) * 2.0 ** (LEAST - M), normal)


@triton.jit
def _signed(value, sign):
    """With the bit of a sign; a difference from zero would lose that of a zero."""
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _code(q, M: tl.constexpr, LEAST: tl.constexpr):
    """The code of the nearest value for 0 <= q <= top: rounds a normal one's bits, adds a large number to another."""
    bits = q.to(tl.int32, bitcast=True)
    kept = bits >> (23 - M)
    normal = ((bits + (1 << (22 - M)) - 1 + (kept & 1)) >> (23 - M)) - ((126 + LEAST) << M)
    large = 2.0 ** (23 + LEAST - M)
    small = (q + large).to(tl.int32, bitcast=True) - ((150 + LEAST - M) << 23)
    return tl.where(bits < ((127 + LEAST) << 23), small, normal)


@triton.jit
def _scale(amax, E4M3: tl.constexpr):
    """The byte of the smallest power of two with amax <= top * scale, from amax's bits; 255 where there is none."""
    amax = tl.maximum(amax, FLOOR[E4M3])
    byte = (amax >> 23) - TOP_EXPONENT[E4M3] + ((amax & 0x7FFFFF) > TOP[E4M3]).to(tl.int32)
    return tl.where(amax >= 0x7F800000, 255, byte)


@triton.jit
def _nibble(codes, at, inside):
    """Codes of four bits, the even one low."""
    byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    return (byte >> (at % 2 * 4).to(tl.int32)) & 15


# blocks --------------------------------------------------------------------------------------------------------------


@triton.jit
def _elements(
    start, n, R, C, r: tl.constexpr, c: tl.constexpr, down, across,
    G: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of elements `start` to `start + W` of G blocks: block [G, 1], row and column in the batch, place, what exists."""
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)[:, None]
    e = start + tl.arange(0, W)[None, :]
    i, j = e // COLUMNS, e % COLUMNS
    row, column = block // across % down * r + i, block % across * c + j
    inside = (block < n) & (i < r) & (row < R) & (j < c) & (column < C)
    row += block // (across * down) * R
    return block, row, column, row * C + column, inside


@triton.jit(do_not_specialize=["n", "R", "down"])
def encode(
    x, codes, scales, y, n, R, C, r: tl.constexpr, c: tl.constexpr, down, across,
    E4M3: tl.constexpr, FAKE: tl.constexpr, PACK: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """codes and scales of x; with FAKE the values `code * scale` in y instead. PACK: two codes to a byte."""
    M: tl.constexpr = 3 if E4M3 else 1
    LEAST: tl.constexpr = -6 if E4M3 else 0
    block, _, _, at, inside = _elements(0, n, R, C, r, c, down, across, G, W, COLUMNS)
    if ALL == W:
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        amax = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    else:
        amax = tl.zeros((G,), tl.int32)
        for start in range(0, ALL, W):
            _, _, _, at, inside = _elements(start, n, R, C, r, c, down, across, G, W, COLUMNS)
            values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    byte = _scale(amax, E4M3)[:, None]
    if not FAKE:
        tl.store(scales + block, byte.to(tl.uint8), mask=block < n)
    if ALL == W:
        _write(values, byte, codes, y, at, inside, M, LEAST, E4M3, FAKE, PACK, G, W)
    else:
        for start in range(0, ALL, W):
            _, _, _, at, inside = _elements(start, n, R, C, r, c, down, across, G, W, COLUMNS)
            values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            _write(values, byte, codes, y, at, inside, M, LEAST, E4M3, FAKE, PACK, G, W)


@triton.jit
def _write(
    values, byte, codes, y, at, inside, M: tl.constexpr, LEAST: tl.constexpr,
    E4M3: tl.constexpr, FAKE: tl.constexpr, PACK: tl.constexpr, G: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Rounds values to the format, and stores codes or what they stand for."""
    bits = values.to(tl.int32, bitcast=True)
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    code = _code((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * inverse, M, LEAST)
    if FAKE:
        tl.store(y + at, _signed(_value(code, M, LEAST), bits & SIGN) * _power(byte), mask=inside)
    else:
        code |= tl.where(bits < 0, 8 << (4 if E4M3 else 0), 0)
        code = tl.where(byte == 255, 127 if E4M3 else 0, code)
        if PACK:
            low, high = tl.split(tl.reshape(code, (G, W // 2, 2)))
            even, _ = tl.split(tl.reshape(at, (G, W // 2, 2)))
            there, _ = tl.split(tl.reshape(inside.to(tl.int32), (G, W // 2, 2)))
            tl.store(codes + even // 2, (low | (high << 4)).to(tl.uint8), mask=there != 0)
        else:
            tl.store(codes + at, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "R", "down"])
def decode(
    codes, scales, y, rows, R, C, r: tl.constexpr, c: tl.constexpr, down, across,
    E4M3: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """y = code * scale, a panel of all matrices' rows; WIDE multiplies in float64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, at = (row < rows) & (column < C), row * C + column
    byte = tl.load(scales + (row // R * down + row % R // r) * across + column // c, mask=inside, other=127)
    if E4M3:
        code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        value = tl.where(code & 127 == 127, float("nan"), _value(code & 127, 3, -6))
        sign = code >> 7
    else:
        code = _nibble(codes, at, inside)
        value, sign = _value(code & 7, 1, 0), code >> 3
    value = _signed(value, sign << 31)
    power = _power(byte.to(tl.int32))
    if WIDE:
        tl.store(y + at, value.to(tl.float64) * power.to(tl.float64), mask=inside)
    else:
        tl.store(y + at, value * power, mask=inside)


@triton.jit(do_not_specialize=["n", "R", "down"])
def fold(
    codes, scales, folded, common, lost, n, R, C, r: tl.constexpr, c: tl.constexpr, down, across, group,
    G: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """E2M1 under group scales as E4M3 under the largest of a block's, over 2^6; lost [n]: a value does not fit."""
    block = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)[:, None]
    largest, bad = tl.zeros((G, 1), tl.int32), tl.zeros((G, 1), tl.int32)
    for start in range(0, ALL, W):
        _, row, column, _, inside = _elements(start, n, R, C, r, c, down, across, G, W, COLUMNS)
        byte = tl.load(scales + row * (C // group) + column // group, mask=inside, other=0).to(tl.int32)
        largest = tl.maximum(largest, tl.max(byte, axis=1)[:, None])
    shared = tl.maximum(largest - 6, 0)
    tl.store(common + block, shared.to(tl.uint8), mask=block < n)
    for start in range(0, ALL, W):
        _, row, column, at, inside = _elements(start, n, R, C, r, c, down, across, G, W, COLUMNS)
        byte = tl.load(scales + row * (C // group) + column // group, mask=inside, other=0).to(tl.int32)
        nibble = _nibble(codes, at, inside)
        shift = tl.maximum(byte - shared, -100)  # -15 would do: what is not zero is lost
        q = _value(nibble & 7, 1, 0) * ((127 + shift) << 23).to(tl.float32, bitcast=True)
        code = _code(q, 3, -6)
        wrong = inside & ((byte == 255) | (_value(code, 3, -6) != q))
        bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), axis=1)[:, None])
        tl.store(folded + at, (code | (nibble >> 3 << 7)).to(tl.uint8), mask=inside)
    tl.store(lost + block, bad, mask=block < n)


# Hadamard ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def walsh_hadamard(x, y, n, scale, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """y [n, D]: sums and differences of the channels that differ in one bit of their index, bit after bit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, D)[None, :]
    values = tl.load(x + row * D + channel, mask=row < n, other=0.0).to(tl.float32)
    for bit in tl.static_range(BITS):
        partner = tl.gather(values, (channel ^ (1 << bit)) + tl.zeros((ROWS, 1), tl.int32), 1)
        values = tl.where((channel >> bit) & 1 == 0, values + partner, partner - values)
    tl.store(y + row * D + channel, values * scale, mask=row < n)
