"""The specification of `index_topk` in PyTorch: scores of one block of queries at a time, then an exact stable top-k.

b batch · t queries of the block · h index heads · d index head dim · p visible entries of the block · k picks
"""

import math

import torch
from torch import Tensor

from ..blocks import query_blocks, visible_entries
from ..precision import accumulation, without_autocast
from ..topk import stable_topk


@torch.no_grad()
def index_topk(q: Tensor, weights: Tensor, keys: Tensor, *, k: int, start: Tensor, end: Tensor) -> Tensor:
    b, t, h, _ = q.shape
    picks = torch.full((b, t, min(k, keys.shape[1])), -1, dtype=torch.int64, device=q.device)
    if picks.numel() == 0:
        return picks
    with without_autocast(q):
        for block in query_blocks(t, b * (h + 2) * keys.shape[1]):
            seen = visible_entries(start, end, block)
            first, last = start[:, block], end[:, block]
            if int((last - first).max()) <= picks.shape[2]:
                picks[:, block] = _all_visible(first, last, picks.shape[2])
            else:
                picks[:, block] = _best(q[:, block], weights[:, block], keys[:, seen], seen.start, first, last, k)
    return picks


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """I [b, t, p] in the accumulation dtype, heads added in their order."""
    exact = accumulation(q)
    q, weights, keys = q.to(exact), weights.to(exact), keys.to(exact).transpose(1, 2)
    scores = torch.bmm(q[:, :, 0], keys).relu_().mul_(weights[:, :, :1])
    for head in range(1, q.shape[2]):
        scores.addcmul_(torch.bmm(q[:, :, head], keys).relu_(), weights[:, :, head : head + 1])
    return scores


def hidden_entries(seen_start: int, entries: int, start: Tensor, end: Tensor) -> Tensor:
    """[b|1, t, p] True where entry seen_start + p lies outside [start, end)."""
    entry = torch.arange(seen_start, seen_start + entries, device=start.device)
    return (entry < start[..., None]) | (entry >= end[..., None])


def _hide(scores: Tensor, seen_start: int, start: Tensor, end: Tensor) -> None:
    """-inf where an entry is not visible: only entries that some query of the block does not see are looked at."""
    early, late = int(start.max()) - seen_start, int(end.min()) - seen_start
    if early > late:
        early = late = scores.shape[-1]
    for part, first in ((scores[..., :early], seen_start), (scores[..., late:], seen_start + late)):
        if part.shape[-1]:
            part.masked_fill_(hidden_entries(first, part.shape[-1], start, end), -math.inf)


def _all_visible(start: Tensor, end: Tensor, k: int) -> Tensor:
    entry = start[..., None] + torch.arange(k, device=start.device)
    return torch.where(entry < end[..., None], entry, -1)


def _best(q, weights, keys, seen_start, start, end, k) -> Tensor:
    scores = index_scores(q, weights, keys)
    _hide(scores, seen_start, start, end)
    best = stable_topk(scores, k, ordered=False)
    surplus = torch.arange(k, device=q.device) >= (end - start)[..., None]  # fewer are visible than picked
    return _surplus_last(best + seen_start, start, end) if bool(surplus.any()) else best + seen_start


def _surplus_last(entry: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Visible entries first, ascending; the others become -1. A visible NaN score ranks with the hidden ones."""
    visible = (entry >= start[..., None]) & (entry < end[..., None])
    largest = torch.iinfo(entry.dtype).max
    entry = torch.where(visible, entry, largest).sort(-1).values
    return torch.where(entry == largest, -1, entry)
