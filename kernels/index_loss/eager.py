"""`index_loss` in PyTorch, an engine: teacher, student and gradient of one block of queries at a time.

The loss is a scalar, so that its gradient is known as soon as its value is: dI_s = (softmax(I)_s - p_s) / queries. It
is computed in the forward pass and only scaled in the backward pass; nothing of size t x p is kept. As in `attention`,
a block looks at its entries as shared by all its queries (with a mask) or, where that is cheaper, at a copy of each
query's picks.

b batch · t queries of the block · h attention heads · d head dim · i index heads · e index head dim
p entries · s entries looked at · k picks
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blocks import hidden_entries, query_blocks, sharing_pays, visible_entries
from ..precision import accumulation, without_autocast
from .reference import FLOOR, measured_queries


class Gradients(NamedTuple):
    """Of the index queries [b, t, i, e], weights [b, t, i] and keys [b, s, e], copied ones [b, t, s, e]."""

    q: Tensor
    weights: Tensor
    keys: Tensor


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
    """See `kernels.index_loss.index_loss`."""
    student, teacher = (index_q, index_weights, index_keys), (q.detach(), compressed.detach(), lse.detach())
    return _IndexLoss.apply(*student, *teacher, scale, start, end, index)


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, index_weights: Tensor, index_keys: Tensor,
        q: Tensor, compressed: Tensor, lse: Tensor, scale: float, start: Tensor, end: Tensor, index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        student, exact = (index_q, index_weights, index_keys), accumulation(q)
        (b, t, h, _), entries, i = q.shape, compressed.shape[1], index_q.shape[2]
        wanted = any(ctx.needs_input_grad[:3])
        total = Gradients(*(torch.zeros(x.shape, dtype=exact, device=x.device) for x in student))
        loss, share, measured = (torch.zeros((), dtype=exact, device=q.device) for _ in range(3))
        shared = index is None or sharing_pays(entries, index.shape[2], h + i)
        looked_at = entries if index is None or shared else index.shape[2]
        with without_autocast(q):
            for block in query_blocks(t, b * (h + 2 * i) * looked_at):
                seen = visible_entries(start, end, block)
                if seen.stop == seen.start:
                    continue
                hidden = hidden_entries(seen, start[:, block], end[:, block]).expand(b, -1, -1)
                keys, c, copied = index_keys[:, seen], compressed[:, seen], None
                if index is not None:
                    picks = index[:, block]
                    unpicked = _not_picked(picks, seen)
                    few = [n - block.start for n in range(t)[measured_queries(t)] if block.start <= n < block.stop]
                    if few:
                        mass = _attention_mass(q[:, block][:, few], c, lse[:, block][:, few], scale)
                        shares, reading = _picked_shares(mass, hidden[:, few], unpicked[:, few])
                        share += shares
                        measured += reading
                    hidden = hidden | unpicked
                    if not shared:
                        hidden, copied = picks < 0, _flat_rows(picks, entries)
                        keys, c = (x.flatten(0, 1)[copied] for x in (index_keys, compressed))
                teacher = _attention_mass(q[:, block], c, lse[:, block], scale).masked_fill_(hidden, 0)
                part, grads = _divergence(teacher, hidden, index_q[:, block], index_weights[:, block], keys, wanted)
                loss += part
                if grads is None:
                    continue
                total.q[:, block], total.weights[:, block] = grads.q, grads.weights
                if copied is None:
                    total.keys[:, seen] += grads.keys
                else:
                    total.keys.flatten(0, 1).index_add_(0, copied.flatten(), grads.keys.flatten(0, 2))
        queries = (end > start).expand(b, t).sum().clamp_min(1)
        ctx.dtypes = [x.dtype for x in student]
        ctx.save_for_backward(*(g.div_(queries) for g in total))
        share = torch.ones_like(loss) if index is None else share / measured.clamp_min(1)
        ctx.mark_non_differentiable(share)
        return loss / queries, share

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dshare: Tensor) -> tuple[Tensor | None, ...]:
        grads = [(g * dloss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return (*grads, None, None, None, None, None, None, None)


def _not_picked(picks: Tensor, seen: slice) -> Tensor:
    """[b, t, s] True for the entries of the range that no pick names; picks of -1 mark a column that is cut off."""
    entries = seen.stop - seen.start
    marks = torch.ones(*picks.shape[:2], entries + 1, dtype=torch.bool, device=picks.device)
    return marks.scatter_(-1, torch.where(picks < 0, entries, picks - seen.start), False)[..., :entries]


def _picked_shares(mass: Tensor, hidden: Tensor, unpicked: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [b, t, s]: the sum of their shares, and how many of them read any entry."""
    mass = mass.masked_fill_(hidden, 0)
    visible, picked = mass.sum(-1), mass.masked_fill(unpicked, 0).sum(-1)
    reading = visible > FLOOR
    return torch.where(reading, picked / visible, 0).sum(), reading.sum()


