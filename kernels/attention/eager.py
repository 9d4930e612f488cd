"""The specification of `attention` in PyTorch: blocks of queries, flash-style backward (spec B.11), memory linear in t.

With p_k the probabilities and D = <do, o>:  ds_k = p_k (<do, kv_k> - D),  dq = scale sum_k ds_k kv_k,
dkv_k = sum_th p_k do + scale ds_k q,  dsink = sum_t ds_sink, where the sink is one more key of value 0 whose logit is
given: softmax, output and gradient need no other care for it.

A block sees its keys in one of two ways. *Shared*: window rows and a contiguous range of entries, one matrix for all
queries of the block, hidden pairs masked. *Gathered*: each query's picks are copied out. A list of picks is looked at
as shared, with a mask, as long as that is cheaper than copying.

b batch · t queries of the block · h heads · d head dim · l shared keys and the sink · k picked entries
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import query_blocks, visible_entries
from ..precision import accumulation, tracked, without_autocast

NONE = -math.inf
FINITE = 1e30  # stands for an infinite sink
FAINT = 1e-30  # a probability of the sink too small to tell the log-sum-exp from


@dataclass
class Sight:
    """What one block of queries sees."""

    queries: slice
    rows: slice  # of kv
    entries: slice  # of compressed, shared by the block
    bias: Tensor  # [b|1, t, l] added to the scores: 0 visible, -inf hidden, log n for an entry picked n times
    picks: Tensor | None  # [b, t, k] gathered entries, -1 = none


def attention(
    q: Tensor,
    kv: Tensor,
    compressed: Tensor | None,
    sink: Tensor,
    *,
    window: int,
    scale: float,
    window_start: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tensors = (q, kv, compressed, sink)
    if tracked(*tensors):
        return _Attention.apply(*tensors, window, scale, window_start, start, end, index)
    if q.shape[1] == 1 and window_start is None:
        keys = _step_keys(kv, compressed, window, start, end, index)
        if keys is not None:
            return _forward_step(q, keys, sink, scale)
    return _forward(*tensors, window, scale, window_start, start, end, index)


def _forward(q, kv, compressed, sink, window, scale, window_start, start, end, index) -> tuple[Tensor, Tensor]:
    exact = accumulation(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=exact, device=q.device)
    with without_autocast(q):
        q, finite_sink, broken = (
            q.to(exact) * scale,
            sink.to(exact).clamp(-FINITE, FINITE),
            _broken(q, kv, compressed, index),
        )
        for sight in _sights(q, kv, compressed, window, window_start, start, end, index):
            out[:, sight.queries], lse[:, sight.queries] = _forward_block(sight, q, kv, compressed, finite_sink, broken)
        lse[lse.abs() >= FINITE] *= math.inf
    return out, lse


def _step_keys(kv, compressed, window, start, end, index) -> list[Tensor] | None:
    """What a single query of each row sees, [b, l, d] each; None if rows see different numbers of entries."""
    rows = kv[:, -window:]
    if compressed is None or compressed.shape[1] == 0:
        return [rows]
    if index is not None:
        if int(index.min()) < 0:
            return None
        picked = [entries.index_select(0, own) for entries, own in zip(compressed, index[:, 0])]
        return [rows, torch.stack(picked)]
    if start.numel() > 1 or end.numel() > 1:
        return None
    return [rows, compressed[:, int(start) : int(end)]]


def _forward_step(q, keys, sink, scale) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one query per row that sees all the keys given: no mask, nothing copied."""
    exact = accumulation(q)
    with without_autocast(q):
        sink = sink.to(exact).clamp(-FINITE, FINITE).view(1, -1, 1).expand(len(q), -1, 1)
        keys, scaled = [part.to(exact) for part in keys], q[:, 0].to(exact) * scale
        scores = torch.cat([*(torch.bmm(scaled, part.mT) for part in keys), sink], -1)
        p = scores.softmax(-1)
        shares = p.split([*(part.shape[1] for part in keys), 1], -1)
        out = torch.bmm(shares[0], keys[0])
        for share, part in zip(shares[1:], keys[1:]):
            out.baddbmm_(share, part)
        lse = scores.amax(-1).sub_(p.amax(-1).log_())
    return out[:, None].to(q.dtype), lse.masked_fill_(lse >= FINITE, math.inf)[:, None]


def _broken(q, kv, compressed, index) -> bool | None:
    """Whether any key is not finite: such keys need care, because 0 * nan is nan. None: each block is to look itself,
    where blocks read a few of many entries."""
    if compressed is not None and _gathers(q, compressed, index):
        return None
    return not all(bool(x.isfinite().all()) for x in (kv, compressed) if x is not None)


