"""The definition of `index_topk`, against which every engine is held: all scores at once, and a stable sort.

b batch · t queries · h index heads · d index head dim · p compressed entries · k picks
"""

import math

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast


@torch.no_grad()
def index_topk(q: Tensor, weights: Tensor, keys: Tensor, *, k: int, start: Tensor, end: Tensor) -> Tensor:
    """Best first, ties by entry; NaN and -inf rank below all numbers, hidden entries below these."""
    with without_autocast(q):
        q, weights, keys = (x.to(accumulation(q)) for x in (q, weights, keys))
        hits = torch.einsum("bthd,bpd->bthp", q, keys).relu()
        scores = torch.einsum("bth,bthp->btp", weights, hits)
    entries = scores.shape[2]
    entry, lowest = torch.arange(entries, device=q.device), torch.finfo(scores.dtype).min
    seen = ((entry >= start[..., None]) & (entry < end[..., None])).expand_as(scores)
    ranked = scores.nan_to_num(nan=lowest, posinf=math.inf, neginf=lowest).masked_fill(~seen, -math.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    best = best.masked_fill(~seen.gather(2, best), entries).sort(-1).values
    return best.masked_fill(best == entries, -1)
