"""The kernels of the indexer's loss. The set over which teacher and student are compared is a row of slots: the picks
of a query, or the entries themselves, without picks and where they are most of the entries; dI is 0 of the others.

    p_s  = sum_h exp(scale <q_h, c_s> - lse_h) / (their sum over s),       I_s  = sum_i w_i ReLU(<q_i, k_s>)
    dI_s = softmax(I)_s - p_s,      g_si = dI_s w_i where the ReLU is open
    dq_i = sum_s g_si k_s,          dw_i = sum_s dI_s ReLU(<q_i, k_s>),    dk_s = sum_ti g_si q_i

A program owns a query, or several that share the slots, or, for the keys' gradient, a tile of entries: no atomics,
sums in one order.

b batch · t queries · n queries of a chunk · h heads · d channels · p entries · k picks
BQ, BH, BS queries, heads, slots of a tile
"""

import triton
import triton.language as tl

LENGTHS = ["first", "n", "t", "p", "k", "width", "span"]  # vary: no kernel of its own for 1 or 16
BOUNDS = ["index", "start", "end"]  # are read one by one: nor for their alignment


@triton.jit
def _tile(start, end, first, n, t, p, k, PICKED: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr):
    """Of the BQ queries of this program: their sequence, the first of them in the chunk, the entries that each may
    compare, [low, high), and where the slots of all begin, at a multiple of BS, and stop.
    """
    tiles = tl.cdiv(n, BQ)
    batch, query = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BQ
    own = query + tl.arange(0, BQ)
    if PICKED:
        low, high, begin, stop = own * 0, own * 0 + p, 0, tl.where(p > 0, k, 0)
    else:
        token = batch * t + first + own
        low = tl.load(start + token, mask=own < n, other=0).to(tl.int32)
        high = tl.load(end + token, mask=own < n, other=0).to(tl.int32)
        begin = tl.min(tl.where(high > low, low, p), 0) // BS * BS
        stop = tl.max(tl.where(high > low, high, 0), 0)
    return batch, query, low, high, begin, stop


@triton.jit
def _entries(index, token, slot, k, PICKED: tl.constexpr):
    """The entry in each slot, -1 for none; without picks it has the slot's number."""
    return tl.load(index + token * k + slot, mask=slot < k, other=-1).to(tl.int32) if PICKED else slot


@triton.jit
def _rows_of(x, row, real, d, D: tl.constexpr):
    """x [.., d] at these rows, zeros where there is none."""
    column = tl.arange(0, D)[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * d + column, mask=real[:, None] & (column < d), other=0.0)


@triton.jit
def _keys(keys, entry, d, p, D: tl.constexpr):
    """The keys of these entries; of none, of which nothing is used, any one."""
    column, at = tl.arange(0, D)[None, :], tl.minimum(tl.maximum(entry, 0), p - 1).to(tl.int64)
    return tl.load(keys + at[:, None] * d + column, mask=column < d, other=0.0)


@triton.jit
def _places(token, left, i, h, BQ: tl.constexpr, BH: tl.constexpr):
    """Rows of [.., h, d] that hold the heads from i on of BQ queries, and which of them there are."""
    row = tl.arange(0, BQ * BH)
    query, head = row // BH, i + row % BH
    return (token + query) * h + head, (query < left) & (head < h)


@triton.jit
def _heads(q, per_head, at, real, d, other, D: tl.constexpr):
    """q [rows, d] and the number of each, `other` where there is no head."""
    return _rows_of(q, at, real, d, D), tl.load(per_head + at, mask=real, other=other).to(tl.float32)


