"""The kernels of mHC: the projection and its gradients by tensor cores, Sinkhorn in registers, the rest at the speed of
memory.

Every program owns what it writes and sums in one fixed order: no atomics, the same bits on each run, and for each token
the same bits whatever the rest of the batch. All sums are fp32.

t tokens · n streams (j source, k target) · d width · w = n d · m rows of the projection · P n as a power of two
"""

import triton
import triton.language as tl

# projection ----------------------------------------------------------------------------------------------------------


@triton.jit
def _times(x, y, total, PRECISION: tl.constexpr):
    """total + x y, y in float32: a bfloat16 x meets it in three parts of its own precision, which lose nothing."""
    if x.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            part = y.to(tl.bfloat16)
            total = tl.dot(x, part, total)
            y -= part.to(tl.float32)
    else:
        total = tl.dot(x.to(tl.float32), y, total, input_precision=PRECISION)
    return total


@triton.jit
def _sum_columns(x):
    """The sum of each row, neighbour by neighbour: the same bits however x lies in registers."""
    for _ in tl.static_range(10):
        if x.shape[1] > 1:
            left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
            x = left + right
    return tl.reshape(x, (x.shape[0],))


@triton.jit(do_not_specialize=["t"])
def project(
    u, fn, partial, t, w: tl.constexpr, m: tl.constexpr,
    SPLIT: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """partial [splits, t, m + 1]: fn u and, last, sum(u^2), over SPLIT of the w columns of u."""
    token, split = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1)
    row = tl.arange(0, M)
    product, squares = tl.zeros((BT, M), tl.float32), tl.zeros((BT, BK), tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, w), BK):
        at = start + tl.arange(0, BK)
        x = tl.load(u + token[:, None] * w + at[None, :], mask=(token < t)[:, None] & (at < w)[None, :], other=0.0)
        f = tl.load(fn + row[None, :] * w + at[:, None], mask=(row < m)[None, :] & (at < w)[:, None], other=0.0)
        product = _times(x, f.to(tl.float32), product, PRECISION)
        squares += x.to(tl.float32) * x.to(tl.float32)
    first = partial + (split.to(tl.int64) * t + token) * (m + 1)
    tl.store(first[:, None] + row[None, :], product, mask=(token < t)[:, None] & (row < m)[None, :])
    tl.store(first + m, _sum_columns(squares), mask=token < t)


