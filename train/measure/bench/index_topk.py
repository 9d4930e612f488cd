"""The lightning indexer: scores with top-k, and top-k alone.

t tokens · i index heads · e index head dim · h attention heads · d head dim · p entries · k picks
"""

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .. import roofline
from . import peers
from .attention import seen_entries
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


def indexer_inputs(setting: Setting) -> tuple[roofline.Indexer, Tensor, Tensor, Tensor, torch.Generator]:
    """Sizes, queries, weights and keys of an indexer, and the generator that drew them."""
    shape, g = setting.shape, setting.generator()
    sizes = (setting.tokens, shape.index_heads, shape.index_dim, shape.ratio, shape.picks, setting.dtype.itemsize)
    work = roofline.Indexer(*sizes)
    q = setting.normal(g, 1, work.tokens, work.heads, work.dim)
    weights = setting.normal(g, 1, work.tokens, work.heads) * (work.dim * work.heads) ** -0.5
    return work, q, weights, setting.normal(g, 1, work.entries, work.dim), g


def tasks(setting: Setting) -> list[Task]:
    """Scores and choice as the model runs them, and the choice alone."""
    shape, on_gpu = setting.shape, setting.device.type == "cuda"
    work, q, weights, keys, g = indexer_inputs(setting)
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
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,v4-pro", "cpu": "peer"},
    data={"random": "scores of unit variance"},
    tasks=tasks,
    make=lambda i, e, k, m, h, d, w: Shape(i, e, k, m, h, d, w, (1024, 8192)),
    format="INDEX_HEADSxINDEX_DIMxPICKSxRATIOxHEADSxDIMxWINDOW",
)


def seen_range(t: int, ratio: int, device: torch.device) -> dict[str, Tensor]:
    end = seen_entries(t, ratio, device)
    return {"start": torch.zeros_like(end), "end": end}


def chunks(work: roofline.Indexer, heads: int) -> list[slice]:
    """Of queries, so long that the scores of `heads` fit into `SCORES`."""
    size = max(1, SCORES // max(1, heads * work.entries))
    return [slice(first, first + size) for first in range(0, work.tokens, size)]


# scores and top-k ----------------------------------------------------------------------------------------------------


def _topk(shape: Shape) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            seen = seen_range(q.shape[1], shape.ratio, q.device)
            return (kernels.index_topk(q, weights, keys, k=shape.picks, **seen, backend=backend),)

        return run

    return make


def scores_and_topk(work: roofline.Indexer) -> Run:
    """A product of a chunk of queries with all keys, and `torch.topk` of its rows."""

    def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        seen = seen_entries(work.tokens, work.ratio, q.device).mT
        entry, k = torch.arange(work.entries, device=q.device), min(work.picks, work.entries)
        picks = torch.empty(1, work.tokens, k, dtype=torch.int64, device=q.device)
        for part in chunks(work, work.heads):
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
    for part in chunks(work, work.heads):
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
            values = torch.nn.functional.pad(values, (0, -values.shape[1] % 16))  # as the scores lie
            picks = values.new_empty(1, len(values), k, dtype=torch.int64)
            chunk = launch.Chunk(0, -(-len(values) // launch.FEW), launch.FEW)
            launch.select(values, torch.zeros_like(seen), seen, picks, chunk, k)
            return (picks[0],)

        if backend == "triton":
            return select
        return lambda values: (kernels.stable_topk(values, k, ordered=False),)

    return make
