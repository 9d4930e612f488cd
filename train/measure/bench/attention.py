"""Attention over a window, compressed entries and a sink: sliding, CSA (picked entries) and HCA (every entry).

t tokens · h heads · d head dim · p = floor(t / m) entries · k picks · l = t + p keys
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention

from .. import roofline
from . import peers
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task


@dataclass(frozen=True)
class Shape:
    """`ratio` and `heavy` are tokens per entry in CSA and HCA."""

    heads: int
    dim: int
    window: int
    ratio: int
    picks: int
    heavy: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(4, 64, 32, 4, 32, 32, (1024, 4096)),
    "long": Shape(8, 64, 128, 4, 128, 128, (1024, 4096)),
    "v4-flash": Shape(64, 512, 128, 4, 512, 128, (1024, 8192, 65536)),
    "v4-pro": Shape(128, 512, 128, 4, 1024, 128, (1024, 8192, 32768)),
}


def tasks(setting: Setting) -> list[Task]:
    """The three kinds of layer, on the same queries and window rows."""
    shape, t, g = setting.shape, setting.tokens, setting.generator()
    q, kv = setting.normal(g, 1, t, shape.heads, shape.dim), setting.normal(g, 1, t, shape.dim)
    sink = setting.normal(g, shape.heads, dtype=torch.float32)
    found = []
    for name, ratio, picks in (("sliding", 0, None), ("csa", shape.ratio, shape.picks), ("hca", shape.heavy, None)):
        compressed = {"compressed": setting.normal(g, 1, t // ratio, shape.dim)} if ratio else {}
        index = {"index": picked_entries(t, ratio, picks, setting.data, g)} if picks else {}
        work = roofline.Attention(t, shape.heads, shape.dim, shape.window, ratio, picks, setting.dtype.itemsize)
        found.append(
            Task(
                name=name,
                inputs={"q": q, "kv": kv, "sink": sink, **compressed, **index},
                learned=("q", "kv", "sink", *compressed),
                outputs=("out",),
                contenders=[*ours(setting, _ours(shape, ratio), "attention"), *_others(setting, work)],
                forward=work.forward,
                backward=work.backward,
                kept=work.kept,
            )
        )
    return found


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,v4-pro", "cpu": "peer"},
    data={"random": "any entries of the past are picked: the worst case for a cache", "recency": "the latest ones are"},
    tasks=tasks,
    make=lambda h, d, w, m, k, heavy: Shape(h, d, w, m, k, heavy, (1024, 8192)),
    format="HEADSxDIMxWINDOWxRATIOxPICKSxHEAVY",
)


def seen_entries(tokens: int, ratio: int, device: torch.device) -> Tensor:
    """How many entries each query sees, [1, t]: those whose tokens are all past."""
    return (torch.arange(1, tokens + 1, device=device) // ratio)[None]


def picked_entries(tokens: int, ratio: int, picks: int, data: str, g: torch.Generator) -> Tensor:
    """int64 [1, t, k], ascending, -1 where fewer entries are seen.

    Random picks take one entry of each of k equal parts of the past, so that no list of t x p is needed for them.
    """
    k = min(picks, max(tokens // ratio, 1))
    seen, place = seen_entries(tokens, ratio, g.device).mT, torch.arange(k, device=g.device)
    if data == "recency":
        chosen = (seen - k).clamp_min(0) + place
    else:
        low, high = (seen * x // k for x in (place, place + 1))
        few = seen <= k
        chosen = low + (torch.rand(tokens, k, generator=g, device=g.device) * (high - low)).long().minimum(
            high - low - 1
        )
        chosen = torch.where(few, place, chosen)
    return torch.where(chosen < seen, chosen, -1)[None]


# contenders ----------------------------------------------------------------------------------------------------------


def _ours(shape: Shape, ratio: int) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(q: Tensor, kv: Tensor, sink: Tensor, compressed: Any = None, index: Any = None) -> tuple[Tensor, ...]:
            sight: dict[str, Any] = {"index": index} if index is not None else {}
            if compressed is not None and index is None:
                end = seen_entries(q.shape[1], ratio, q.device)
                sight = {"start": torch.zeros_like(end), "end": end}
            given = {"window": shape.window, "scale": shape.dim**-0.5, "backend": backend, **sight}
            return (kernels.attention(q, kv, compressed, sink, **given)[0],)

        return run

    return make


def _others(setting: Setting, work: roofline.Attention) -> list[Contender]:
    pairs = work.tokens * (work.tokens + work.entries)
    mask, scores = pairs * (3 + 2 * setting.dtype.itemsize), 3 * work.heads * pairs * setting.dtype.itemsize
    on_gpu = setting.device.type == "cuda"
    flex_why_not = "" if on_gpu else "is compiled for CUDA; without that it is the dense product"
    return [
        Contender("torch SDPA, dense mask", sdpa(work), scratch=mask + (0 if on_gpu else scores)),
        Contender("torch FlexAttention", flex(work, on_gpu), flex_why_not, scratch=4 * pairs if work.picks else 0),
        peers.gather_attention(work, on_gpu),
        peers.eager_attention(work, visible),
    ]


def visible(work: roofline.Attention, index: Tensor | None, device: torch.device) -> Tensor:
    """bool [t, l]: the window's rows, then the entries."""
    key = torch.arange(work.tokens, device=device)
    row = key[:, None]
    rows = (key <= row).logical_and_(key > row - work.window)
    if not work.ratio:
        return rows
    entries = seen_entries(work.tokens, work.ratio, device).mT > torch.arange(work.entries, device=device)
    return torch.cat([rows, entries if index is None else _marks(work, index)], 1)


