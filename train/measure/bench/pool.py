"""The compressor's pooling, with overlap (CSA) and without (HCA).

t tokens · d head dim · m ratio · c = 2 with overlap
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import roofline
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task


@dataclass(frozen=True)
class Shape:
    """`ratio` with overlap in CSA, `heavy` without in HCA."""

    dim: int
    ratio: int
    heavy: int
    tokens: tuple[int, ...]


SHAPES = {"peer": Shape(64, 4, 32, (4096, 16384)), "v4-flash": Shape(512, 4, 128, (8192, 65536))}


def tasks(setting: Setting) -> list[Task]:
    """Pooling of both kinds, in float32 as in the release."""
    shape, g = setting.shape, setting.generator()
    return [
        _pooling("csa", setting, shape.ratio, True, g),
        _pooling("hca", setting, shape.heavy, False, g),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash", "cpu": "peer"},
    data={"normal": "values and logits of unit variance"},
    tasks=tasks,
    make=lambda d, m, heavy: Shape(d, m, heavy, (4096,)),
    format="DIMxRATIOxHEAVY",
)


def _pooling(name: str, setting: Setting, ratio: int, overlap: bool, g: torch.Generator) -> Task:
    shape, single = setting.shape, torch.float32
    channels = (2 if overlap else 1) * shape.dim
    work = roofline.Pool(setting.tokens, shape.dim, ratio, overlap, single.itemsize)
    inputs = {x: setting.normal(g, 1, setting.tokens, channels, dtype=single) for x in ("kv", "gate")}
    return Task(
        name=name,
        inputs={**inputs, "bias": setting.normal(g, ratio, channels, dtype=single)},
        learned=("kv", "gate", "bias"),
        outputs=("entries",),
        contenders=[
            *ours(setting, _pool(ratio, overlap), "pool"),
            Contender("torch", lambda kv, gate, bias: (softmax_pool(kv, gate, bias, ratio, overlap),)),
        ],
        forward=work.forward,
        backward=work.backward,
    )


def _pool(ratio: int, overlap: bool) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        return lambda *inputs: (kernels.pool(*inputs, ratio=ratio, overlap=overlap, backend=backend),)

    return make


def softmax_pool(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> Tensor:
    """In operators of torch: windows, with overlap the one before beside each, a softmax over the slots."""
    whole = kv.shape[1] // ratio * ratio
    kv, gate = (x[:, :whole].unflatten(1, (-1, ratio)) for x in (kv, gate))
    gate = gate + bias
    if overlap:
        d = kv.shape[-1] // 2
        kv, gate = (
            torch.cat([F.pad(x[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=empty), x[..., d:]], 2)
            for x, empty in ((kv, 0.0), (gate, float("-inf")))
        )
    return (gate.softmax(2) * kv).sum(2)
