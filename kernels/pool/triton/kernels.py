"""The kernels of the compressor's pooling. A program has all slots of an entry in registers, for a block of channels.

Slot s of an entry whose window begins at row f is row f - (slots - m) + s of kv, f - m to f + m with overlap: the slots
before the window read the first D channels, its own the last D. Nothing depends on the other entries of a batch, all
sums are float32 in a fixed order.

b batch · t tokens · n entries of the batch · p of a row · m ratio · s slots (m, or 2 m with overlap) · C channels of a
token · D channels of an entry
"""

import triton
import triton.language as tl


@triton.jit
def _window(first, follows, entry, p, m, GATHERED: tl.constexpr, OVERLAP: tl.constexpr):
    """Row of the batch, entry in it, first token of its window (-1: no entry), whether the window before counts."""
    b = (entry // p).to(tl.int64)
    i = entry - b * p
    start = i * m
    if GATHERED:
        start = tl.load(first + entry)
    joined = start >= 0
    if GATHERED and OVERLAP:
        joined = tl.load(follows + entry) != 0
    return b, i, start, joined


@triton.jit
def _slots(m, d, block, OVERLAP: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr):
    """Of the program's slots [S, 1] and channels: rows after the window's first, channel of a token, place in bias."""
    slot = tl.arange(0, S)[:, None]
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    if OVERLAP:
        column = channel + tl.where(slot < m, 0, d)
        place = tl.where(slot < m, slot, slot - m) * 2 * d + column
        after, inside = slot - m, (slot < 2 * m) & (channel < d)
    else:
        column, place, after, inside = channel + 0 * slot, slot * d + channel, slot, (slot < m) & (channel < d)
    return after, column, place, inside


@triton.jit
def _softmax(z):
    """`exp(z - max)` over the slots, the maximum and the sum."""
    top = tl.max(z, axis=0)
    weights = tl.exp(z - top[None, :])
    return weights, top, tl.sum(weights, axis=0)


@triton.jit(do_not_specialize=["n", "p", "t"])
def pool_forward(
    kv, gate, bias, first, follows, out, n, p, t, m: tl.constexpr, d: tl.constexpr,
    GATHERED: tl.constexpr, OVERLAP: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """out [n, D] = sum_s softmax_s(gate + bias) kv, RUN entries to a program."""
    after, column, place, inside = _slots(m, d, tl.program_id(1), OVERLAP, S, CHANNELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c = 2 * d if OVERLAP else d
    added = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    begin = tl.program_id(0) * RUN
    for entry in range(begin, tl.minimum(begin + RUN, n)):
        b, i, start, joined = _window(first, follows, entry, p, m, GATHERED, OVERLAP)
        row = start + after
        read = inside & (start >= 0) & (row >= 0) & (row < t) & ((after >= 0) | joined)
        at = (b * t + row) * c + column
        z = tl.load(gate + at, mask=read, other=float("-inf")).to(tl.float32) + added
        values = tl.load(kv + at, mask=read, other=0.0).to(tl.float32)
        weights, _, total = _softmax(z)
        pooled = tl.where(start >= 0, tl.sum(weights * values, axis=0) / total, 0.0)
        tl.store(out + (b * p + i) * d + channel, pooled, mask=channel < d)


@triton.jit(do_not_specialize=["n", "p", "real", "t"])
def pool_backward(
    kv, gate, bias, first, follows, dout, dkv, dgate, dslots, tops, scales, means, n, p, real, t,
    m: tl.constexpr, d: tl.constexpr, GATHERED: tl.constexpr, OVERLAP: tl.constexpr,
    S: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """With a = softmax(z), c = sum a kv:  dkv = a dc,  dgate = a dc (kv - c),  and dgate summed over some entries.

    Each program takes every `programs`-th entry; dslots [programs, s, D]. Regular windows share no row: their gradients
    are written here, and `p - real` entries past a row's last, of weight zero, write those of the rows that no entry
    reads. Gathered ones leave three numbers [n, D] to `pool_rows`: the maximum of z, dc over the sum of exp, and c.
    """
    after, column, place, inside = _slots(m, d, tl.program_id(1), OVERLAP, S, CHANNELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c = 2 * d if OVERLAP else d
    added = tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros((S, CHANNELS), tl.float32)
    for entry in range(tl.program_id(0), n, tl.num_programs(0)):
        b, i, start, joined = _window(first, follows, entry, p, m, GATHERED, OVERLAP)
        row = start + after
        exists = (start >= 0) & (i < real)
        written = inside & (row >= 0) & (row < t)
        read = written & exists & ((after >= 0) | joined)
        at = (b * t + row) * c + column
        z = tl.load(gate + at, mask=read, other=float("-inf")).to(tl.float32) + added
        values = tl.load(kv + at, mask=read, other=0.0).to(tl.float32)
        of = (b * real + i) * d + channel
        dc = tl.load(dout + of, mask=exists & (channel < d), other=0.0).to(tl.float32)
        weights, top, total = _softmax(z)
        mean = tl.sum(weights * values, axis=0) / total
        dvalues = tl.where(read, weights * (dc / total)[None, :], 0.0)
        dz = tl.where(read, dvalues * (values - mean[None, :]), 0.0)
        dbias += dz
        if GATHERED:
            tl.store(tops + of, top, mask=channel < d)
            tl.store(scales + of, dc / total, mask=channel < d)
            tl.store(means + of, mean, mask=channel < d)
        else:
            tl.store(dkv + at, dvalues, mask=written)
            tl.store(dgate + at, dz, mask=written)
    slot = tl.arange(0, S)[:, None]
    slots = 2 * m if OVERLAP else m
    at = (tl.program_id(0).to(tl.int64) * slots + slot) * d + channel[None, :]
    tl.store(dslots + at, dbias, mask=inside)


@triton.jit(do_not_specialize=["t"])
def pool_rows(
    kv, gate, bias, first, follows, entries, offsets, tops, scales, means, dkv, dgate, t,
    m: tl.constexpr, d: tl.constexpr, blocks, OVERLAP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Gradients of a block of rows, from all entries that read them, which may be none or several.

    entries are those of the batch in the order of `first`; those that begin at row i of sequence b lie from
    offsets[b, i] to offsets[b, i + 1].
    """
    panels = tl.cdiv(t, ROWS)
    b = (tl.program_id(0) // panels).to(tl.int64)
    row = tl.program_id(0) % panels * ROWS + tl.arange(0, ROWS)[:, None]
    half, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    c = 2 * d if OVERLAP else d
    column, inside = half * d + channel, (row < t) & (channel < d)
    own = half == (1 if OVERLAP else 0)
    low = row + 1 - tl.where(own, m, 0)  # own slots: first from row - m + 1 to row; those before: row + 1 to row + m
    offsets += b * (t + 1)
    begin = tl.load(offsets + tl.maximum(low, 0), mask=row < t, other=0)
    end = tl.load(offsets + tl.minimum(low + m, t), mask=row < t, other=0)
    at = (b * t + row) * c + column
    z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(kv + at, mask=inside, other=0.0).to(tl.float32)
    dvalues, dz = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in range(tl.max(end - begin)):
        there = begin + i < end
        entry = tl.load(entries + begin + i, mask=there, other=0)
        start = tl.load(first + entry, mask=there, other=0)
        if OVERLAP:
            there &= own | (tl.load(follows + entry, mask=there, other=0) != 0)
        used = there & (channel < d)
        place = row - start + tl.where(own, 0, m)
        added = tl.load(bias + place * c + column, mask=used, other=0.0).to(tl.float32)
        of = entry * d + channel
        top = tl.load(tops + of, mask=used, other=0.0)
        scale = tl.load(scales + of, mask=used, other=0.0)
        mean = tl.load(means + of, mask=used, other=0.0)
        share = tl.where(used, tl.exp(z + added - top) * scale, 0.0)
        dvalues += share
        dz += tl.where(used, share * (values - mean), 0.0)
    tl.store(dkv + at, dvalues, mask=inside)
    tl.store(dgate + at, dz, mask=inside)
