"""Attention in PyTorch, an engine: blocks of queries, flash-style backward (spec B.11), memory linear in t.

With p_k the probabilities and D = <do, o>:  ds_k = p_k (<do, kv_k> - D),  dq = scale sum_k ds_k kv_k,
dkv_k = sum_th p_k do + scale ds_k q,  dsink = sum_t ds_sink, where the sink is one more key of value 0 whose logit is
given: softmax, output and gradient need no other care for it.

A block sees its keys in one of two ways. *Shared*: window rows and a contiguous range of entries, one matrix for all
queries of the block, hidden pairs masked. *Gathered*: each query's picks are copied out. A list of picks is looked at
as shared, with a mask, as long as that is cheaper than copying.

b batch · t queries of the block · h heads · d head dim · s window rows · p entries · l shared keys and the sink
k picked entries
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import query_blocks, sharing_pays, visible_entries
from ..precision import accumulation, tracked, without_autocast

NONE = -math.inf
FINITE = 1e30  # stands for an infinite sink
TINY = 1e-30  # a probability of the sink too small to tell the log-sum-exp from


class Mask(NamedTuple):
    """Which keys queries see, as the arguments say; picks: `index`."""

    window: int
    window_start: Tensor | None
    start: Tensor | None
    end: Tensor | None
    picks: Tensor | None


class Keys(NamedTuple):
    """All keys, and whether any of them is not finite: such keys need care, because 0 * nan is nan. None: each block is
    to look itself, where blocks read a few of many entries.
    """

    kv: Tensor
    compressed: Tensor | None
    nonfinite: bool | None


class Block(NamedTuple):
    """A block of queries and the keys that it sees."""

    queries: slice
    rows: slice  # of kv
    entries: slice  # of compressed, shared by the block
    bias: Tensor  # [b|1, t, l] added to the scores: 0 visible, -inf hidden, log n for an entry picked n times
    picks: Tensor | None  # [b, t, k] gathered entries, -1 = none


class Sums(NamedTuple):
    """Gradients to which each block adds its part."""

    kv: Tensor
    compressed: Tensor | None
    sink: Tensor


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
    """See `kernels.attention.attention`."""
    mask = Mask(window, window_start, start, end, index)
    if tracked(q, kv, compressed, sink):
        return _Attention.apply(q, kv, compressed, sink, scale, *mask)
    if q.shape[1] == 1 and window_start is None:
        keys = _step_keys(kv, compressed, mask)
        if keys is not None:
            return _forward_step(q, keys, sink, scale)
    return _forward(q, kv, compressed, sink, scale, mask)


# one query per sequence ----------------------------------------------------------------------------------------------


def _step_keys(kv: Tensor, compressed: Tensor | None, mask: Mask) -> list[Tensor] | None:
    """What a single query of each sequence sees, [b, l, d] each; None if sequences see different numbers of entries."""
    rows = kv[:, -mask.window :]
    if compressed is None or not _visible(compressed, mask):
        return [rows]
    if mask.picks is not None:
        if int(mask.picks.min()) < 0:
            return None
        picked = [entries.index_select(0, own) for entries, own in zip(compressed, mask.picks[:, 0])]
        return [rows, torch.stack(picked)]
    assert mask.start is not None and mask.end is not None
    if mask.start.numel() > 1 or mask.end.numel() > 1:
        return None
    return [rows, compressed[:, max(int(mask.start), 0) : max(int(mask.end), 0)]]


def _forward_step(q: Tensor, keys: list[Tensor], sink: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one query per sequence that sees all the keys given: no mask, nothing copied."""
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


# all queries in blocks -----------------------------------------------------------------------------------------------


def _forward(
    q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, scale: float, mask: Mask
) -> tuple[Tensor, Tensor]:
    exact = accumulation(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=exact, device=q.device)
    with without_autocast(q):
        keys = _keys(q, kv, compressed, mask)
        q, sink = q.to(exact) * scale, sink.to(exact).clamp(-FINITE, FINITE)
        for block in _blocks(q, keys, mask):
            out[:, block.queries], lse[:, block.queries] = _forward_block(block, q, keys, sink)
        lse[lse.abs() >= FINITE] *= math.inf
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, scale: float, window: int,
        *bounds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = _forward(q, kv, compressed, sink, scale, Mask(window, *bounds))
        ctx.save_for_backward(q, kv, compressed, sink, out, *bounds)
        ctx.window, ctx.scale = window, scale
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 10
        q, kv, compressed, sink, out, *bounds = ctx.saved_tensors
        exact, mask = accumulation(q), Mask(ctx.window, *bounds)
        dq = torch.empty_like(q)
        sums = Sums(*(None if x is None else torch.zeros_like(x, dtype=exact) for x in (kv, compressed, sink)))
        with without_autocast(q):
            dout = dout.to(exact)
            delta = (dout * out.to(exact)).sum(-1)  # [b, t, h]
            scaled, sink_logits = q.to(exact) * ctx.scale, sink.to(exact).clamp(-FINITE, FINITE)
            keys = _keys(q, kv, compressed, mask)
            for block in _blocks(q, keys, mask):
                dq[:, block.queries] = _backward_block(block, scaled, keys, sink_logits, dout, delta, sums).mul_(
                    ctx.scale
                )
        grads = (None if s is None else s.to(x.dtype) for s, x in zip(sums, (kv, compressed, sink)))
        return dq, *grads, *(None,) * 6