@triton.jit(do_not_specialize=["t", "steps"])
def project_backward(
    x, fn, scaled, shrink, du, pre, rest, dx, parts, t, d: tl.constexpr, m: tl.constexpr, steps,
    READ: tl.constexpr, REST: tl.constexpr, DX: tl.constexpr, DFN: tl.constexpr, N: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """dX_j = scaled fn_j + shrink X_j (+ pre_j du) (+ rest_j), and parts [groups, m, w] = scaled^T X over `steps` tiles
    of tokens: BK columns of one stream, beside the other streams' programs, which read the same of du."""
    j, group = tl.program_id(0) % N, tl.program_id(1)
    at = tl.program_id(0) // N * BK + tl.arange(0, BK)
    row = tl.arange(0, M)
    known = (row < m)[:, None] & (at < d)[None, :]
    weight = row[:, None] * (N * d) + j * d + at[None, :]
    f = tl.load(fn + weight, mask=known, other=0.0).to(tl.float32)
    dfn = tl.zeros((BK, M), tl.float32)
    for step in tl.range(group * steps, tl.minimum((group + 1) * steps, tl.cdiv(t, BT)), disable_licm=True):
        token = (step * BT + tl.arange(0, BT)).to(tl.int64)
        real = token < t
        inside = real[:, None] & (at < d)[None, :]
        where = token[:, None] * (N * d) + j * d + at[None, :]
        s = tl.load(scaled + token[:, None] * m + row[None, :], mask=real[:, None] & (row < m)[None, :], other=0.0)
        xs = tl.load(x + where, mask=inside, other=0.0)
        if DFN:
            dfn = _times(tl.trans(xs), s, dfn, PRECISION)
        if DX:
            out = tl.load(shrink + token, mask=real, other=0.0)[:, None] * xs.to(tl.float32)
            if READ:
                weighted = tl.load(du + token[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
                out += tl.load(pre + token * N + j, mask=real, other=0.0)[:, None] * weighted
            if REST:
                out += tl.load(rest + where, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + where, out + tl.dot(s, f, input_precision=PRECISION), mask=inside)
    if DFN:
        tl.store(parts + group.to(tl.int64) * m * N * d + weight, tl.trans(dfn), mask=known)


@triton.jit(do_not_specialize=["count"])
def sum_parts(parts, out, count, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [size] = the sum of parts [count, size], ROWS of them side by side."""
    at, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        part = (start + row).to(tl.int64)[:, None]
        total += tl.load(parts + part * size + at[None, :], mask=(part < count) & (at < size)[None, :], other=0.0)
    tl.store(out + at, tl.sum(total, axis=0), mask=at < size)


# coefficients --------------------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _gate_rows(token, t, first, N: tl.constexpr, P: tl.constexpr):
    """Of pre or post: token [BT, 1], row [1, P] of the projection, and which of them exist."""
    i = tl.arange(0, P)[None, :]
    return token[:, None], first + i, (token < t)[:, None] & (i < N)


@triton.jit
def _comb_rows(token, t, N: tl.constexpr, P: tl.constexpr):
    """Of comb: token [BT, 1, 1], row [1, P, P] of the projection, and which of them exist."""
    j, k = tl.arange(0, P)[None, :, None], tl.arange(0, P)[None, None, :]
    return token[:, None, None], 2 * N + j * N + k, (token < t)[:, None, None] & (j < N) & (k < N)


@triton.jit
def _summed(partial, token, row, inside, t, m, splits):
    """The entries `row` of each token's partial sums, added up in order."""
    total = tl.load(partial + token * (m + 1) + row, mask=inside, other=0.0)
    for split in range(1, splits):
        total += tl.load(partial + (split * t + token) * (m + 1) + row, mask=inside, other=0.0)
    return total


@triton.jit
def _logits(mix, base, scale, row, inside, part: tl.constexpr):
    """mix * scale + base, zero where there is no such row."""
    weight = tl.load(scale + part).to(tl.float32)
    return tl.where(inside, mix * weight + tl.load(base + row, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _first_iterate(logits, inside, eps, N: tl.constexpr, P: tl.constexpr):
    """softmax over k, and what Sinkhorn starts from: that + eps; zero outside."""
    real = tl.arange(0, P)[None, None, :] < N
    logits = tl.where(real, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, axis=2, keep_dims=True))
    share = tl.where(inside, share / tl.sum(share, axis=2, keep_dims=True), 0.0)
    return share, tl.where(inside, share + eps, 0.0)


@triton.jit(do_not_specialize=["t"])
def coefficients(
    partial, base, scale, pre, post, comb, mix, r, link, t, w, splits, iterations, eps, norm_eps,
    HEAD: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """pre, post, comb of BT tokens from the partial sums of the projection; mix [t, m] and r [t] for the gradient.
    HEAD: pre alone. `link` is one zero."""
    m: tl.constexpr = N if HEAD else (N + 2) * N
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    root = tl.rsqrt(_summed(partial, token, m, token < t, t, m, splits) / w + norm_eps)
    tl.store(r + token, root, mask=token < t)
    tl.store(link, 0.0, mask=tl.program_id(0) == 0)

    at, row, inside = _gate_rows(token, t, 0, N, P)
    x = _summed(partial, at, row, inside, t, m, splits) * root[:, None]
    tl.store(mix + at * m + row, x, mask=inside)
    tl.store(pre + at * N + row, _sigmoid(_logits(x, base, scale, row, inside, 0)) + eps, mask=inside)
    if not HEAD:
        at, row, inside = _gate_rows(token, t, N, N, P)
        x = _summed(partial, at, row, inside, t, m, splits) * root[:, None]
        tl.store(mix + at * m + row, x, mask=inside)
        tl.store(post + at * N + row - N, 2 * _sigmoid(_logits(x, base, scale, row, inside, 1)), mask=inside)

        at, row, inside = _comb_rows(token, t, N, P)
        x = _summed(partial, at, row, inside, t, m, splits) * root[:, None, None]
        tl.store(mix + at * m + row, x, mask=inside)
        _, c = _first_iterate(_logits(x, base, scale, row, inside, 2), inside, eps, N, P)
        c /= tl.sum(c, axis=1, keep_dims=True) + eps
        for _ in range(1, iterations):
            c /= tl.sum(c, axis=2, keep_dims=True) + eps
            c /= tl.sum(c, axis=1, keep_dims=True) + eps
        tl.store(comb + at * N * N + row - 2 * N, c, mask=inside)


@triton.jit
def _sinkhorn_backward(
    logits, grad, inside, divisors, iterations, eps, N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """The gradient to the logits. Every iterate is worked out again; `divisors` [2 iterations - 1, BT, P] is scratch.

    For one step Y = X / s, s = sum X + eps, Z = X dX: Z_X = Z_Y - Y sum Z_Y, and X = Y s.
    """
    by_j = tl.arange(0, BT)[:, None, None] * P + tl.arange(0, P)[None, :, None]
    by_k = tl.arange(0, BT)[:, None, None] * P + tl.arange(0, P)[None, None, :]
    share, first = _first_iterate(logits, inside, eps, N, P)
    s = tl.sum(first, axis=1, keep_dims=True) + eps
    tl.debug_barrier()
    tl.store(divisors + by_k, s)
    c = first / s
    for i in range(1, iterations):
        s = tl.sum(c, axis=2, keep_dims=True) + eps
        tl.store(divisors + (2 * i - 1) * BT * P + by_j, s)
        c /= s
        s = tl.sum(c, axis=1, keep_dims=True) + eps
        tl.store(divisors + 2 * i * BT * P + by_k, s)
        c /= s
    tl.debug_barrier()
    z = grad * c
    for back in range(1, iterations):
        i = iterations - back
        z -= c * tl.sum(z, axis=1, keep_dims=True)
        c *= tl.load(divisors + 2 * i * BT * P + by_k)
        z -= c * tl.sum(z, axis=2, keep_dims=True)
        c *= tl.load(divisors + (2 * i - 1) * BT * P + by_j)
    z -= c * tl.sum(z, axis=1, keep_dims=True)
    z = tl.where(inside, z * share / first, 0.0)
    return z - share * tl.sum(z, axis=2, keep_dims=True)


@triton.jit(do_not_specialize=["t", "steps"])
def coefficients_backward(
    dpre, dread, dpost, dcomb, mix, r, base, scale, divisors, scaled, shrink, sums, t, w, steps, iterations, eps,
    DPRE: tl.constexpr, DREAD: tl.constexpr, DPOST: tl.constexpr, DCOMB: tl.constexpr,
    HEAD: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """With dz the gradient of the logits and dmix = dz * scale, over `steps` blocks of BT tokens:

    scaled [t, m] = r dmix;  shrink [t] = -r^2 sum(mix dmix) / w;  sums [parts, m + 3]: sum dz, then sum(dz mix) of pre,
    post and comb. dread adds to dpre.
    """
    m: tl.constexpr = N if HEAD else (N + 2) * N
    part = tl.program_id(0)
    divisors += part.to(tl.int64) * (2 * iterations - 1) * BT * P
    into = sums + part.to(tl.int64) * (m + 3)
    base_pre, base_post, base_comb = (
        tl.zeros((P,), tl.float32), tl.zeros((P,), tl.float32), tl.zeros((P, P), tl.float32)
    )  # fmt: skip
    scale_pre, scale_post, scale_comb = 0.0, 0.0, 0.0
    for step in range(part * steps, (part + 1) * steps):
        token = (step * BT + tl.arange(0, BT)).to(tl.int64)
        root = tl.load(r + token, mask=token < t, other=0.0)

        at, row, inside = _gate_rows(token, t, 0, N, P)
        x = tl.load(mix + at * m + row, mask=inside, other=0.0)
        gate = _sigmoid(_logits(x, base, scale, row, inside, 0))
        dz = tl.zeros((BT, P), tl.float32)
        if DPRE:
            dz += tl.load(dpre + at * N + row, mask=inside, other=0.0)
        if DREAD:
            dz += tl.load(dread + at * N + row, mask=inside, other=0.0)
        dz *= gate * (1 - gate)
        base_pre += tl.sum(dz, axis=0)
        scale_pre += tl.sum(dz * x)
        dmix = dz * tl.load(scale).to(tl.float32)
        along = tl.sum(x * dmix, axis=1)
        tl.store(scaled + at * m + row, dmix * root[:, None], mask=inside)
        if not HEAD:
            at, row, inside = _gate_rows(token, t, N, N, P)
            x = tl.load(mix + at * m + row, mask=inside, other=0.0)
            dz = tl.zeros((BT, P), tl.float32)
            if DPOST:
                gate = _sigmoid(_logits(x, base, scale, row, inside, 1))
                dz = tl.load(dpost + at * N + row - N, mask=inside, other=0.0) * 2 * gate * (1 - gate)
            base_post += tl.sum(dz, axis=0)
            scale_post += tl.sum(dz * x)
            dmix = dz * tl.load(scale + 1).to(tl.float32)
            along += tl.sum(x * dmix, axis=1)
            tl.store(scaled + at * m + row, dmix * root[:, None], mask=inside)

            at, row, inside = _comb_rows(token, t, N, P)
            x = tl.load(mix + at * m + row, mask=inside, other=0.0)
            dz = tl.zeros((BT, P, P), tl.float32)
            if DCOMB:
                grad = tl.load(dcomb + at * N * N + row - 2 * N, mask=inside, other=0.0)
                logits = _logits(x, base, scale, row, inside, 2)
                dz = _sinkhorn_backward(logits, grad, inside, divisors, iterations, eps, N, P, BT)
            base_comb += tl.sum(dz, axis=0)
            scale_comb += tl.sum(dz * x)
            dmix = dz * tl.load(scale + 2).to(tl.float32)
            along += tl.sum(tl.sum(x * dmix, axis=2), axis=1)
            tl.store(scaled + at * m + row, dmix * root[:, None, None], mask=inside)
        tl.store(shrink + token, -along * root * root / w, mask=token < t)
    i, j, k = tl.arange(0, P), tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    tl.store(into + i, base_pre, mask=i < N)
    tl.store(into + m, scale_pre)
    if not HEAD:
        tl.store(into + N + i, base_post, mask=i < N)
        tl.store(into + 2 * N + j * N + k, base_comb, mask=(j < N) & (k < N))
        tl.store(into + m + 1, scale_post)
        tl.store(into + m + 2, scale_comb)


# streams of one token ------------------------------------------------------------------------------------------------


@triton.jit
def _load_streams(x, token, at, d, N: tl.constexpr):
    """The n streams of one token, some columns of them, as a tuple."""
    streams = ()  # type: tuple
    for j in tl.static_range(N):
        streams += (tl.load(x + (token * N + j) * d + at, mask=at < d, other=0.0).to(tl.float32),)
    return streams


@triton.jit
def _load_scalars(x, first, N: tl.constexpr):
    """N consecutive numbers as a tuple."""
    numbers = ()  # type: tuple
    for i in tl.static_range(N):
        numbers += (tl.load(x + first + i).to(tl.float32),)
    return numbers


@triton.jit
def _zeros(N: tl.constexpr, C: tl.constexpr):
    sums = ()  # type: tuple
    for _ in tl.static_range(N):
        sums += (tl.zeros((C,), tl.float32),)
    return sums


@triton.jit
def collapse(x, pre, out, d, N: tl.constexpr, C: tl.constexpr):
    """out = sum_j pre_j X_j: C columns of one token."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    streams, weights = _load_streams(x, token, at, d, N), _load_scalars(pre, token * N, N)
    total = weights[0] * streams[0]
    for j in tl.static_range(1, N):
        total += weights[j] * streams[j]
    tl.store(out + token * d + at, total, mask=at < d)


@triton.jit
def collapse_backward(du, x, pre, dx, dpre, d, DX: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """dpre_j = sum_d X_j du and dX_j = pre_j du, of one token."""
    token = tl.program_id(0).to(tl.int64)
    sums = _zeros(N, C)
    for start in range(0, d, C):
        at = start + tl.arange(0, C)
        grad = tl.load(du + token * d + at, mask=at < d, other=0.0).to(tl.float32)
        streams = _load_streams(x, token, at, d, N)
        more = ()  # type: tuple
        for j in tl.static_range(N):
            more += (sums[j] + streams[j] * grad,)
            if DX:
                weight = tl.load(pre + token * N + j).to(tl.float32)
                tl.store(dx + (token * N + j) * d + at, weight * grad, mask=at < d)
        sums = more
    for j in tl.static_range(N):
        tl.store(dpre + token * N + j, tl.sum(sums[j], axis=0))


@triton.jit
def recombine(y, x, post, comb, out, d, N: tl.constexpr, C: tl.constexpr):
    """out_k = post_k y + sum_j comb[j, k] X_j: C columns of one token."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    output = tl.load(y + token * d + at, mask=at < d, other=0.0).to(tl.float32)
    streams = _load_streams(x, token, at, d, N)
    gates, mixing = _load_scalars(post, token * N, N), _load_scalars(comb, token * N * N, N * N)
    for k in tl.static_range(N):
        total = gates[k] * output
        for j in tl.static_range(N):
            total += mixing[j * N + k] * streams[j]
        tl.store(out + (token * N + k) * d + at, total, mask=at < d)


@triton.jit
def recombine_backward(
    grad, y, x, post, comb, dy, dx, dpost, dcomb, d, N: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """dX_j = sum_k comb[j, k] G_k;  dy = sum_k post_k G_k;  dpost_k = sum_d y G_k;  dcomb[j, k] = sum_d X_j G_k."""
    token = tl.program_id(0).to(tl.int64)
    gates, mixing = _load_scalars(post, token * N, N), _load_scalars(comb, token * N * N, N * N)
    gate_sums, mixing_sums = _zeros(N, C), _zeros(N * N, C)
    for start in range(0, d, C):
        at = start + tl.arange(0, C)
        output = tl.load(y + token * d + at, mask=at < d, other=0.0).to(tl.float32)
        streams, grads = _load_streams(x, token, at, d, N), _load_streams(grad, token, at, d, N)
        total = gates[0] * grads[0]
        more = ()  # type: tuple
        for k in tl.static_range(N):
            more += (gate_sums[k] + output * grads[k],)
        for k in tl.static_range(1, N):
            total += gates[k] * grads[k]
        tl.store(dy + token * d + at, total, mask=at < d)
        gate_sums = more
        more = ()
        for j in tl.static_range(N):
            total = mixing[j * N] * grads[0]
            more += (mixing_sums[j * N] + streams[j] * grads[0],)
            for k in tl.static_range(1, N):
                total += mixing[j * N + k] * grads[k]
                more += (mixing_sums[j * N + k] + streams[j] * grads[k],)
            tl.store(dx + (token * N + j) * d + at, total, mask=at < d)
        mixing_sums = more
    for k in tl.static_range(N):
        tl.store(dpost + token * N + k, tl.sum(gate_sums[k], axis=0))
    for i in tl.static_range(N * N):
        tl.store(dcomb + token * N * N + i, tl.sum(mixing_sums[i], axis=0))
