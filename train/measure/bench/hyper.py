"""One mHC site: coefficients, collapse, recombination around a sublayer that hands on what it reads.

t tokens · n streams · d width
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .. import roofline
from . import peers
from .ours import ours
from .task import Op, Run, Setting, Task


@dataclass(frozen=True)
class Shape:
    width: int
    streams: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(256, 4, (1024, 4096)),
    "wide": Shape(1024, 4, (1024, 4096)),
    "v4-flash": Shape(4096, 4, (4096, 8192, 65536)),
    "v4-pro": Shape(7168, 4, (4096, 8192)),
}


def tasks(setting: Setting) -> list[Task]:
    shape, t, g = setting.shape, setting.tokens, setting.generator()
    n, d = shape.streams, shape.width
    work = roofline.Hyper(t, d, n, setting.dtype.itemsize)
    single = torch.float32  # the parameters are, in every model
    return [
        Task(
            name="site",
            inputs={
                "streams": setting.normal(g, 1, t, n, d),
                "fn": setting.normal(g, (n + 2) * n, n * d, dtype=single) * (n * d) ** -0.5,
                "base": setting.normal(g, (n + 2) * n, dtype=single),
                "scale": setting.normal(g, 3, dtype=single),
            },
            learned=("streams", "fn", "base", "scale"),
            outputs=("streams out",),
            contenders=[*ours(setting, _site, "hyper"), peers.hyper_connection(work)],
            forward=work.pre + work.post,
            backward=work.post_backward + work.pre_backward,
            kept=work.kept,
        )
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,v4-pro", "cpu": "peer,wide"},
    data={"normal": "streams, projection and biases of unit variance"},
    tasks=tasks,
    make=lambda d, n: Shape(d, n, (4096,)),
    format="WIDTHxSTREAMS",
)


def _site(kernels: ModuleType, backend: str) -> Run:
    def run(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        if hasattr(kernels, "hyper_branch"):
            read, found, streams = kernels.hyper_branch(streams, fn, base, scale, backend=backend)
        else:  # an older commit
            read, found = kernels.hyper_read(streams, fn, base, scale, backend=backend)
        return (kernels.hyper_recombine(read, streams, found.post, found.comb, backend=backend),)

    return run