@triton.jit
def _sum_of_heads(key, x, per_head, scale, TEACHER: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr):
    """[slots, BQ]: sum over the heads of exp(scale <x, key> - lse), or of weight ReLU(<x, key>)."""
    hits = tl.dot(key, x.T, input_precision="ieee")
    weighted = tl.where(hits <= 0, 0.0, hits) * per_head[None, :]
    each = tl.exp(hits * scale - per_head[None, :]) if TEACHER else weighted
    return tl.sum(tl.reshape(each, (each.shape[0], BQ, BH)), axis=2)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def sum_heads(
    q, per_head, keys, index, start, end, out, first, n, t, h, d, p, k, width, scale,
    TEACHER: tl.constexpr, PICKED: tl.constexpr, HELD: tl.constexpr,
    BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out [b n, slot]: the teacher's mass (per_head = lse) or the student's scores (per_head = weights) of BQ queries.
    HELD: there are no more than BH heads, which are read once.
    """
    batch, query, low, high, begin, stop = _tile(start, end, first, n, t, p, k, PICKED, BQ, BS)
    token, row = batch * t + first + query, batch * n + query + tl.arange(0, BQ)
    keys += batch * p * d
    none: tl.constexpr = float("inf") if TEACHER else 0.0
    if HELD:
        at, real = _places(token, n - query, 0, h, BQ, BH)
        x, number = _heads(q, per_head, at, real, d, none, D)
    for s in range(begin, stop, BS):
        slot = s + tl.arange(0, BS)
        entry = _entries(index, token, slot, k, PICKED)
        key = _keys(keys, entry, d, p, D)
        if HELD:
            total = _sum_of_heads(key, x, number, scale, TEACHER, BQ, BH)
        else:
            total = tl.zeros((BS, BQ), tl.float32)
            for i in range(0, h, BH):
                at, real = _places(token, n - query, i, h, BQ, BH)
                some, numbers = _heads(q, per_head, at, real, d, none, D)
                total += _sum_of_heads(key, some, numbers, scale, TEACHER, BQ, BH)
        compared = (entry[:, None] >= low[None, :]) & (entry[:, None] < high[None, :])
        tl.store(out + row[None, :] * width + slot[:, None], total, mask=compared)


@triton.jit
def _slots(index, start, end, token, s, k, PICKED: tl.constexpr, DENSE: tl.constexpr, BS: tl.constexpr):
    """Slots of one query, BS from the s-th on, and which of them there are."""
    if PICKED:
        slot = s + tl.arange(0, BS)
        entry = tl.load(index + token * k + slot, mask=slot < k, other=-1)
        slot, seen = entry if DENSE else slot, entry >= 0
    else:
        slot = tl.load(start + token) + s + tl.arange(0, BS)
        seen = slot < tl.load(end + token)
    return slot, seen


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def divergence(
    mass, scores, index, start, end, dscores, losses, first, n, t, k, width, floor,
    PICKED: tl.constexpr, DENSE: tl.constexpr, BS: tl.constexpr
):  # fmt: skip
    """losses [token] = KL(p || softmax(I)) of one query, and dscores [row, slot] = dI; both are 0 where the mass is not
    above the floor. DENSE: slots are entries, though there are picks.
    """
    row = tl.program_id(0).to(tl.int64)
    token = row // n * t + first + row % n
    count = k if PICKED else (tl.load(end + token) - tl.load(start + token)).to(tl.int32)
    mass += row * width
    scores += row * width
    total, top, norm = 0.0, float("-inf"), 0.0
    for s in range(0, count, BS):
        slot, seen = _slots(index, start, end, token, s, k, PICKED, DENSE, BS)
        x = tl.load(scores + slot, mask=seen, other=float("-inf"))
        total += tl.sum(tl.load(mass + slot, mask=seen, other=0.0), 0)
        above = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        norm = norm * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = above
    log_norm, loss = top + tl.log(norm), 0.0
    for s in range(0, count, BS):
        slot, seen = _slots(index, start, end, token, s, k, PICKED, DENSE, BS)
        p = tl.load(mass + slot, mask=seen, other=0.0) / total
        log_student = tl.load(scores + slot, mask=seen, other=0.0) - log_norm
        loss += tl.sum(tl.where(p == 0, 0.0, p * (tl.log(p) - log_student)), 0)
        tl.store(dscores + row * width + slot, tl.where(total > floor, tl.exp(log_student) - p, 0.0), mask=seen)
    tl.store(losses + token, tl.where(total > floor, loss, 0.0))


@triton.jit
def _hits(x, key):
    """<x, key> [rows, slots]; in float32, which no tensor cores multiply, from the transposed, for fewer registers."""
    if x.dtype == tl.float32:
        hits = tl.dot(key, x.T, input_precision="ieee").T
    else:
        hits = tl.dot(x, key.T, input_precision="ieee")
    return hits


@triton.jit
def _through_relu(hits, dscore, weight, like):
    """hits dscore, and g = dscore weight in the dtype of `like`, both where the ReLU is open."""
    dhits = tl.where(hits > 0, dscore, 0.0)
    return hits * dhits, tl.where(hits > 0, dscore * weight, 0.0).to(like.dtype)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def query_gradient(
    dscores, losses, q, weights, keys, index, start, end, dq, dweights, rows, first, n, t, h, d, p, k, width,
    PICKED: tl.constexpr, BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """dq [token, h, d] and dweights [token, h] of BQ queries; with picks also rows [b n, k, d], what each pick adds to
    the gradient of its key. Keys are finite: a loss that is none spoils its query alone.
    """
    batch, query, low, high, begin, stop = _tile(start, end, first, n, t, p, k, PICKED, BQ, BS)
    token, row = batch * t + first + query, batch * n + query + tl.arange(0, BQ)
    keys += batch * p * d
    at, real = _places(token, n - query, 0, h, BQ, BH)
    x, weight = _heads(q, weights, at, real, d, 0.0, D)
    rows += (batch * n + query) * k * d
    dx, dweight = tl.zeros((BQ * BH, D), tl.float32), tl.zeros((BQ * BH,), tl.float32)
    column = tl.arange(0, D)[None, :]
    for s in range(begin, stop, BS):
        slot = s + tl.arange(0, BS)
        entry = _entries(index, token, slot, k, PICKED)
        key = _keys(keys, entry, d, p, D)
        compared = (entry[None, :] >= low[:, None]) & (entry[None, :] < high[:, None])
        dscore = tl.load(dscores + row[:, None] * width + slot[None, :], mask=compared, other=0.0)
        dscore = tl.reshape(tl.broadcast_to(dscore[:, None, :], (BQ, BH, BS)), (BQ * BH, BS))
        dhits, g = _through_relu(_hits(x, key), dscore, weight[:, None], x)
        dweight += tl.sum(dhits, axis=1)
        dx = tl.dot(g, key, dx, input_precision="ieee")
        if PICKED:  # noqa: SIM102
            if t > 0:  # always: what is in a branch comes later, with registers that the products have left
                of = tl.dot(g.T, x, input_precision="ieee")
                tl.store(rows + slot[:, None] * d + column, of, mask=(entry >= 0)[:, None] & (column < d))
    loss = tl.load(losses + token + tl.arange(0, BQ * BH) // BH, mask=real, other=0.0)
    spoiled = tl.where(loss == loss, 0.0, loss)
    tl.store(dq + at[:, None] * d + column, dx + spoiled[:, None], mask=real[:, None] & (column < d))
    tl.store(dweights + at, dweight + spoiled, mask=real)


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=BOUNDS)
def key_gradient(
    dscores, q, weights, keys, start, end, out, first, n, t, h, d, p, width, span,
    BQ: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """out [split, b p, d] of a tile of entries: the sum over the queries of one span of the chunk, ascending, BQ at a
    time. From the first query that sees one of the entries to the last.
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
    entry, column = s + tl.arange(0, BS), tl.arange(0, D)[None, :]
    key = _rows_of(keys, batch * p + entry, entry < p, d, D)
    total = tl.zeros((BS, D), tl.float32)
    for query in range(least, most, BQ):
        token, own = batch * t + query, tl.arange(0, BQ)
        at, real = _places(token, most - query, 0, h, BQ, BH)
        x, weight = _heads(q, weights, at, real, d, 0.0, D)
        low = tl.load(start + token + own, mask=own < most - query, other=0)
        high = tl.load(end + token + own, mask=own < most - query, other=0)
        compared = (entry[:, None] >= low[None, :]) & (entry[:, None] < high[None, :])
        row = batch * n + query - first + own
        dscore = tl.load(dscores + row[None, :] * width + entry[:, None], mask=compared, other=0.0)
        dscore = tl.reshape(tl.broadcast_to(dscore[:, :, None], (BS, BQ, BH)), (BS, BQ * BH))
        _, g = _through_relu(tl.dot(key, x.T, input_precision="ieee"), dscore, weight[None, :], x)
        total = tl.dot(g, x, total, input_precision="ieee")
    rows = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tl.cdiv(p, BS)) * p + batch * p + entry
    tl.store(out + rows[:, None] * d + column, total, mask=(entry < p)[:, None] & (column < d))