def _flat_rows(picks: Tensor, entries: int) -> Tensor:
    """Rows of [b * p, ..] for picks [b, t, k]; row 0 for -1."""
    first = torch.arange(0, picks.shape[0] * entries, entries, device=picks.device).view(-1, 1, 1)
    return torch.where(picks < 0, 0, picks + first)


def _logits(q: Tensor, keys: Tensor) -> Tensor:
    """[b, t, h, s] products with shared [b, s, d] or gathered [b, t, s, d] keys."""
    b, t, h, d = q.shape
    if keys.ndim == 4:
        return torch.matmul(q, keys.transpose(2, 3))
    return torch.bmm(q.reshape(b, t * h, d), keys.transpose(1, 2)).view(b, t, h, -1)


def _attention_mass(q: Tensor, compressed: Tensor, lse: Tensor, scale: float) -> Tensor:
    """sum_h exp(scale <q_h, c_s> - lse_h), [b, t, s]."""
    exact = accumulation(q)
    return _logits(q.to(exact) * scale, compressed.to(exact)).sub_(lse[..., None]).exp_().sum(2)


def _divergence(
    teacher: Tensor, hidden: Tensor, q: Tensor, weights: Tensor, keys: Tensor, wanted: bool
) -> tuple[Tensor, Gradients | None]:
    """sum over queries of KL(teacher / sum teacher || softmax(I)), and its gradients."""
    exact = accumulation(q)
    b, t, i, e = q.shape
    q, weights, keys = q.to(exact), weights.to(exact), keys.to(exact)
    mass = teacher.sum(-1, keepdim=True)
    valid = mass > FLOOR
    teacher = teacher / mass.clamp_min(FLOOR)
    hits = _logits(q, keys).relu_()
    scores = torch.matmul(weights[:, :, None], hits).squeeze(2)
    log_student = scores.masked_fill(hidden, -math.inf).log_softmax(-1).masked_fill(hidden | ~valid, 0)
    loss = (torch.xlogy(teacher, teacher) - teacher * log_student).masked_fill(~valid, 0).sum()
    if not wanted:
        return loss, None
    dscores = (log_student.exp() - teacher).masked_fill(hidden | ~valid, 0)  # [b, t, s]
    dweights = torch.matmul(hits, dscores[..., None]).squeeze(-1)
    dhits = hits.sign_().mul_(weights[..., None]).mul_(dscores[:, :, None])  # hits are 0 where the ReLU is shut
    if keys.ndim == 4:
        return loss, Gradients(torch.matmul(dhits, keys), dweights, torch.matmul(dhits.transpose(2, 3), q))
    dhits = dhits.view(b, t * i, -1)
    dq = torch.bmm(dhits, keys).view(b, t, i, e)
    return loss, Gradients(dq, dweights, torch.bmm(dhits.transpose(1, 2), q.reshape(b, t * i, e)))