def _gathers(q, compressed, index) -> bool:
    """Whether blocks copy their picks, unless all of a block's happen to lie close together."""
    return index is not None and not sharing_pays(compressed.shape[1], index.shape[2], q.shape[2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, compressed, sink, window, scale, window_start, start, end, index):
        out, lse = _forward(q, kv, compressed, sink, window, scale, window_start, start, end, index)
        ctx.save_for_backward(q, kv, compressed, sink, window_start, start, end, index, out)
        ctx.window, ctx.scale = window, scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, kv, compressed, sink, window_start, start, end, index, out = ctx.saved_tensors
        if dout is None:
            return (None,) * 10
        exact = accumulation(q)
        dq = torch.empty_like(q)
        sums = [None if x is None else torch.zeros_like(x, dtype=exact) for x in (kv, compressed, sink)]
        with without_autocast(q):
            dout = dout.to(exact)
            delta = (dout * out.to(exact)).sum(-1)  # [b, t, h]
            scaled, finite_sink = q.to(exact) * ctx.scale, sink.to(exact).clamp(-FINITE, FINITE)
            broken = _broken(q, kv, compressed, index)
            for sight in _sights(q, kv, compressed, ctx.window, window_start, start, end, index):
                dq[:, sight.queries] = _backward_block(
                    sight, scaled, kv, compressed, finite_sink, dout, delta, broken, *sums
                ).mul_(ctx.scale)
        dkv, dcompressed, dsink = (None if s is None else s.to(x.dtype) for s, x in zip(sums, (kv, compressed, sink)))
        return dq, dkv, dcompressed, dsink, None, None, None, None, None, None


def _sights(q, kv, compressed, window, window_start, start, end, index) -> Iterator[Sight]:
    b, t, h, _ = q.shape
    past = kv.shape[1] - t
    entries = 0 if compressed is None else compressed.shape[1]
    gathers = compressed is not None and _gathers(q, compressed, index)
    per_query = b * h * (2 * window + (index.shape[2] if gathers else entries))
    if gathers:  # the copies, too, are to stay in the cache
        per_query = max(per_query, b * index.shape[2] * kv.shape[2])
    inner: dict[tuple[int, int], Tensor] = {}  # blocks that lie alike in their window share a bias
    for block in query_blocks(t, per_query, largest=max(64, 2 * window)):  # a block's window is `window` + block wide
        rows = slice(max(0, past + block.start - window + 1), past + block.stop)
        alike = (past + block.start - rows.start, block.stop - block.start)
        bias = inner.get(alike)
        if bias is None:
            bias = _window_bias(block, rows, past, window, window_start, kv.device)
            if window_start is None:
                inner[alike] = bias
        if entries == 0:
            yield Sight(block, rows, slice(0, 0), _with_sink(bias), None)
        elif index is None:
            seen = visible_entries(start, end, block)
            yield Sight(block, rows, seen, _with_sink(bias, _range_bias(seen, start[:, block], end[:, block])), None)
        else:
            picks = index[:, block]
            seen = slice(int(picks.clamp_min(0).min()), int(picks.max()) + 1)
            if sharing_pays(seen.stop - seen.start, picks.shape[2], h):
                yield Sight(block, rows, seen, _with_sink(bias, _pick_bias(seen, picks, accumulation(kv))), None)
            else:
                yield Sight(block, rows, slice(0, 0), _with_sink(bias), picks)


def sharing_pays(entries: int, picks: int, heads: int) -> bool:
    """Masked scores over all entries against copying the picks: a copy serves all heads, so that many heads favour
    copying.
    """
    return entries <= picks * (1 + 28 / heads)


def _window_bias(block, rows, past, window, window_start, device) -> Tensor:
    """[b|1, t, rows]: a query at row r sees rows (r - window, r], none before its document."""
    own = torch.arange(past + block.start, past + block.stop, device=device).view(1, -1, 1)
    row = torch.arange(rows.start, rows.stop, device=device)
    hidden = (row > own) | (row <= own - window)
    if window_start is not None:
        hidden = hidden | (row < window_start[:, block, None])
    return torch.zeros((), device=device).masked_fill(hidden, NONE)


def _range_bias(seen, start, end) -> Tensor:
    entry = torch.arange(seen.start, seen.stop, device=start.device)
    hidden = (entry < start[..., None]) | (entry >= end[..., None])
    return torch.zeros((), device=start.device).masked_fill(hidden, NONE)


def _pick_bias(seen, picks, dtype) -> Tensor:
    """log of how often each entry was picked: -inf for never. Picks of -1 are counted in one column more, then cut
    off.
    """
    times = torch.zeros(*picks.shape[:2], seen.stop - seen.start + 1, dtype=dtype, device=picks.device)
    column = torch.where(picks < 0, times.shape[-1] - 1, picks - seen.start)
    times.scatter_add_(-1, column, torch.ones((), dtype=dtype, device=picks.device).expand(column.shape))
    return times[..., :-1].log_()


def _with_sink(*biases: Tensor) -> Tensor:
    """The biases side by side, and 0 for the sink."""
    b = max(bias.shape[0] for bias in biases)
    return F.pad(torch.cat([bias.expand(b, -1, -1) for bias in biases], -1), (0, 1))


def _shared_keys(sight, kv, compressed, broken) -> tuple[Tensor, Tensor | None]:
    """[b, l, d] in the accumulation dtype, the sink's zeros last; and which of them, [b, l], were not finite."""
    parts = [kv[:, sight.rows], compressed[:, sight.entries]] if compressed is not None else [kv[:, sight.rows]]
    keys = torch.cat([*parts, kv.new_zeros(kv.shape[0], 1, kv.shape[2])], 1).to(accumulation(kv))
    if broken is False or (broken is None and bool(keys.isfinite().all())):
        return keys, None
    return keys.nan_to_num(0, 0, 0), ~keys.isfinite().all(-1)


def _picked_keys(picks, compressed) -> Tensor:
    """[b, t, k, d] copies of the picked entries, zero for -1."""
    b, t, k = picks.shape
    rows = picks.clamp_min(0).view(b, t * k)
    picked = compressed.new_empty(b, t * k, compressed.shape[2])
    for entries, own, out in zip(compressed, rows, picked):
        torch.index_select(entries, 0, own, out=out)
    picked, nothing = picked.view(b, t, k, -1).to(accumulation(compressed)), picks < 0
    return picked.masked_fill_(nothing[..., None], 0) if bool(nothing.any()) else picked


def _scores(sight, q, keys, picked, sink) -> Tensor:
    """Logits [b, t, h, l] or, with picked keys, [b, t, h, l + k]; the sink's at l - 1; q already scaled."""
    b, t, h, d = q.shape
    scores = torch.bmm(q.reshape(b, t * h, d), keys.transpose(1, 2)).view(b, t, h, -1).add_(sight.bias[:, :, None])
    scores[..., -1] = sink
    if picked is None:
        return scores
    gathered = torch.matmul(q, picked.transpose(2, 3)).masked_fill_((sight.picks < 0)[:, :, None], NONE)
    return torch.cat([scores, gathered], -1)


def _forward_block(sight, q, kv, compressed, sink, broken) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a block; q already scaled."""
    block = q[:, sight.queries]
    b, t, h, d = block.shape
    keys, unsound = _shared_keys(sight, kv, compressed, broken)
    picked = None if sight.picks is None else _picked_keys(sight.picks, compressed)
    scores, l = _scores(sight, block, keys, picked, sink), keys.shape[1]
    p = scores.softmax(-1)
    out = torch.bmm(p[..., :l].reshape(b, t * h, l), keys).view(b, t, h, d)
    if picked is not None:
        out += torch.matmul(p[..., l:], picked)
    if unsound is not None:  # what is not finite reaches those who see it, and only them
        sees = (sight.bias > NONE) & unsound[:, None]
        out.masked_fill_(sees.any(-1)[:, :, None, None], math.nan)
    p_sink = p[..., l - 1]
    lse = sink - p_sink.log()
    faint = p_sink < FAINT
    return out, torch.where(faint, scores.amax(-1) - p.amax(-1).log(), lse) if bool(faint.any()) else lse


def _backward_block(sight, q, kv, compressed, sink, dout, delta, broken, dkv, dcompressed, dsink) -> Tensor:
    """Adds this block's part to dkv, dcompressed and dsink, in the order of the blocks; returns dq, scaled."""
    block, do, delta = q[:, sight.queries], dout[:, sight.queries], delta[:, sight.queries, :, None]
    b, t, h, d = block.shape
    keys, _ = _shared_keys(sight, kv, compressed, broken)
    picked = None if sight.picks is None else _picked_keys(sight.picks, compressed)
    p, l = _scores(sight, block, keys, picked, sink).softmax(-1), keys.shape[1]

    flat_q, flat_do, p_shared = block.reshape(b, t * h, d), do.reshape(b, t * h, d), p[..., :l].reshape(b, t * h, l)
    ds = torch.bmm(flat_do, keys.transpose(1, 2)).view(b, t, h, l).sub_(delta).view(b, t * h, l).mul_(p_shared)
    dq = torch.bmm(ds, keys).view(block.shape)
    dkeys = torch.bmm(p_shared.transpose(1, 2), flat_do).baddbmm_(ds.transpose(1, 2), flat_q)
    rows, entries = sight.rows.stop - sight.rows.start, sight.entries.stop - sight.entries.start
    dsink += ds[..., -1].view(b * t, h).sum(0)
    dkv[:, sight.rows] += dkeys[:, :rows]
    if entries:
        dcompressed[:, sight.entries] += dkeys[:, rows : rows + entries]
    if picked is not None:
        p = p[..., l:]
        ds = torch.matmul(do, picked.transpose(2, 3)).sub_(delta).mul_(p)
        dq += torch.matmul(ds, picked)
        dpicked = torch.matmul(p.transpose(2, 3), do) + torch.matmul(ds.transpose(2, 3), block)
        _scatter_add(dcompressed, dpicked, sight.picks)
    return dq


def _scatter_add(dcompressed, dpicked, picks) -> None:
    """Adds the copies' gradients to their entries; those of -1 go to one row more per sequence, which is cut off."""
    b, p, d = dcompressed.shape
    table = dcompressed.new_zeros(b * (p + 1), d)
    first = torch.arange(0, b * (p + 1), p + 1, device=picks.device).view(b, 1, 1)
    flat = torch.where(picks < 0, p, picks) + first
    table.index_add_(0, flat.flatten(), dpicked.reshape(-1, d))
    dcompressed += table.view(b, p + 1, d)[:, :p]