# what a block sees ---------------------------------------------------------------------------------------------------


def _keys(q: Tensor, kv: Tensor, compressed: Tensor | None, mask: Mask) -> Keys:
    if _gathers(q, compressed, mask.picks):
        return Keys(kv, compressed, None)
    return Keys(kv, compressed, not all(bool(x.isfinite().all()) for x in (kv, compressed) if x is not None))


def _visible(compressed: Tensor | None, mask: Mask) -> int:
    """How many entries there are to see."""
    return 0 if compressed is None or (mask.picks is not None and mask.picks.shape[2] == 0) else compressed.shape[1]


def _gathers(q: Tensor, compressed: Tensor | None, index: Tensor | None) -> bool:
    """Whether blocks copy their picks, unless all of a block's happen to lie close together."""
    if compressed is None or index is None:
        return False
    return not sharing_pays(compressed.shape[1], index.shape[2], q.shape[2])


def _blocks(q: Tensor, keys: Keys, mask: Mask) -> Iterator[Block]:
    (b, t, h, _), (kv, compressed, _) = q.shape, keys
    past, entries = kv.shape[1] - t, _visible(compressed, mask)
    per_query = b * h * (2 * mask.window + entries)
    if mask.picks is not None and _gathers(q, compressed, mask.picks):  # the copies, too, are to stay in the cache
        k = mask.picks.shape[2]
        per_query = max(b * h * (2 * mask.window + k), b * k * kv.shape[2])
    inner: dict[tuple[int, int], Tensor] = {}  # blocks that lie alike in their window share a bias
    for queries in query_blocks(t, per_query, largest=max(64, 2 * mask.window)):
        rows = slice(max(0, past + queries.start - mask.window + 1), past + queries.stop)
        alike = (past + queries.start - rows.start, queries.stop - queries.start)
        bias = inner.get(alike)
        if bias is None:
            bias = _window_bias(queries, rows, past, mask, kv.device)
            if mask.window_start is None:
                inner[alike] = bias
        if entries:
            yield _with_entries(queries, rows, bias, keys, mask, h)
        else:
            yield Block(queries, rows, slice(0, 0), _with_sink(bias), None)


def _with_entries(queries: slice, rows: slice, bias: Tensor, keys: Keys, mask: Mask, heads: int) -> Block:
    """A block that sees window rows, of this bias, and entries."""
    if mask.picks is None:
        assert mask.start is not None and mask.end is not None
        start, end = (x[:, queries].clamp(0, _visible(keys.compressed, mask)) for x in (mask.start, mask.end))
        seen = visible_entries(start, end, slice(None))
        bias = _with_sink(bias, _range_bias(seen, start, end))
        return Block(queries, rows, seen, bias, None)
    picks = mask.picks[:, queries]
    seen = slice(int(picks.clamp_min(0).min()), int(picks.max()) + 1)
    if sharing_pays(seen.stop - seen.start, picks.shape[2], heads):
        bias = _with_sink(bias, _pick_bias(seen, picks, accumulation(keys.kv)))
        return Block(queries, rows, seen, bias, None)
    return Block(queries, rows, slice(0, 0), _with_sink(bias), picks)


def _window_bias(queries: slice, rows: slice, past: int, mask: Mask, device: torch.device) -> Tensor:
    """[b|1, t, rows]: a query at row r sees rows (r - window, r], none before its document."""
    own = torch.arange(past + queries.start, past + queries.stop, device=device).view(1, -1, 1)
    row = torch.arange(rows.start, rows.stop, device=device)
    hidden = (row > own) | (row <= own - mask.window)
    if mask.window_start is not None:
        hidden = hidden | (row < mask.window_start[:, queries, None])
    return torch.zeros((), device=device).masked_fill(hidden, NONE)


def _range_bias(seen: slice, start: Tensor, end: Tensor) -> Tensor:
    """[b|1, t, entries seen]."""
    entry = torch.arange(seen.start, seen.stop, device=start.device)
    hidden = (entry < start[..., None]) | (entry >= end[..., None])
    return torch.zeros((), device=start.device).masked_fill(hidden, NONE)


def _pick_bias(seen: slice, picks: Tensor, dtype: torch.dtype) -> Tensor:
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


# blocks --------------------------------------------------------------------------------------------------------------


def _shared_keys(block: Block, keys: Keys) -> tuple[Tensor, Tensor | None]:
    """[b, l, d] in the accumulation dtype, the sink's zeros last; and which of them, [b, l], were not finite."""
    kv, compressed, nonfinite = keys
    parts = [kv[:, block.rows]] if compressed is None else [kv[:, block.rows], compressed[:, block.entries]]
    shared = torch.cat([*parts, kv.new_zeros(kv.shape[0], 1, kv.shape[2])], 1).to(accumulation(kv))
    if nonfinite is False or (nonfinite is None and bool(shared.isfinite().all())):
        return shared, None
    return shared.nan_to_num(0, 0, 0), ~shared.isfinite().all(-1)


