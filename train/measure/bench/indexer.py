"""The lightning indexer: scores with top-k, top-k alone, and the loss that teaches it.

t tokens · i index heads · e index head dim · h attention heads · d head dim · p entries · k picks
"""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ....kernels import attention
from .. import roofline
from . import peers
from .attention import picked_entries, seen_entries
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task

SCORES = 1 << 26  # that many scores, of all heads, are in memory at once in torch's contenders: 256 MiB


@dataclass(frozen=True)
class Shape:
    """Heads and widths of the indexer, then of the attention that it learns from."""

    index_heads: int
    index_dim: int
    picks: int
    ratio: int
    heads: int
    dim: int
    window: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(4, 32, 32, 4, 4, 64, 32, (1024, 4096)),
    "v4-flash": Shape(64, 128, 512, 4, 64, 512, 128, (8192, 65536)),
    "v4-pro": Shape(64, 128, 1024, 4, 128, 512, 128, (8192, 32768)),
}


def tasks(setting: Setting) -> list[Task]:
    """Scores and choice as the model runs them, the choice alone, and the loss on the picks."""
    shape, t, g = setting.shape, setting.tokens, setting.generator()
    size, on_gpu = setting.dtype.itemsize, setting.device.type == "cuda"
    work = roofline.Indexer(t, shape.index_heads, shape.index_dim, shape.ratio, shape.picks, size)
    q = setting.normal(g, 1, t, work.heads, work.dim)
    weights = setting.normal(g, 1, t, work.heads) * (work.dim * work.heads) ** -0.5
    keys = setting.normal(g, 1, work.entries, work.dim)
    return [
        Task(
            name="scores, top-k",
            inputs={"q": q, "weights": weights, "keys": keys},
            learned=(),
            outputs=("picks",),
            picks={"picks": functools.partial(scores_of_picks, work, q, weights, keys)},
            contenders=[
                *ours(setting, _topk(shape), "index_topk"),
                Contender("torch, in chunks", scores_and_topk(work)),
                peers.eager_indexer(work),
                peers.gym_indexer(work, on_gpu),
            ],
            forward=work.topk,
        ),
        *_selection(setting, work, g),
        _loss(setting, work, {"index_q": q, "index_weights": weights, "index_keys": keys}, g),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,v4-pro", "cpu": "peer"},
    data={"random": "the loss's picks are any entries of the past", "recency": "they are the latest ones"},
    tasks=tasks,
    tests=(
        "test_index_topk.py", "test_index_loss.py", "test_topk.py",
        "triton/test_index_gpu.py",
    ),
    make=lambda i, e, k, m, h, d, w: Shape(i, e, k, m, h, d, w, (1024, 8192)),
    format="INDEX_HEADSxINDEX_DIMxPICKSxRATIOxHEADSxDIMxWINDOW",
)  # fmt: skip


def _range(t: int, ratio: int, device: torch.device) -> dict[str, Tensor]:
    end = seen_entries(t, ratio, device)
    return {"start": torch.zeros_like(end), "end": end}


