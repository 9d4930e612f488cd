"""The linear layers that stay in float32: the router's and the compressors'.

n tokens · d channels in · o channels out
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import roofline
from .ours import ours
from .task import Contender, Op, Run, Setting, Task


@dataclass(frozen=True)
class Shape:
    dim: int
    outputs: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(512, 128, (4096, 16384)),
    "v4-flash": Shape(4096, 1024, (4096, 16384)),  # a CSA layer's values, and its logits
    "router": Shape(4096, 256, (4096, 16384)),
}


def tasks(setting: Setting) -> list[Task]:
    """A weight in float32, as training keeps it, and an input of the setting's dtype."""
    shape, g, n = setting.shape, setting.generator(), setting.tokens
    x = setting.normal(g, n, shape.dim)
    work = roofline.Work(
        2 * n * shape.dim * shape.outputs,
        n * (shape.dim * x.itemsize + 4 * shape.outputs) + 4 * shape.dim * shape.outputs,
    )
    return [
        Task(
            name="linear",
            inputs={"x": x, "weight": setting.normal(g, shape.outputs, shape.dim, dtype=torch.float32)},
            learned=("x", "weight"),
            outputs=("y",),
            contenders=[*ours(setting, _exact_linear, "exact_linear"), Contender("torch float32", _wide)],
            forward=work,
            backward=roofline.Work(2 * work.flops, work.bytes + x.nbytes),
        )
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,router", "cpu": "peer"},
    data={"normal": "independent normal numbers"},
    tasks=tasks,
    make=lambda d, o: Shape(d, o, (4096,)),
    format="DIMxOUTPUTS",
)


def _exact_linear(kernels: ModuleType, backend: str) -> Run:
    return lambda x, weight: (kernels.exact_linear(x, weight, backend=backend),)


def _wide(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.linear(x.float(), weight),)