def _picked_keys(block: Block, keys: Keys) -> Tensor | None:
    """[b, t, k, d] copies of the picked entries, zero for -1; None if there are no picks."""
    picks, compressed = block.picks, keys.compressed
    if picks is None or compressed is None:
        return None
    b, t, k = picks.shape
    rows = picks.clamp_min(0).view(b, t * k)
    picked = compressed.new_empty(b, t * k, compressed.shape[2])
    for entries, own, out in zip(compressed, rows, picked):
        torch.index_select(entries, 0, own, out=out)
    picked, nothing = picked.view(b, t, k, -1).to(accumulation(compressed)), picks < 0
    return picked.masked_fill_(nothing[..., None], 0) if bool(nothing.any()) else picked


def _scores(block: Block, q: Tensor, shared: Tensor, picked: Tensor | None, sink: Tensor) -> Tensor:
    """Logits [b, t, h, l] or, with picked keys, [b, t, h, l + k]; the sink's at l - 1; q already scaled."""
    b, t, h, d = q.shape
    scores = torch.bmm(q.reshape(b, t * h, d), shared.transpose(1, 2)).view(b, t, h, -1).add_(block.bias[:, :, None])
    scores[..., -1] = sink
    if picked is None or block.picks is None:
        return scores
    gathered = torch.matmul(q, picked.transpose(2, 3)).masked_fill_((block.picks < 0)[:, :, None], NONE)
    return torch.cat([scores, gathered], -1)


def _forward_block(block: Block, q: Tensor, keys: Keys, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a block; q already scaled."""
    q = q[:, block.queries]
    b, t, h, d = q.shape
    shared, nonfinite = _shared_keys(block, keys)
    picked = _picked_keys(block, keys)
    scores, l = _scores(block, q, shared, picked, sink), shared.shape[1]
    p = scores.softmax(-1)
    out = torch.bmm(p[..., :l].reshape(b, t * h, l), shared).view(b, t, h, d)
    if picked is not None:
        out += torch.matmul(p[..., l:], picked)
    if nonfinite is not None:  # what is not finite reaches those who see it, and only them
        sees = (block.bias > NONE) & nonfinite[:, None]
        out.masked_fill_(sees.any(-1)[:, :, None, None], math.nan)
    p_sink = p[..., l - 1]
    lse = sink - p_sink.log()
    tiny = p_sink < TINY
    return out, torch.where(tiny, scores.amax(-1) - p.amax(-1).log(), lse) if bool(tiny.any()) else lse


def _backward_block(
    block: Block, q: Tensor, keys: Keys, sink: Tensor, dout: Tensor, delta: Tensor, sums: Sums
) -> Tensor:
    """Adds this block's part to the sums, in the order of the blocks; returns dq, scaled."""
    q, do, delta = q[:, block.queries], dout[:, block.queries], delta[:, block.queries, :, None]
    b, t, h, d = q.shape
    shared, _ = _shared_keys(block, keys)
    picked = _picked_keys(block, keys)
    p, l = _scores(block, q, shared, picked, sink).softmax(-1), shared.shape[1]

    flat_q, flat_do, p_shared = q.reshape(b, t * h, d), do.reshape(b, t * h, d), p[..., :l].reshape(b, t * h, l)
    ds = torch.bmm(flat_do, shared.transpose(1, 2)).view(b, t, h, l).sub_(delta).view(b, t * h, l).mul_(p_shared)
    dq = torch.bmm(ds, shared).view(q.shape)
    dshared = torch.bmm(p_shared.transpose(1, 2), flat_do).baddbmm_(ds.transpose(1, 2), flat_q)
    rows, entries = block.rows.stop - block.rows.start, block.entries.stop - block.entries.start
    sums.sink.add_(ds[..., -1].view(b * t, h).sum(0))
    sums.kv[:, block.rows] += dshared[:, :rows]
    if sums.compressed is None:
        return dq
    if entries:
        sums.compressed[:, block.entries] += dshared[:, rows : rows + entries]
    if picked is not None and block.picks is not None:
        p = p[..., l:]
        ds = torch.matmul(do, picked.transpose(2, 3)).sub_(delta).mul_(p)
        dq += torch.matmul(ds, picked)
        dpicked = torch.matmul(p.transpose(2, 3), do) + torch.matmul(ds.transpose(2, 3), q)
        _scatter_add(sums.compressed, dpicked, block.picks)
    return dq


def _scatter_add(dcompressed: Tensor, dpicked: Tensor, picks: Tensor) -> None:
    """Adds the copies' gradients to their entries; those of -1 go to one row more per sequence, which is cut off."""
    b, p, d = dcompressed.shape
    table = dcompressed.new_zeros(b * (p + 1), d)
    first = torch.arange(0, b * (p + 1), p + 1, device=picks.device).view(b, 1, 1)
    flat = torch.where(picks < 0, p, picks) + first
    table.index_add_(0, flat.flatten(), dpicked.reshape(-1, d))
    dcompressed += table.view(b, p + 1, d)[:, :p]
