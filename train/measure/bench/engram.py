"""Engram: hash of n-grams, hash with look-up in the tables, and the gate.

t tokens · n streams · d width · o orders · k heads per order · w width of a row · r rows of all tables
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.engram import engram_layout
from .. import roofline
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task

EPS, CLASSES = 1e-6, 100_000


@dataclass(frozen=True)
class Shape:
    """`rows` of each head's table; V4.1's have 16,000,000, which fit into no single GPU."""

    width: int
    streams: int
    orders: int
    heads: int
    dim: int
    rows: int
    tokens: tuple[int, ...]


SHAPES = {
    "toy": Shape(128, 4, 3, 2, 32, 30_000, (2048, 8192)),
    "v4.1": Shape(5120, 4, 3, 8, 256, 200_000, (8192, 32768)),
}


def tasks(setting: Setting) -> list[Task]:
    shape, t, g = setting.shape, setting.tokens, setting.generator()
    layout = engram_layout([1], classes=CLASSES, vocab_size=shape.rows, max_ngram=shape.orders + 1, heads=shape.heads)[
        1
    ]
    numbers = [torch.tensor(x, device=setting.device) for x in layout[:3]]  # multipliers, moduli, offsets
    ids = torch.randint(CLASSES, (1, t), generator=g, device=setting.device)
    if setting.data == "repeated":
        ids = ids[:, : max(1, t // 64)].repeat(1, 65)[:, :t]
    work = roofline.Engram(t, shape.width, shape.streams, setting.dtype.itemsize)
    every = shape.orders * shape.heads
    return [
        Task(
            name="hash",
            inputs={"ids": ids},
            learned=(),
            outputs=("rows",),
            exact=("rows",),
            contenders=[
                *ours(setting, _hash(numbers), "engram"),
                Contender("torch", lambda ids: (hashed(ids, *numbers),)),
            ],
            forward=work.hash(every),
        ),
        Task(
            name="hash, look-up",
            inputs={"ids": ids, "table": setting.normal(g, layout.rows, shape.dim)},
            learned=("table",),
            outputs=("embedded",),
            contenders=[
                *ours(setting, _lookup(numbers), "engram"),
                Contender(
                    "torch embedding", lambda ids, table: (F.embedding(hashed(ids, *numbers), table).flatten(2),)
                ),
            ],
            forward=work.lookup(every, shape.dim),
            backward=work.lookup_backward(every, shape.dim, layout.rows),
            kept=8 * t * every,  # the rows' numbers
        ),
        _gate(setting, work, g),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4.1", "cpu": "toy"},
    data={
        "uniform": "every token is as likely: few rows are read twice",
        "repeated": "the text repeats itself 64 times: every row is read that often",
    },
    tasks=tasks,
    make=lambda d, n, o, k, w, r: Shape(d, n, o, k, w, r, (4096,)),
    format="WIDTHxSTREAMSxORDERSxHEADSxDIMxROWS",
)


def _hash(numbers: list[Tensor]) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        return lambda ids: (kernels.engram_hash(ids, *numbers, pad=0, backend=backend),)

    return make


def _lookup(numbers: list[Tensor]) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(ids: Tensor, table: Tensor) -> tuple[Tensor, ...]:
            rows = kernels.engram_hash(ids, *numbers, pad=0, backend=backend)
            if hasattr(kernels, "engram_gather"):
                return (kernels.engram_gather(table, rows, backend=backend),)
            return (F.embedding(rows, table).flatten(2),)  # an older commit

        return run

    return make


def hashed(ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor) -> Tensor:
    """In operators of torch, with id 0 before the first token."""
    mix, rows = ids * multipliers[0], []
    for back, primes in enumerate(moduli, 1):
        mix = mix ^ (F.pad(ids, (back, 0))[:, : ids.shape[1]] * multipliers[back])
        rows.append(mix[..., None] % primes)
    return torch.cat(rows, -1) + offsets


def _gate(setting: Setting, work: roofline.Engram, g: torch.Generator) -> Task:
    t, n, d = work.tokens, work.streams, work.width
    streams, key = (setting.normal(g, 1, t, n, d) for _ in range(2))
    weights = {x: 1 + 0.3 * setting.normal(g, n, d, dtype=torch.float32) for x in ("weight_h", "weight_k")}
    return Task(
        name="gate",
        inputs={"streams": streams, "key": key + 0.3 * streams, "value": setting.normal(g, 1, t, d), **weights},
        learned=("streams", "key", "value", *weights),
        outputs=("gated",),
        contenders=[*ours(setting, _gated, "engram"), Contender("torch", gate)],
        forward=work.gate,
        backward=work.gate_backward,
        kept=work.kept,
    )


def _gated(kernels: ModuleType, backend: str) -> Run:
    return lambda *inputs: (kernels.engram_gate(*inputs, eps=EPS, backend=backend),)


def gate(streams: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor) -> tuple[Tensor, ...]:
    """In operators of torch: two norms, a product, a signed root, a sigmoid."""
    h, k = (F.rms_norm(x.float(), x.shape[-1:], eps=EPS) for x in (streams, key))
    logit = (h * weight_h * (k * weight_k)).sum(-1, keepdim=True) * streams.shape[-1] ** -0.5
    root = logit.sign() * logit.abs().clamp_min(1e-6).sqrt()
    return ((root.sigmoid() * value.float().unsqueeze(2)).to(streams.dtype),)
