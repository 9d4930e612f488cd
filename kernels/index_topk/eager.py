"""`index_topk` in PyTorch, an engine: scores of one block of queries at a time, then an exact stable top-k.

Scores are made a tile of entries at a time, all heads together: the passes over a tile stay in the cache, and a key is
read from memory once per block.

b batch · t queries of the block · h index heads · d index head dim · p visible entries of the block · k picks
"""

import math

import torch
from torch import Tensor

from ..blocks import hidden_entries, outside, query_blocks, visible_entries
from ..precision import accumulation, without_autocast
from ..topk import stable_topk

KEPT = 8  # a block's scores may take that many times the memory of what is to stay in the cache
TILE = 1 << 18  # hits of one tile, all heads and queries: 1 MiB in float32
WIDEST, NARROWEST = 1 << 14, 32  # entries of a tile


@torch.no_grad()
def index_topk(q: Tensor, weights: Tensor, keys: Tensor, *, k: int, start: Tensor, end: Tensor) -> Tensor:
    """See `kernels.index_topk.index_topk`."""
    b, t = q.shape[:2]
    if t == 1 and start.numel() == end.numel() == 1:
        return _step(q, weights, keys, k, start, end)
    picks = torch.full((b, t, min(k, keys.shape[1])), -1, dtype=torch.int64, device=q.device)
    if picks.numel() == 0:
        return picks
    with without_autocast(q):
        buffer = None
        for block in query_blocks(t, b * keys.shape[1] // KEPT):
            seen = visible_entries(start, end, block)
            first, last = start[:, block], end[:, block]
            if int((last - first).max()) <= picks.shape[2]:
                picks[:, block] = _all_visible(first, last, picks.shape[2])
                continue
            if buffer is None:  # no block is longer than the first
                size = b * (block.stop - block.start) * keys.shape[1]
                buffer = torch.empty(size, dtype=accumulation(q), device=q.device)
            scores = buffer[: b * (block.stop - block.start) * (seen.stop - seen.start)].view(
                b, -1, seen.stop - seen.start
            )
            index_scores(q[:, block], weights[:, block], keys[:, seen], scores)
            picks[:, block] = _best(scores, seen.start, first, last, k)
    return picks


def _step(q: Tensor, weights: Tensor, keys: Tensor, k: int, start: Tensor, end: Tensor) -> Tensor:
    """One query per row, all with the same range."""
    first, last = int(start), int(end)
    if last - first <= k:
        return _all_visible(start, end, min(k, keys.shape[1])).expand(len(q), 1, -1)
    with without_autocast(q):
        scores = index_scores(q, weights, keys[:, first:last])
    return stable_topk(scores, k, ordered=False) + first


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, out: Tensor | None = None) -> Tensor:
    """I [b, t, p] in the accumulation dtype, heads added in their order; written to `out` if given."""
    exact = accumulation(q)
    b, t, h, d = q.shape
    out = torch.empty(b, t, keys.shape[1], dtype=exact, device=q.device) if out is None else out
    rows = q.to(exact).transpose(1, 2).reshape(b, h * t, d)
    weights = weights.to(exact)
    size = max(NARROWEST, min(WIDEST, TILE // max(b * h * t, 1)))
    for first in range(0, keys.shape[1], size):
        tile = slice(first, first + size)
        hits = torch.bmm(rows, keys[:, tile].to(exact).transpose(1, 2)).relu_().view(b, h, t, -1)
        scores = torch.mul(hits[:, 0], weights[:, :, :1], out=out[..., tile])
        for head in range(1, h):
            scores.addcmul_(hits[:, head], weights[:, :, head : head + 1])
    return out


def _hide(scores: Tensor, seen_start: int, start: Tensor, end: Tensor) -> None:
    """-inf where an entry is not visible: only entries that some query of the block does not see are looked at."""
    stop = seen_start + scores.shape[-1]
    early, late = int(start.max()), int(end.min())
    if early > late:
        early = late = stop
    for part in (slice(seen_start, early), slice(late, stop)):
        if part.start < part.stop:
            hidden = hidden_entries(part, start, end)
            scores[..., part.start - seen_start : part.stop - seen_start].masked_fill_(hidden, -math.inf)


def _all_visible(start: Tensor, end: Tensor, k: int) -> Tensor:
    entry = start[..., None] + torch.arange(k, device=start.device)
    return torch.where(entry < end[..., None], entry, -1)


def _best(scores: Tensor, seen_start: int, start: Tensor, end: Tensor, k: int) -> Tensor:
    _hide(scores, seen_start, start, end)
    best = stable_topk(scores, k, ordered=False) + seen_start
    missing = outside(best, start, end)
    if not bool(missing.any()):
        return best
    if bool((missing.sum(-1) > (k - (end - start).clamp_min(0)).clamp_min(0)).any()):
        # a visible score of NaN or -inf ranked with the hidden ones
        lowest = torch.finfo(scores.dtype).min
        return _best(scores.nan_to_num_(nan=lowest, posinf=math.inf, neginf=lowest), seen_start, start, end, k)
    largest = torch.iinfo(best.dtype).max
    best = best.masked_fill_(missing, largest).sort(-1).values  # visible entries first, ascending
    return best.masked_fill_(best == largest, -1)
