"""The norm and the rotation that queries, keys and entries go through.

t tokens · d head dim · h heads
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import rope_frequencies, rope_rotation
from .. import roofline
from .ours import ours
from .task import Contender, Op, Run, Setting, Task

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """`heads` queries of `dim`, `rotary` of them rotated."""

    heads: int
    dim: int
    rotary: int
    tokens: tuple[int, ...]


SHAPES = {"peer": Shape(4, 64, 16, (4096, 16384)), "v4-flash": Shape(64, 512, 64, (8192, 65536))}


def tasks(setting: Setting) -> list[Task]:
    return [_norm_rope(setting, setting.generator())]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash", "cpu": "peer"},
    data={"normal": "queries of unit variance"},
    tasks=tasks,
    make=lambda h, d, r: Shape(h, d, r, (4096,)),
    format="HEADSxDIMxROTARY",
)


def _norm_rope(setting: Setting, g: torch.Generator) -> Task:
    shape, t, size = setting.shape, setting.tokens, setting.dtype.itemsize
    positions = torch.arange(t, device=setting.device)[None]
    rotation = rope_rotation(positions, rope_frequencies(shape.rotary, 1e4).to(setting.device))
    values = t * shape.heads * shape.dim
    return Task(
        name="norm, rope",
        inputs={"q": setting.normal(g, 1, t, shape.heads, shape.dim), "rotation": rotation},
        learned=("q",),
        outputs=("rotated",),
        contenders=[*ours(setting, _normed_and_rotated, "norm_rope"), Contender("torch", norm_and_rope)],
        forward=roofline.elementwise(values, size, size),
        backward=roofline.elementwise(values, 2 * size, size),
    )


def _normed_and_rotated(kernels: ModuleType, backend: str) -> Run:
    def run(q: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
        if hasattr(kernels, "norm_rope"):
            return (kernels.norm_rope(q, None, EPS, rotation, backend=backend),)
        return (kernels.rope(kernels.rms_norm(q, None, EPS, backend=backend), rotation, backend=backend),)

    return run


def norm_and_rope(q: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
    """`F.rms_norm`, then a complex product in float32."""
    dim = 2 * rotation.shape[-1]
    still, turned = F.rms_norm(q, q.shape[-1:], eps=EPS).split([q.shape[-1] - dim, dim], -1)
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(-2).to(q.dtype)
    return (torch.cat([still, turned], -1),)
