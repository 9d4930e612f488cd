"""The specification of `index_loss` in PyTorch: teacher, student and gradient of one block of queries at a time.

The loss is a scalar, so that its gradient is known as soon as its value is: dI_s = (softmax(I)_s - p_s) / queries. It is
computed in the forward pass and only scaled in the backward pass; nothing of size t x p is kept.

b batch · t queries of the block · h attention heads · d head dim · i index heads · e index head dim · s entries looked at
"""

import math

import torch
from torch import Tensor

from ..blocks import query_blocks, visible_entries
from ..index_topk.reference import hidden_entries
from ..precision import accumulation, without_autocast

FLOOR = 1e-10  # of a query's attention mass on the entries, below which the teacher says nothing


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
    return _IndexLoss.apply(
        index_q, index_weights, index_keys, q.detach(), compressed.detach(), lse.detach(), scale, start, end, index
    )


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_weights, index_keys, q, compressed, lse, scale, start, end, index):
        exact = accumulation(q)
        b, t, h, _ = q.shape
        wanted = any(ctx.needs_input_grad[:3])
        grads = [torch.zeros(x.shape, dtype=exact, device=x.device) for x in (index_q, index_weights, index_keys)]
        loss = torch.zeros((), dtype=exact, device=q.device)
        share = torch.zeros((2,), dtype=exact, device=q.device)
        seeing = (end > start).expand(b, t)
        queries = seeing.sum().clamp_min(1)
        with without_autocast(q):
            for block in query_blocks(t, b * (h + 2 * index_q.shape[2]) * compressed.shape[1]):
                seen = visible_entries(start, end, block)
                if seen.stop == seen.start:
                    continue
                first, last = start[:, block], end[:, block]
                hidden = hidden_entries(seen.start, seen.stop - seen.start, first, last).expand(b, -1, -1)
                teacher = _attention_mass(q[:, block], compressed[:, seen], lse[:, block], scale, hidden)
                if index is not None:
                    unpicked = hidden | _not_picked(index[:, block], seen)
                    mass = teacher.sum(-1)
                    teacher = teacher.masked_fill(unpicked, 0)
                    heavy = mass > FLOOR
                    share += torch.stack([(teacher.sum(-1) / mass.clamp_min(FLOOR) * heavy).sum(), heavy.sum()])
                    hidden = unpicked
                mass = teacher.sum(-1, keepdim=True)
                teacher = teacher / mass.clamp_min(FLOOR)
                valid = (mass > FLOOR) & seeing[:, block, None]
                student = (index_q[:, block], index_weights[:, block], index_keys[:, seen])
                part, derived = _divergence(teacher, hidden, valid, *student, wanted)
                loss += part
                if wanted:
                    grads[0][:, block], grads[1][:, block] = derived[0], derived[1]
                    grads[2][:, seen] += derived[2]
        ctx.inputs = [x.dtype for x in (index_q, index_weights, index_keys)]
        ctx.save_for_backward(*(g.div_(queries) for g in grads))
        captured = torch.ones_like(loss) if index is None else share[0] / share[1].clamp_min(1)
        ctx.mark_non_differentiable(captured)
        return (loss / queries).to(exact), captured

    @staticmethod
    def backward(ctx, dloss, _dshare):
        grads = [(g * dloss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.inputs)]
        return (*grads, None, None, None, None, None, None, None)


def _attention_mass(q, compressed, lse, scale, hidden) -> Tensor:
    """sum_h exp(scale <q_h, c_s> - lse_h), [b, t, s], 0 where hidden."""
    exact = accumulation(q)
    b, t, h, d = q.shape
    keys = compressed.to(exact).transpose(1, 2)
    q = q.to(exact) * scale
    mass = torch.bmm(q[:, :, 0], keys).sub_(lse[:, :, :1]).exp_()
    for head in range(1, h):
        mass += torch.bmm(q[:, :, head], keys).sub_(lse[:, :, head : head + 1]).exp_()
    return mass.masked_fill_(hidden, 0)


def _not_picked(index, seen) -> Tensor:
    """[b, t, s] True for the entries of the range that no pick names; picks of -1 mark a column that is cut off."""
    entries = seen.stop - seen.start
    marks = torch.ones(*index.shape[:2], entries + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(-1, torch.where(index < 0, entries, index - seen.start), False)[..., :entries]


def _divergence(teacher, hidden, valid, q, weights, keys, wanted) -> tuple[Tensor, tuple[Tensor, ...]]:
    """sum over queries of KL(teacher || softmax(I)), and its gradients with respect to q, weights and keys."""
    exact = accumulation(q)
    b, t, i, e = q.shape
    q, weights, keys = q.to(exact), weights.to(exact), keys.to(exact)
    hits = torch.bmm(q.reshape(b, t * i, e), keys.transpose(1, 2)).view(b, t, i, -1).relu_()
    scores = torch.matmul(weights[:, :, None], hits).squeeze(2)
    log_student = scores.masked_fill(hidden, -math.inf).log_softmax(-1)
    log_student = log_student.masked_fill(hidden, 0)
    loss = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1, keepdim=True).masked_fill(~valid, 0).sum()
    if not wanted:
        return loss, ()
    dscores = (log_student.exp().masked_fill(hidden, 0) - teacher).masked_fill(~valid, 0)  # [b, t, s]
    dweights = torch.matmul(hits, dscores[..., None]).squeeze(-1)
    dhits = hits.sign_().mul_(weights[..., None]).mul_(dscores[:, :, None])  # hits are 0 where the ReLU is shut
    dq = torch.matmul(dhits.view(b, t * i, -1), keys).view(b, t, i, e)
    dkeys = torch.bmm(dhits.view(b, t * i, -1).transpose(1, 2), q.reshape(b, t * i, e))
    return loss, (dq, dweights, dkeys)
