"""The kernels of RMSNorm and RoPE. A program has whole rows in registers; each row is worked out alone, in float32.

A row is two tiles: the channels that are not rotated, and the last `dim`, as adjacent pairs.

n rows (all leading axes of x) · d channels, the last `dim` of them rotated · P pairs, padded
"""

import triton
import triton.language as tl


@triton.jit
def _tiles(row, n, d, dim, PLAIN: tl.constexpr, P: tl.constexpr):
    """Channels of the two tiles, [1, .], and what of each is inside, [rows, .]."""
    plain, place = tl.arange(0, PLAIN)[None, :], tl.arange(0, 2 * P)[None, :]
    return plain, d - dim + place, (row < n) & (plain < d - dim), (row < n) & (place < dim)


@triton.jit
def _rotated(pairs, rotation, row, dim, per_token, tokens, sign, inside, ROWS: tl.constexpr, P: tl.constexpr):
    """`(a + i b)(cos + i sign sin)` of adjacent channels a, b; rotation holds cos and sin in turn."""
    angle = rotation + (row // per_token % tokens) * dim + tl.arange(0, 2 * P)[None, :]
    cos, sin = tl.split(tl.reshape(tl.load(angle, mask=inside, other=0.0), (ROWS, P, 2)))
    a, b = tl.split(tl.reshape(pairs, (ROWS, P, 2)))
    sin *= sign
    return tl.interleave(a * cos - b * sin, b * cos + a * sin)


@triton.jit(do_not_specialize=["n", "tokens"])
def norm_rope_forward(
    x, weight, rotation, y, scales, n, d, dim, per_token, tokens, eps, sign,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, PLAIN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """y = R(w x r) with r = 1 / sqrt(mean(x^2) + eps), which is kept in scales [n]; without NORM y = R(x)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    plain, tail, inside, turned = _tiles(row, n, d, dim, PLAIN, P)
    values = tl.load(x + row * d + plain, mask=inside, other=0.0).to(tl.float32)
    if TURN:
        pairs = tl.load(x + row * d + tail, mask=turned, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(values * values, axis=1)
        if TURN:
            squares += tl.sum(pairs * pairs, axis=1)
        r = tl.rsqrt(squares / d + eps)[:, None]
        tl.store(scales + row, r, mask=row < n)
        values *= r
        if TURN:
            pairs *= r
    if WEIGHT:
        values *= tl.load(weight + plain, mask=plain < d - dim, other=0.0).to(tl.float32)
        if TURN:
            pairs *= tl.load(weight + tail, mask=tail < d, other=0.0).to(tl.float32)
    tl.store(y + row * d + plain, values, mask=inside)
    if TURN:
        pairs = _rotated(pairs, rotation, row, dim, per_token, tokens, sign, turned, ROWS, P)
        tl.store(y + row * d + tail, pairs, mask=turned)


@triton.jit(do_not_specialize=["n", "tokens"])
def norm_rope_backward(
    dy, x, weight, rotation, scales, dx, dweights, n, d, dim, per_token, tokens,
    WEIGHT: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, PLAIN: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """With g = R^-1 dy:  dx = r (w g - r^2 mean(x w g) x),  and r x g summed over a program's rows.

    Each program takes every `programs`-th block of rows; dweights [programs, d].
    """
    dw, dw_pairs = tl.zeros((1, PLAIN), tl.float32), tl.zeros((1, 2 * P), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = (block + tl.zeros((ROWS, 1), tl.int64)) * ROWS + tl.arange(0, ROWS)[:, None]
        plain, tail, inside, turned = _tiles(row, n, d, dim, PLAIN, P)
        r = tl.load(scales + row, mask=row < n, other=0.0)
        g = tl.load(dy + row * d + plain, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + row * d + plain, mask=inside, other=0.0).to(tl.float32) * r
        if WEIGHT:
            dw += tl.sum(values * g, axis=0)[None, :]
            g *= tl.load(weight + plain, mask=plain < d - dim, other=0.0).to(tl.float32)
        total = tl.sum(values * g, axis=1)
        if TURN:
            g_pairs = tl.load(dy + row * d + tail, mask=turned, other=0.0).to(tl.float32)
            g_pairs = _rotated(g_pairs, rotation, row, dim, per_token, tokens, -1.0, turned, ROWS, P)
            pairs = tl.load(x + row * d + tail, mask=turned, other=0.0).to(tl.float32) * r
            if WEIGHT:
                dw_pairs += tl.sum(pairs * g_pairs, axis=0)[None, :]
                g_pairs *= tl.load(weight + tail, mask=tail < d, other=0.0).to(tl.float32)
            total += tl.sum(pairs * g_pairs, axis=1)
        mean = (total / d)[:, None]
        tl.store(dx + row * d + plain, r * (g - mean * values), mask=inside)
        if TURN:
            tl.store(dx + row * d + tail, r * (g_pairs - mean * pairs), mask=turned)
    if WEIGHT:
        plain, tail, _, _ = _tiles(0, 1, d, dim, PLAIN, P)
        at = dweights + tl.program_id(0).to(tl.int64) * d
        tl.store(at + plain, dw, mask=plain < d - dim)
        if TURN:
            tl.store(at + tail, dw_pairs, mask=tail < d)
