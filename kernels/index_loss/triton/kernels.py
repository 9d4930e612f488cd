"""The kernels of the indexer's loss. The set over which teacher and student are compared is a row of slots: the picks
of a query, or, without picks, the entries it sees, in their order.

    p_s  = sum_h exp(scale <q_h, c_s> - lse_h) / (their sum over s),       I_s  = sum_i w_i ReLU(<q_i, k_s>)
    dI_s = softmax(I)_s - p_s,      g_si = dI_s w_i where the ReLU is open
    dq_i = sum_s g_si k_s,          dw_i = sum_s dI_s ReLU(<q_i, k_s>),    dk_s = sum_ti g_si q_i

A program owns a query, or, for the keys' gradient without picks, a tile of entries: no atomics, sums in one order.

b batch · t queries · n queries of a chunk · h heads · d channels · p entries · k picks · BS, BH slots, heads of a tile
"""

import triton
import triton.language as tl

LENGTHS = ["first", "n", "t", "p", "k", "width", "span"]  # vary: no kernel of its own for 1 or 16
BOUNDS = ["index", "start", "end"]  # are read one by one: nor for their alignment


@triton.jit
def _row(first, n, t):
    """Sequence and token of the chunk's row that this program owns, and the row."""
    row = tl.program_id(0)
    batch = (row // n).to(tl.int64)
    return batch, batch * t + first + row % n, row.to(tl.int64)


@triton.jit
def _slots(start, end, token, k, PICKED: tl.constexpr):
    """How many slots a query has, and the entry in the first of them (without picks)."""
    low = tl.load(start + token).to(tl.int32)
    return k if PICKED else tl.load(end + token).to(tl.int32) - low, low


@triton.jit
def _entries(index, token, slot, k, count, low, PICKED: tl.constexpr):
    """The entry in each slot, -1 for none."""
    if PICKED:
        entry = tl.load(index + token * k + slot, mask=slot < k, other=-1)
    else:
        entry = tl.where(slot < count, low + slot, -1).to(tl.int64)
    return entry


@triton.jit
def _rows_of(x, row, real, d, D: tl.constexpr):
    """x [.., d] at these rows, zeros where there is none."""
    column = tl.arange(0, D)[None, :]
    return tl.load(x + row[:, None] * d + column, mask=real[:, None] & (column < d), other=0.0)


@triton.jit
def _heads(q, per_head, token, head, h, d, other, D: tl.constexpr):
    """q [heads, d] and the number per head, `other` where there is no head."""
    x = _rows_of(q, token * h + head, head < h, d, D)
    return x, tl.load(per_head + token * h + head, mask=head < h, other=other).to(tl.float32)


@triton.jit
def _sum_of_heads(key, x, per_head, scale, TEACHER: tl.constexpr):
    """[slots]: sum over the heads of exp(scale <x, key> - lse), or of weight ReLU(<x, key>)."""
    hits = tl.dot(key, x.T, input_precision="ieee")
    if TEACHER:
        return tl.sum(tl.exp(hits * scale - per_head[None, :]), axis=1)
    return tl.sum(tl.where(hits <= 0, 0.0, hits) * per_head[None, :], axis=1)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def sum_heads(
    q, per_head, keys, index, start, end, out, first, n, t, h, d, p, k, width, scale,
    TEACHER: tl.constexpr, PICKED: tl.constexpr, HELD: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out [b n, slot]: the teacher's mass (per_head = lse) or the student's scores (per_head = weights) of a query.
    HELD: there are no more than BH heads, which are read once.
    """
    batch, token, row = _row(first, n, t)
    count, low = _slots(start, end, token, k, PICKED)
    none: tl.constexpr = float("inf") if TEACHER else 0.0
    head = tl.arange(0, BH)
    if HELD:
        x, number = _heads(q, per_head, token, head, h, d, none, D)
    for s in range(0, count, BS):
        slot = s + tl.arange(0, BS)
        entry = _entries(index, token, slot, k, count, low, PICKED)
        key = _rows_of(keys, batch * p + entry, entry >= 0, d, D)
        if HELD:
            total = _sum_of_heads(key, x, number, scale, TEACHER)
        else:
            total = tl.zeros((BS,), tl.float32)
            for i in range(0, h, BH):
                some, numbers = _heads(q, per_head, token, i + head, h, d, none, D)
                total += _sum_of_heads(key, some, numbers, scale, TEACHER)
        tl.store(out + row * width + slot, total, mask=entry >= 0)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def divergence(
    mass, scores, index, start, end, losses, first, n, t, k, width, floor,
    PICKED: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """losses [token] = KL(p || softmax(I)) of one query, and scores [row, slot] become dI; both are 0 where the mass is
    not above the floor.
    """
    _, token, row = _row(first, n, t)
    count, low = _slots(start, end, token, k, PICKED)
    mass += row * width
    scores += row * width
    total, top, norm = 0.0, float("-inf"), 0.0
    for s in range(0, count, BS):
        slot = s + tl.arange(0, BS)
        seen = _entries(index, token, slot, k, count, low, PICKED) >= 0
        x = tl.load(scores + slot, mask=seen, other=float("-inf"))
        total += tl.sum(tl.load(mass + slot, mask=seen, other=0.0), 0)
        above = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        norm = norm * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = above
    log_norm, loss = top + tl.log(norm), 0.0
    for s in range(0, count, BS):
        slot = s + tl.arange(0, BS)
        seen = _entries(index, token, slot, k, count, low, PICKED) >= 0
        p = tl.load(mass + slot, mask=seen, other=0.0) / total
        log_student = tl.load(scores + slot, mask=seen, other=0.0) - log_norm
        loss += tl.sum(tl.where(p == 0, 0.0, p * (tl.log(p) - log_student)), 0)
        tl.store(scores + slot, tl.where(total > floor, tl.exp(log_student) - p, 0.0), mask=seen)
    tl.store(losses + token, tl.where(total > floor, loss, 0.0))


@triton.jit
def _through_relu(key, x, weight, dscore):
    """hits [slot, head], zero where the ReLU is shut, and g = dscore weight where it is open, in the dtype of x."""
    hits = tl.dot(key, x.T, input_precision="ieee")
    g = tl.where(hits <= 0, 0.0, dscore[:, None] * weight[None, :])
    return tl.where(hits <= 0, 0.0, hits), g.to(x.dtype)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def query_gradient(
    dscores, q, weights, keys, index, start, end, dq, dweights, rows, first, n, t, h, d, p, k, width,
    PICKED: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """dq [token, h, d] and dweights [token, h] of one query; with picks also rows [b n, k, d], what each pick adds to
    the gradient of its key.
    """
    batch, token, row = _row(first, n, t)
    count, low = _slots(start, end, token, k, PICKED)
    head, column = tl.arange(0, BH), tl.arange(0, D)[None, :]
    x, weight = _heads(q, weights, token, head, h, d, 0.0, D)
    dx, dweight = tl.zeros((BH, D), tl.float32), tl.zeros((BH,), tl.float32)
    for s in range(0, count, BS):
        slot = s + tl.arange(0, BS)
        entry = _entries(index, token, slot, k, count, low, PICKED)
        key = _rows_of(keys, batch * p + entry, entry >= 0, d, D)
        dscore = tl.load(dscores + row * width + slot, mask=entry >= 0, other=0.0)
        hits, g = _through_relu(key, x, weight, dscore)
        dweight += tl.sum(hits * dscore[:, None], axis=0)
        dx = tl.dot(g.T, key, dx, input_precision="ieee")
        if PICKED:
            at = rows + (row * k + slot[:, None]) * d + column
            tl.store(at, tl.dot(g, x, input_precision="ieee"), mask=(entry >= 0)[:, None] & (column < d))
    tl.store(dq + (token * h + head[:, None]) * d + column, dx, mask=(head < h)[:, None] & (column < d))
    tl.store(dweights + token * h + head, dweight, mask=head < h)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def key_gradient(
    dscores, q, weights, keys, start, end, out, first, n, t, h, d, p, width, span,
    BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """out [split, b p, d] of a tile of entries: the sum over the queries of one span of the chunk, ascending. From the
    first query that sees one of the entries to the last.
    """
    batch, s = (tl.program_id(0) // tl.cdiv(p, BS)).to(tl.int64), tl.program_id(0) % tl.cdiv(p, BS) * BS
    begin = first + tl.program_id(1) * span
    stop = tl.minimum(begin + span, first + n)
    least, most = stop, begin
    for i in range(begin, stop, QUERIES):
        query = i + tl.arange(0, QUERIES)
        low = tl.load(start + batch * t + query, mask=query < stop, other=0)
        high = tl.load(end + batch * t + query, mask=query < stop, other=0)
        sees = (low < s + BS) & (high > s)
        least = tl.minimum(least, tl.min(tl.where(sees, query, stop), 0))
        most = tl.maximum(most, tl.max(tl.where(sees, query + 1, begin), 0))
    entry, head, column = s + tl.arange(0, BS), tl.arange(0, BH), tl.arange(0, D)[None, :]
    key = _rows_of(keys, batch * p + entry, entry < p, d, D)
    total = tl.zeros((BS, D), tl.float32)
    for query in range(least, most):
        token, row = batch * t + query, batch * n + query - first
        low, high = tl.load(start + token), tl.load(end + token)
        x, weight = _heads(q, weights, token, head, h, d, 0.0, D)
        at = dscores + row * width + entry - low
        dscore = tl.load(at, mask=(entry >= low) & (entry < high), other=0.0)
        _, g = _through_relu(key, x, weight, dscore)
        total = tl.dot(g, x, total, input_precision="ieee")
    rows = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tl.cdiv(p, BS)) * p + batch * p + entry
    tl.store(out + rows[:, None] * d + column, total, mask=(entry < p)[:, None] & (column < d))
