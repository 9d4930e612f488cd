"""The loss that teaches the indexer, on its picks.

t tokens · i index heads · e index head dim · h attention heads · d head dim · p entries · k picks
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ....kernels import attention
from .. import roofline
from . import index_topk
from .attention import picked_entries
from .index_topk import Shape, chunks, index_scores, indexer_inputs, seen_range
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """The loss on the picks."""
    shape, t = setting.shape, setting.tokens
    work, *tensors, g = indexer_inputs(setting)
    student = dict(zip(("index_q", "index_weights", "index_keys"), tensors))
    heads = roofline.Attention(
        t, shape.heads, shape.dim, shape.window, shape.ratio, shape.picks, setting.dtype.itemsize
    )
    q, kv = setting.normal(g, 1, t, heads.heads, heads.dim), setting.normal(g, 1, t, heads.dim)
    compressed, sink = setting.normal(g, 1, heads.entries, heads.dim), torch.zeros(heads.heads, device=g.device)
    index = picked_entries(t, shape.ratio, shape.picks, setting.data, g)
    with torch.no_grad():
        lse = attention(q, kv, compressed, sink, window=heads.window, scale=heads.dim**-0.5, index=index)[1]
    return [
        Task(
            name="loss",
            inputs={**student, "q": q, "compressed": compressed, "lse": lse, "index": index},
            learned=tuple(student),
            outputs=("loss",),
            contenders=[
                *ours(setting, _index_loss(shape), "index_loss"),
                Contender("torch, dense in chunks", dense_loss(work, heads)),
            ],
            forward=roofline.index_loss(work, heads),
            backward=roofline.index_loss_backward(work),
            kept=sum(x.nbytes for x in student.values()),  # the gradients, which the forward pass makes
        )
    ]


OP = Op(
    shapes=index_topk.SHAPES,
    defaults=index_topk.OP.defaults,
    data={"random": "picks are any entries of the past", "recency": "they are the latest ones"},
    tasks=tasks,
    make=index_topk.OP.make,
    format=index_topk.OP.format,
)


def _index_loss(shape: Shape) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            *tensors, index = inputs
            seen = seen_range(index.shape[1], shape.ratio, index.device)
            given = {"scale": shape.dim**-0.5, "index": index, "backend": backend, **seen}
            return (kernels.index_loss(*tensors, **given)[0],)

        return run

    return make


def dense_loss(work: roofline.Indexer, heads: roofline.Attention) -> Run:
    """Teacher and student over all entries of a chunk of queries, masked; chunks are computed again in the backward
    pass, by autograd.
    """

    def part_of_loss(iq: Tensor, iw: Tensor, keys: Tensor, q: Tensor, entries: Tensor, lse: Tensor, index: Tensor):
        picked = torch.zeros(len(q), work.entries + 1, dtype=torch.bool, device=q.device)
        picked = picked.scatter_(1, torch.where(index < 0, work.entries, index), True)[:, :-1]
        with torch.no_grad():
            logits = torch.einsum("thd,pd->thp", q.float(), entries.float()) * heads.dim**-0.5
            mass = (logits - lse[..., None]).exp_().sum(1).masked_fill_(~picked, 0)
            teacher = mass / mass.sum(-1, keepdim=True).clamp_min(1e-10)
        student = index_scores(iq, iw, keys).masked_fill(~picked, float("-inf"))
        student = torch.where(picked.any(-1, keepdim=True), student, 0).log_softmax(-1)
        return F.kl_div(student.masked_fill(~picked, 0), teacher, reduction="sum")

    def run(iq: Tensor, iw: Tensor, keys: Tensor, q: Tensor, entries: Tensor, lse: Tensor, index: Tensor):
        loss = torch.zeros((), device=q.device)
        for part in chunks(work, work.heads + heads.heads):
            rows = (x[0, part] for x in (q, lse, index))
            loss = loss + _checkpointed(part_of_loss, iq[0, part], iw[0, part], keys[0], entries[0], *rows)
        return (loss / max(1, work.tokens - work.ratio + 1),)

    return run


def _checkpointed(part, iq, iw, keys, entries, q, lse, index) -> Tensor:
    return checkpoint(part, iq, iw, keys, q, entries, lse, index, use_reentrant=False)
