"""The definition of attention, which every engine is held against: all keys at once, differentiated by autograd.

b batch · t queries · h query heads · d head dim · s window rows · p compressed entries · l = s + p keys
"""

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast

LARGE = 1e30  # an infinite sink is the limit of a large one


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
    (b, t), s, dtype = q.shape[:2], kv.shape[1], accumulation(q)
    row = torch.arange(s, device=q.device)
    own = row[s - t :, None]
    times = (row <= own) & (row > own - window)  # how often a query sees a key
    if window_start is not None:
        times = times & (row >= window_start[..., None])
    times, keys = times.expand(b, t, s), kv
    if compressed is not None:
        entry = torch.arange(compressed.shape[1], device=q.device)
        if index is not None:
            seen = (index[..., None] == entry).sum(2)
        else:
            assert start is not None and end is not None
            seen = (entry >= start[..., None]) & (entry < end[..., None])
        times = torch.cat([times, seen.expand(b, t, -1)], -1)
        keys = torch.cat([kv, compressed], 1)
    with without_autocast(q):
        keys = keys.to(dtype)
        scores = scale * torch.einsum("bthd,bld->bthl", q.to(dtype), keys) + times.to(dtype).log()[:, :, None]
        sinks = sink.to(dtype).clamp(-LARGE, LARGE)[:, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
        out = torch.einsum("bthl,bld->bthd", scores.softmax(-1)[..., :-1], keys)
    return out.to(q.dtype), scores.logsumexp(-1).detach()
