"""The definition of `index_loss`, against which every engine is held: all pairs at once, differentiated by autograd.

b batch · t queries · h attention heads · d head dim · i index heads · e index head dim · p entries · k picks
"""

import math

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast

FLOOR = 1e-10  # of a query's attention mass on the entries compared: at or below it, the teacher says nothing
MEASURED = 32  # queries of a sequence on which the share is measured, at most


def measured_queries(t: int) -> slice:
    """The queries on which the share is measured: the last one, and before it every so many-th."""
    stride = max(-(-t // MEASURED), 1)
    return slice((t - 1) % stride, t, stride)


def index_loss(
    index_q: Tensor,
    index_weights: Tensor,
    index_keys: Tensor,
    q: Tensor,
    compressed: Tensor,
    lse: Tensor,
    *,
    scale: float,
    start: Tensor,
    end: Tensor,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL of the student from the teacher over the entries compared, and the share of the visible mass on the picks."""
    exact, entry = accumulation(q), torch.arange(compressed.shape[1], device=q.device)
    seen = ((entry >= start[..., None]) & (entry < end[..., None])).expand(*q.shape[:2], -1)  # [b, t, p]
    compared = seen if index is None else seen & (index[..., None] == entry).any(2)
    with without_autocast(q):
        q, compressed, lse = (x.detach().to(exact) for x in (q, compressed, lse))
        logits = scale * torch.einsum("bthd,bpd->bthp", q, compressed)
        mass = (logits - lse[..., None]).exp().sum(2).masked_fill(~seen, 0)
        hits = torch.einsum("btie,bpe->btip", index_q.to(exact), index_keys.to(exact)).relu()
        scores = torch.einsum("bti,btip->btp", index_weights.to(exact), hits)
    total = (mass * compared).sum(-1, keepdim=True)
    reads = total > FLOOR
    teacher = torch.where(reads & compared, mass / total, 0)
    student = scores.masked_fill(~compared, -math.inf).log_softmax(-1).masked_fill(~(reads & compared), 0)
    queries = (end > start).expand(*q.shape[:2]).sum().clamp_min(1)
    loss = (torch.xlogy(teacher, teacher) - teacher * student).sum() / queries
    if index is None:
        return loss, torch.ones_like(loss)
    picked, visible = (x[:, measured_queries(q.shape[1])] for x in (total[..., 0], mass.sum(-1)))
    return loss, torch.where(visible > FLOOR, picked / visible, 0).sum() / (visible > FLOOR).sum().clamp_min(1)
