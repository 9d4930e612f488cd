"""The specification of `index_loss` in PyTorch: teacher, student and gradient of one block of queries at a time.

The loss is a scalar, so that its gradient is known as soon as its value is: dI_s = (softmax(I)_s - p_s) / queries. It
is computed in the forward pass and only scaled in the backward pass; nothing of size t x p is kept. As in `attention`,
a block looks at its entries as shared by all its queries (with a mask) or, where that is cheaper, at a copy of each
query's picks.

b batch · t queries of the block · h attention heads · d head dim · i index heads · e index head dim · s entries looked
at
"""

import math

import torch
from torch import Tensor

from ..attention.eager import sharing_pays
from ..blocks import query_blocks, visible_entries
from ..index_topk.eager import hidden_entries
from ..precision import accumulation, without_autocast

FLOOR = 1e-10  # of a query's attention mass on the entries, below which the teacher says nothing
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
    return _IndexLoss.apply(
        index_q, index_weights, index_keys, q.detach(), compressed.detach(), lse.detach(), scale, start, end, index
    )


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_weights, index_keys, q, compressed, lse, scale, start, end, index):
        exact = accumulation(q)
        b, t, h, _ = q.shape
        entries, i = compressed.shape[1], index_q.shape[2]
        wanted = any(ctx.needs_input_grad[:3])
        dq, dweights, dkeys = (
            torch.zeros(x.shape, dtype=exact, device=x.device) for x in (index_q, index_weights, index_keys)
        )
        loss, share, measured = (torch.zeros((), dtype=exact, device=q.device) for _ in range(3))
        queries = (end > start).expand(b, t).sum().clamp_min(1)
        shared = index is None or sharing_pays(entries, index.shape[2], h + i)
        with without_autocast(q):
            for block in query_blocks(t, b * (h + 2 * i) * (entries if shared else index.shape[2])):
                seen = visible_entries(start, end, block)
                if seen.stop == seen.start:
                    continue
                first, last = start[:, block], end[:, block]
                hidden = hidden_entries(seen.start, seen.stop - seen.start, first, last).expand(b, -1, -1)
                if index is not None:
                    unpicked = _not_picked(index[:, block], seen)
                    few = [n - block.start for n in range(t)[measured_queries(t)] if block.start <= n < block.stop]
                    if few:
                        mass = _attention_mass(q[:, block][:, few], compressed[:, seen], lse[:, block][:, few], scale)
                        mass = mass.masked_fill_(hidden[:, few], 0)
                        seeing = mass.sum(-1) > FLOOR
                        picked = mass.masked_fill(unpicked[:, few], 0).sum(-1)
                        share += (picked / mass.sum(-1).clamp_min(FLOOR) * seeing).sum()
                        measured += seeing.sum()
                    hidden = hidden | unpicked
                keys, c, flat = index_keys[:, seen], compressed[:, seen], None
                if not shared:
                    hidden = index[:, block] < 0
                    flat = _flat_rows(index[:, block], entries)
                    keys, c = (x.flatten(0, 1)[flat.clamp_min(0)] for x in (index_keys, compressed))
                teacher = _attention_mass(q[:, block], c, lse[:, block], scale).masked_fill_(hidden, 0)
                part, grads = _divergence(teacher, hidden, index_q[:, block], index_weights[:, block], keys, wanted)
                loss += part
                if wanted:
                    dq[:, block], dweights[:, block] = grads[:2]
                    if shared:
                        dkeys[:, seen] += grads[2]
                    else:
                        dkeys.flatten(0, 1).index_add_(0, flat.flatten().clamp_min(0), grads[2].flatten(0, 2))
        ctx.dtypes = [x.dtype for x in (index_q, index_weights, index_keys)]
        ctx.save_for_backward(*(g.div_(queries) for g in (dq, dweights, dkeys)))
        share = torch.ones_like(loss) if index is None else share / measured.clamp_min(1)
        ctx.mark_non_differentiable(share)
        return loss / queries, share

    @staticmethod
    def backward(ctx, dloss, _dshare):
        grads = [(g * dloss).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return (*grads, None, None, None, None, None, None, None)


def _not_picked(index, seen) -> Tensor:
    """[b, t, s] True for the entries of the range that no pick names; picks of -1 mark a column that is cut off."""
    entries = seen.stop - seen.start
    marks = torch.ones(*index.shape[:2], entries + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(-1, torch.where(index < 0, entries, index - seen.start), False)[..., :entries]


def _flat_rows(index, entries) -> Tensor:
    """Rows of [b * p, ..] for picks [b, t, k]; -1 stays -1."""
    first = torch.arange(0, index.shape[0] * entries, entries, device=index.device).view(-1, 1, 1)
    return torch.where(index < 0, -1, index + first)


def _logits(q, keys) -> Tensor:
    """[b, t, h, s] products with shared [b, s, d] or gathered [b, t, s, d] keys."""
    b, t, h, d = q.shape
    if keys.ndim == 4:
        return torch.matmul(q, keys.transpose(2, 3))
    return torch.bmm(q.reshape(b, t * h, d), keys.transpose(1, 2)).view(b, t, h, -1)


def _attention_mass(q, compressed, lse, scale) -> Tensor:
    """sum_h exp(scale <q_h, c_s> - lse_h), [b, t, s]."""
    exact = accumulation(q)
    return _logits(q.to(exact) * scale, compressed.to(exact)).sub_(lse[..., None]).exp_().sum(2)


def _divergence(teacher, hidden, q, weights, keys, wanted) -> tuple[Tensor, tuple[Tensor, ...]]:
    """sum over queries of KL(teacher / sum teacher || softmax(I)), and its gradients with respect to q, weights and
    keys.
    """
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
        return loss, ()
    dscores = (log_student.exp() - teacher).masked_fill(hidden | ~valid, 0)  # [b, t, s]
    dweights = torch.matmul(hits, dscores[..., None]).squeeze(-1)
    dhits = hits.sign_().mul_(weights[..., None]).mul_(dscores[:, :, None])  # hits are 0 where the ReLU is shut
    if keys.ndim == 4:
        return loss, (torch.matmul(dhits, keys), dweights, torch.matmul(dhits.transpose(2, 3), q))
    dhits = dhits.view(b, t * i, -1)
    dq = torch.bmm(dhits, keys).view(b, t, i, e)
    return loss, (dq, dweights, torch.bmm(dhits.transpose(1, 2), q.reshape(b, t * i, e)))