def _chunks(work: roofline.Indexer, heads: int) -> list[slice]:
    """Of queries, so long that the scores of `heads` fit into `SCORES`."""
    size = max(1, SCORES // max(1, heads * work.entries))
    return [slice(first, first + size) for first in range(0, work.tokens, size)]


# scores and top-k ----------------------------------------------------------------------------------------------------


def _topk(shape: Shape) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            seen = _range(q.shape[1], shape.ratio, q.device)
            return (kernels.index_topk(q, weights, keys, k=shape.picks, **seen, backend=backend),)

        return run

    return make


def scores_and_topk(work: roofline.Indexer) -> Run:
    """A product of a chunk of queries with all keys, and `torch.topk` of its rows."""

    def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        seen = seen_entries(work.tokens, work.ratio, q.device).mT
        entry, k = torch.arange(work.entries, device=q.device), min(work.picks, work.entries)
        picks = torch.empty(1, work.tokens, k, dtype=torch.int64, device=q.device)
        for part in _chunks(work, work.heads):
            scores = index_scores(q[0, part], weights[0, part], keys[0])
            chosen = scores.masked_fill_(entry >= seen[part], float("-inf")).topk(k, sorted=False).indices
            picks[0, part] = torch.where(chosen < seen[part], chosen, -1)
        return (picks,)

    return run


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Of queries [t, i, e] and keys [p, e] in float32: [t, p]."""
    hits = torch.einsum("tie,pe->tip", q.float(), keys.float()).relu()
    return torch.einsum("tip,ti->tp", hits, weights.float())


def scores_of_picks(work: roofline.Indexer, q: Tensor, weights: Tensor, keys: Tensor, picks: Tensor) -> Tensor:
    """[1, t, k]; -inf for entries that a query does not see."""
    seen, out = seen_entries(work.tokens, work.ratio, q.device).mT, torch.empty(picks.shape, device=q.device)
    for part in _chunks(work, work.heads):
        out[0, part] = index_scores(q[0, part], weights[0, part], keys[0]).gather(-1, picks[0, part])
    return out.masked_fill_(picks >= seen, float("-inf"))


def _selection(setting: Setting, work: roofline.Indexer, g: torch.Generator) -> list[Task]:
    """Given scores of as many queries as fit, of those that see more entries than they pick; what they do not see is
    -inf.
    """
    rows = min(work.tokens - work.picks * work.ratio, max(1, SCORES // max(1, work.entries)))
    if rows < 1:
        return []
    seen = seen_entries(work.tokens, work.ratio, setting.device)[0, -rows:, None]
    scores = setting.normal(g, rows, work.entries, dtype=torch.float32)
    scores.masked_fill_(torch.arange(work.entries, device=setting.device) >= seen, float("-inf"))

    every = roofline.Work(0, 4 * rows * (work.entries + work.picks))
    return [
        Task(
            name="top-k alone",
            inputs={"scores": scores},
            learned=(),
            outputs=("picks",),
            picks={"picks": lambda index: scores.gather(-1, index)},
            contenders=[
                *ours(setting, _select(work.picks, seen.mT.contiguous()), "index_topk"),
                Contender("torch.topk", lambda values: (values.topk(work.picks, sorted=False).indices,)),
            ],
            forward=every,
        )
    ]


def _select(k: int, seen: Tensor) -> Make:
    """Triton's selection is no op of its own: the launch that `index_topk` makes after its scores. `seen` [1, rows]."""

    def make(kernels: ModuleType, backend: str) -> Run:
        def select(values: Tensor) -> tuple[Tensor, ...]:
            launch = importlib.import_module(f"{kernels.__name__}.index_topk.triton.launch")
            picks = values.new_empty(1, len(values), k, dtype=torch.int64)
            tiles, left = divmod(len(values), launch.FEW)
            launch.select(values, torch.zeros_like(seen), seen, picks, 0, tiles + bool(left), k, launch.FEW)
            return (picks[0],)

        if backend == "triton":
            return select
        return lambda values: (kernels.stable_topk(values, k, ordered=False),)

    return make


# loss ----------------------------------------------------------------------------------------------------------------


def _loss(setting: Setting, work: roofline.Indexer, student: dict[str, Tensor], g: torch.Generator) -> Task:
    shape, t = setting.shape, work.tokens
    heads = roofline.Attention(
        t, shape.heads, shape.dim, shape.window, shape.ratio, shape.picks, setting.dtype.itemsize
    )
    q, kv = setting.normal(g, 1, t, heads.heads, heads.dim), setting.normal(g, 1, t, heads.dim)
    compressed, sink = setting.normal(g, 1, heads.entries, heads.dim), torch.zeros(heads.heads, device=g.device)
    index = picked_entries(t, shape.ratio, shape.picks, setting.data, g)
    with torch.no_grad():
        lse = attention(q, kv, compressed, sink, window=heads.window, scale=heads.dim**-0.5, index=index)[1]
    return Task(
        name="loss",
        inputs={**student, "q": q, "compressed": compressed, "lse": lse, "index": index},
        learned=tuple(student),
        outputs=("loss",),
        contenders=[
            *ours(setting, _index_loss(shape), "index_loss"),
            Contender("torch, dense in chunks", dense_loss(work, heads)),
        ],
        forward=work.loss(heads),
        backward=work.loss_backward,
        kept=sum(x.nbytes for x in student.values()),  # the gradients, which the forward pass makes
    )


def _index_loss(shape: Shape) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            *tensors, index = inputs
            seen = _range(index.shape[1], shape.ratio, index.device)
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
        for part in _chunks(work, work.heads + heads.heads):
            rows = (x[0, part] for x in (q, lse, index))
            loss = loss + _checkpointed(part_of_loss, iq[0, part], iw[0, part], keys[0], entries[0], *rows)
        return (loss / max(1, work.tokens - work.ratio + 1),)

    return run


def _checkpointed(part, iq, iw, keys, entries, q, lse, index) -> Tensor:
    return checkpoint(part, iq, iw, keys, q, entries, lse, index, use_reentrant=False)
