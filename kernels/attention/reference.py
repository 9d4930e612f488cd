"""The specification of `attention` in PyTorch: blocks of queries, flash-style backward (spec B.11), memory linear in t.

With p_k the probabilities and D = <do, o>:  ds_k = p_k (<do, kv_k> - D),  dq = scale sum_k ds_k kv_k,
dkv_k = sum_th p_k do + scale ds_k q,  dsink = -sum_t p_sink D.

A block sees its keys in one of two ways. *Shared*: window rows and a contiguous range of entries, one matrix for all
queries of the block, hidden pairs masked. *Gathered*: each query's picks are copied out. A list of picks is looked at
as shared, with a mask, as long as that is cheaper than copying.

b batch · t queries of the block · h heads · d head dim · l shared keys · k picked entries
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import query_blocks, visible_entries
from ..precision import accumulation, without_autocast

NONE = -math.inf


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
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(*tensors, window, scale, window_start, start, end, index)
    return _forward(*tensors, window, scale, window_start, start, end, index)


def _forward(q, kv, compressed, sink, window, scale, window_start, start, end, index) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=accumulation(q), device=q.device)
    with without_autocast(q):
        for sight in _sights(q, kv, compressed, window, window_start, start, end, index):
            out[:, sight.queries], lse[:, sight.queries] = _forward_block(sight, q, kv, compressed, sink, scale)
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, compressed, sink, window, scale, window_start, start, end, index):
        out, lse = _forward(q, kv, compressed, sink, window, scale, window_start, start, end, index)
        ctx.save_for_backward(q, kv, compressed, sink, window_start, start, end, index, out, lse)
        ctx.window, ctx.scale = window, scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _dlse):
        q, kv, compressed, sink, window_start, start, end, index, out, lse = ctx.saved_tensors
        if dout is None:
            return (None,) * 10
        exact = accumulation(q)
        dq = torch.empty_like(q)
        dkv = torch.zeros(kv.shape, dtype=exact, device=kv.device)
        dcompressed = None if compressed is None else torch.zeros(compressed.shape, dtype=exact, device=kv.device)
        with without_autocast(q):
            delta = (dout.to(exact) * out.to(exact)).sum(-1)  # [b, t, h]
            for sight in _sights(q, kv, compressed, ctx.window, window_start, start, end, index):
                dq[:, sight.queries] = _backward_block(
                    sight, q, kv, compressed, dout, lse, delta, ctx.scale, dkv, dcompressed
                )
            p_sink = (sink.to(exact) - lse).exp().masked_fill(lse == NONE, 0)
            dsink = -(p_sink * delta).flatten(0, 1).sum(0).to(sink.dtype)
        dcompressed = None if dcompressed is None else dcompressed.to(compressed.dtype)
        return dq, dkv.to(kv.dtype), dcompressed, dsink, None, None, None, None, None, None


def _sights(q, kv, compressed, window, window_start, start, end, index) -> Iterator[Sight]:
    b, t, h, _ = q.shape
    past = kv.shape[1] - t
    entries = 0 if compressed is None else compressed.shape[1]
    gathers = index is not None and not sharing_pays(entries, index.shape[2], h)
    per_query = b * h * (2 * window + (index.shape[2] if gathers else entries))
    for block in query_blocks(t, per_query):
        rows = slice(max(0, past + block.start - window + 1), past + block.stop)
        bias = _window_bias(block, rows, past, window, window_start, kv.device)
        if entries == 0:
            yield Sight(block, rows, slice(0, 0), bias, None)
        elif index is None:
            seen = visible_entries(start, end, block)
            yield Sight(block, rows, seen, _join(bias, _range_bias(seen, start[:, block], end[:, block])), None)
        else:
            picks = index[:, block]
            seen = slice(int(picks.clamp_min(0).min()), int(picks.max()) + 1)
            if sharing_pays(seen.stop - seen.start, picks.shape[2], h):
                yield Sight(block, rows, seen, _join(bias, _pick_bias(seen, picks, accumulation(kv))), None)
            else:
                yield Sight(block, rows, slice(0, 0), bias, picks)


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


def _join(window_bias: Tensor, entry_bias: Tensor) -> Tensor:
    b = max(window_bias.shape[0], entry_bias.shape[0])
    return torch.cat([window_bias.expand(b, -1, -1), entry_bias.expand(b, -1, -1)], -1)


def _shared_keys(sight, kv, compressed) -> Tensor:
    """[b, l, d] in the accumulation dtype."""
    keys = kv[:, sight.rows]
    if sight.entries.stop > sight.entries.start:
        keys = torch.cat([keys, compressed[:, sight.entries]], 1)
    return keys.to(accumulation(kv))


def _picked_keys(picks, compressed) -> tuple[Tensor, Tensor]:
    """[b, t, k, d] copies and the flat row of each in a [b * (p + 1)] table whose last row per sequence, zero, stands
    for -1.
    """
    b, p, d = compressed.shape
    table = torch.cat([compressed, compressed.new_zeros(b, 1, d)], 1).to(accumulation(compressed)).view(-1, d)
    first = torch.arange(0, b * (p + 1), p + 1, device=picks.device).view(b, 1, 1)
    flat = torch.where(picks < 0, p, picks) + first
    return table.index_select(0, flat.flatten()).view(*picks.shape, d), flat


def _scores(sight, q, keys, picked) -> tuple[Tensor, Tensor | None]:
    """Shared [b, t, h, l] and gathered [b, t, h, k] logits; q already scaled."""
    b, t, h, d = q.shape
    shared = torch.bmm(q.reshape(b, t * h, d), keys.transpose(1, 2)).view(b, t, h, -1).add_(sight.bias[:, :, None])
    if picked is None:
        return shared, None
    gathered = torch.matmul(q, picked.transpose(2, 3))
    return shared, gathered.masked_fill_((sight.picks < 0)[:, :, None], NONE)


def _forward_block(sight, q, kv, compressed, sink, scale) -> tuple[Tensor, Tensor]:
    exact = accumulation(q)
    block = q[:, sight.queries].to(exact) * scale
    b, t, h, d = block.shape
    keys = _shared_keys(sight, kv, compressed)
    broken = not bool(keys.isfinite().all())
    clean = keys.nan_to_num(0, 0, 0) if broken else keys
    picked = None if sight.picks is None else _picked_keys(sight.picks, compressed)[0]
    shared, gathered = _scores(sight, block, clean, picked)
    sink = sink.to(exact).expand(b, t, h)
    top = torch.maximum(shared.amax(-1), sink)
    if gathered is not None:
        top = torch.maximum(top, gathered.amax(-1))
    top = top.masked_fill(top == NONE, 0)
    p = shared.sub_(top[..., None]).exp_()
    total = p.sum(-1) + torch.where(sink == top, 1.0, (sink - top).exp())
    out = torch.bmm(p.view(b, t * h, -1), clean).view(b, t, h, d)
    if gathered is not None:
        p = gathered.sub_(top[..., None]).exp_()
        total += p.sum(-1)
        out += torch.matmul(p, picked)
    out /= total.masked_fill(total == 0, 1)[..., None]
    if broken:  # a non-finite key may reach only those who see it, and 0 * nan is nan
        sees = (sight.bias > NONE) & ~keys.isfinite().all(-1)[:, None]
        out.masked_fill_(sees.any(-1)[:, :, None, None], math.nan)
    return out, top + total.log()


def _backward_block(sight, q, kv, compressed, dout, lse, delta, scale, dkv, dcompressed) -> Tensor:
    """Adds this block's part to dkv and dcompressed, in the order of the blocks, and returns dq of the block."""
    exact = accumulation(q)
    block, do = q[:, sight.queries].to(exact) * scale, dout[:, sight.queries].to(exact)
    b, t, h, d = block.shape
    lse = lse[:, sight.queries].masked_fill(lse[:, sight.queries] == NONE, 0)[..., None]
    delta = delta[:, sight.queries, :, None]
    keys = _shared_keys(sight, kv, compressed)
    if not bool(keys.isfinite().all()):
        keys = keys.nan_to_num(0, 0, 0)
    picked, flat = (None, None) if sight.picks is None else _picked_keys(sight.picks, compressed)
    shared, gathered = _scores(sight, block, keys, picked)

    flat_q, flat_do = block.reshape(b, t * h, d), do.reshape(b, t * h, d)
    p = shared.sub_(lse).exp_()
    ds = torch.bmm(flat_do, keys.transpose(1, 2)).view(p.shape).sub_(delta).mul_(p).view(b, t * h, -1)
    dq = torch.bmm(ds, keys).view(block.shape)
    dkeys = torch.bmm(p.view(b, t * h, -1).transpose(1, 2), flat_do).baddbmm_(ds.transpose(1, 2), flat_q)
    rows = sight.rows.stop - sight.rows.start
    dkv[:, sight.rows] += dkeys[:, :rows]
    if sight.entries.stop > sight.entries.start:
        dcompressed[:, sight.entries] += dkeys[:, rows:]
    if gathered is not None:
        p = gathered.sub_(lse).exp_()
        ds = torch.matmul(do, picked.transpose(2, 3)).sub_(delta).mul_(p)
        dq += torch.matmul(ds, picked)
        dpicked = torch.matmul(p.transpose(2, 3), do) + torch.matmul(ds.transpose(2, 3), block)
        _scatter_add(dcompressed, dpicked, flat)
    return dq.mul_(scale).to(q.dtype)


def _scatter_add(dcompressed, dpicked, flat) -> None:
    b, p, d = dcompressed.shape
    table = dcompressed.new_zeros(b * (p + 1), d)
    table.index_add_(0, flat.flatten(), dpicked.reshape(-1, d))
    dcompressed += table.view(b, p + 1, d)[:, :p]