def _marks(work: roofline.Attention, index: Tensor) -> Tensor:
    """bool [t, p]: the picked entries."""
    marks = torch.zeros(work.tokens, work.entries + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(1, torch.where(index[0] < 0, work.entries, index[0]), True)[:, :-1]


def sdpa(work: roofline.Attention) -> Run:
    """All pairs under a mask. The sink is one more key: a channel of its own lets it have a logit for each head."""
    extra = 8  # channels: a number that kernels take

    def run(q: Tensor, kv: Tensor, sink: Tensor, compressed: Any = None, index: Any = None) -> tuple[Tensor, ...]:
        t, h, d = q.shape[1:]
        mask = F.pad(visible(work, index, q.device), (1, 0), value=True)
        keys = F.pad(kv if compressed is None else torch.cat([kv, compressed], 1), (0, extra, 1, 0))
        unit = F.pad(keys.new_ones(1, 1, 1), (d, extra - 1, 0, keys.shape[1] - 1))
        logit = F.pad((sink * d**0.5).to(q.dtype)[:, None], (0, extra - 1)).expand(1, t, h, extra)
        queries = torch.cat([q, logit], -1).transpose(1, 2)
        k, v = ((x[:, None]).expand(1, h, -1, -1) for x in (keys + unit, keys))
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=d**-0.5)
        return (out[..., :d].transpose(1, 2),)

    return run


def flex(work: roofline.Attention, compiled: bool) -> Run:
    """Blocks without a visible pair are left out; the sink is put into the denominator by the log-sum-exp."""

    def run(q: Tensor, kv: Tensor, sink: Tensor, compressed: Any = None, index: Any = None) -> tuple[Tensor, ...]:
        mask = _block_mask(work, index, q.device, compiled)
        keys = (kv if compressed is None else torch.cat([kv, compressed], 1))[:, None]
        out, aux = _flex(compiled)(
            *(q.transpose(1, 2), keys, keys),
            block_mask=mask,
            scale=work.dim**-0.5,
            enable_gqa=True,
            return_aux=flex_attention.AuxRequest(lse=True),
        )
        share = torch.sigmoid(aux.lse.float() - sink[:, None]).unsqueeze(-1)
        return ((out * share).to(q.dtype).transpose(1, 2),)

    return run


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    attend = flex_attention.flex_attention
    return torch.compile(attend, dynamic=False) if compiled else attend


def _block_mask(work: roofline.Attention, index: Tensor | None, device: torch.device, compiled: bool) -> Any:
    """Made once for what depends on positions alone, and at each call for picks."""
    if index is None:
        return _position_mask(work, device, compiled)
    marks = _marks(work, index)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        picked = marks[query, (key - work.tokens).clamp_min(0)]
        return torch.where(key < work.tokens, _in_window(work, query, key), picked)

    return _make_block_mask(work, sees, device, compiled)


@functools.lru_cache(maxsize=4)
def _position_mask(work: roofline.Attention, device: torch.device, compiled: bool) -> Any:
    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        past = (key - work.tokens + 1) * max(work.ratio, 1) <= query + 1
        return torch.where(key < work.tokens, _in_window(work, query, key), past)

    return _make_block_mask(work, sees, device, compiled)


def _make_block_mask(work: roofline.Attention, sees: Any, device: torch.device, compiled: bool) -> Any:
    keys = work.tokens + work.entries
    return flex_attention.create_block_mask(sees, None, None, work.tokens, keys, device=str(device), _compile=compiled)


def _in_window(work: roofline.Attention, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - work.window)
