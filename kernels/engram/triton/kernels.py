"""The kernels of Engram: hash, gather, gate, and their gradients.

Every program owns what it writes and sums in one fixed order: no atomics, the same bits on each run, and for each token
the same bits whatever the rest of the batch. Statistics, sums and the gate are fp32.

b batch · t tokens · n streams · d width · o orders · k heads per order · r table rows · w their width · q look-ups
"""

import triton
import triton.language as tl

from ..eager import CLAMP

LEAST = tl.constexpr(CLAMP)

# hash ----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "t", "start_stride"])
def hash_rows(
    ids, multipliers, moduli, offsets, start, history, out, tokens, t, k, pad, start_stride,
    STARTED: tl.constexpr, CONTINUED: tl.constexpr, ORDERS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """out [b t, o k] = mix_n mod p + offset; a token before the document, or before the first known, counts as pad."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head, inside = tl.arange(0, HEADS)[None, :], token < tokens
    row, column = token // t, token % t
    if STARTED:
        first = tl.load(start + row * start_stride + column, mask=inside, other=0)
    mix = tl.load(ids + token, mask=inside, other=0) * tl.load(multipliers)
    for back in tl.static_range(1, ORDERS + 1):
        before = column - back
        previous = tl.load(ids + token - back, mask=inside & (before >= 0), other=pad)
        if CONTINUED:
            old = tl.load(history + row * ORDERS + ORDERS + before, mask=inside & (before < 0), other=pad)
            previous = tl.where(before < 0, old, previous)
        if STARTED:
            previous = tl.where(before >= first, previous, pad)
        mix = mix ^ (previous * tl.load(multipliers + back))
        at = (back - 1) * k + head
        modulus = tl.load(moduli + at, mask=head < k, other=1)
        residue = mix[:, None] % modulus
        residue = tl.where(residue < 0, residue + modulus, residue)  # of a negative mix, as Python has it
        place = out + token[:, None] * (ORDERS * k) + at
        tl.store(place, residue + tl.load(offsets + at, mask=head < k, other=0), mask=inside[:, None] & (head < k))


# gather --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["q"])
def gather_rows(table, rows, out, r, q, w, LOOKUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [q, w] = table [r, w] at rows [q]; NaN for a row that the table does not have."""
    lookup = tl.program_id(0).to(tl.int64) * LOOKUPS + tl.arange(0, LOOKUPS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.load(rows + lookup, mask=lookup < q, other=-1)
    known = (row >= 0) & (row < r) & (column < w)
    value = tl.load(table + row * w + column, mask=known, other=float("nan"))
    tl.store(out + lookup * w + column, value, mask=(lookup < q) & (column < w))


# gate ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _gate(dot, h_rms, k_rms, scale):
    """s = dot / (rms rms sqrt(d)) and sigmoid(sign(s) sqrt(max(|s|, clamp))), by the sign bit of s."""
    s = dot * h_rms * k_rms * scale
    size = tl.abs(s)
    root = tl.sqrt(tl.where(size < LEAST, LEAST, size))
    root = tl.where(s.to(tl.int32, bitcast=True) < 0, -root, root)
    return s, 1 / (1 + tl.exp(-root))


@triton.jit
def gate_forward(
    h, key, value, weight, dots, h_rms, k_rms, out, n, d, h_stride, k_stride, v_stride, eps, scale,
    N: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One token: the product and both norms in a pass over h and key, the gated value in one over value.

    `weight [n, d]`, fp32, is that of both norms, which enter as a product.
    """
    token, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)[:, None]
    hh = tl.zeros((N, COLUMNS), tl.float32)
    kk = tl.zeros((N, COLUMNS), tl.float32)
    hk = tl.zeros((N, COLUMNS), tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        at, inside = stream * d + column, (stream < n) & (column < d)
        x = tl.load(h + token * h_stride + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(key + token * k_stride + at, mask=inside, other=0.0).to(tl.float32)
        hh += x * x
        kk += y * y
        hk += x * y * tl.load(weight + at, mask=inside, other=0.0)
    dot = tl.sum(hk, axis=1)[:, None]
    rx = 1 / tl.sqrt(tl.sum(hh, axis=1)[:, None] / d + eps)
    ry = 1 / tl.sqrt(tl.sum(kk, axis=1)[:, None] / d + eps)
    tl.store(dots + token * n + stream, dot, mask=stream < n)
    tl.store(h_rms + token * n + stream, rx, mask=stream < n)
    tl.store(k_rms + token * n + stream, ry, mask=stream < n)
    gate = _gate(dot, rx, ry, scale)[1]
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        v = tl.load(value + token * v_stride + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(out + (token * n + stream) * d + column, gate * v, mask=(stream < n) & (column < d))


@triton.jit
def gate_slopes(
    grad, value, dots, h_rms, k_rms, dvalue, ddots, n, d, g_stride, v_stride, scale,
    N: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One token: dvalue = sum over streams of gate grad, and the slope by the raw product, 0 below the clamp."""
    token, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)[:, None]
    at = token * n + stream
    dot = tl.load(dots + at, mask=stream < n, other=0.0)
    rx = tl.load(h_rms + at, mask=stream < n, other=0.0)
    ry = tl.load(k_rms + at, mask=stream < n, other=0.0)
    s, gate = _gate(dot, rx, ry, scale)
    dgate = tl.zeros((N, COLUMNS), tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (stream < n) & (column < d)
        g = tl.load(grad + token * g_stride + stream * d + column, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(value + token * v_stride + column, mask=column < d, other=0.0).to(tl.float32)
        dgate += g * v
        tl.store(dvalue + token * d + column, tl.sum(g * gate, axis=0)[None, :], mask=column < d)
    slope = gate * (1 - gate) * (0.5 * tl.sqrt(scale * rx * ry / tl.abs(dot)))
    ddot = tl.where(tl.abs(s) < LEAST, 0.0, slope * tl.sum(dgate, axis=1)[:, None])
    tl.store(ddots + at, ddot, mask=stream < n)


@triton.jit(do_not_specialize=["tokens", "strip"])
def gate_backward(
    h, key, weight, dots, h_rms, k_rms, ddots, dh, dkey, shares, tokens, strip, n, d, h_stride, k_stride,
    N: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A strip of tokens, a block of columns: dh = ddot (w key - h dot / (d mean h^2)), dkey alike, and the strip's
    share [strips, n, d] of dw = sum of ddot h key.
    """
    block, stream = tl.program_id(0).to(tl.int64), tl.arange(0, N)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, inside = stream * d + column, (stream < n) & (column < d)
    w = tl.load(weight + at, mask=inside, other=0.0)
    dw = tl.zeros((N, COLUMNS), tl.float32)
    for token in range(block * strip, tl.minimum((block + 1) * strip, tokens)):
        x = tl.load(h + token * h_stride + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(key + token * k_stride + at, mask=inside, other=0.0).to(tl.float32)
        dot = tl.load(dots + token * n + stream, mask=stream < n, other=0.0)
        rx = tl.load(h_rms + token * n + stream, mask=stream < n, other=0.0)
        ry = tl.load(k_rms + token * n + stream, mask=stream < n, other=0.0)
        ddot = tl.load(ddots + token * n + stream, mask=stream < n, other=0.0)
        tl.store(dh + token * n * d + at, y * w * ddot - x * (dot * rx * rx * ddot / d), mask=inside)
        tl.store(dkey + token * n * d + at, x * w * ddot - y * (dot * ry * ry * ddot / d), mask=inside)
        dw += x * y * ddot
    tl.store(shares + block * n * d + at, dw, mask=inside)


@triton.jit(do_not_specialize=["strips"])
def sum_shares(
    shares, weight_h, weight_k, dweight_h, dweight_k, strips, size, STRIPS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dw = sum of shares [strips, size], by strip; times the other weight each."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((STRIPS, COLUMNS), tl.float32)
    for start in range(0, strips, STRIPS):
        strip = start + tl.arange(0, STRIPS)[:, None]
        total += tl.load(shares + strip.to(tl.int64) * size + at, mask=(strip < strips) & (at < size), other=0.0)
    dw = tl.sum(total, axis=0)[None, :]
    tl.store(dweight_h + at, dw * tl.load(weight_k + at, mask=at < size, other=0.0).to(tl.float32), mask=at < size)
    tl.store(dweight_k + at, dw * tl.load(weight_h + at, mask=at < size, other=0.0).to(tl.float32), mask=at < size)
