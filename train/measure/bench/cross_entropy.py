"""The language model's head with its loss: linear layer and softmax cross-entropy.

t tokens · d width · v vocabulary
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
    width: int
    vocabulary: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(256, 512, (1024, 4096)),
    "words": Shape(256, 32_000, (1024, 2048)),
    "v4-flash": Shape(4096, 129_280, (4096, 8192, 16384)),
}


def tasks(setting: Setting) -> list[Task]:
    shape, t, g = setting.shape, setting.tokens, setting.generator()
    work = roofline.CrossEntropy(t, shape.width, shape.vocabulary, setting.dtype.itemsize)
    targets = torch.randint(shape.vocabulary, (t,), generator=g, device=setting.device)
    targets[::16] = -100  # some are left out, as padding is
    logits = t * shape.vocabulary
    return [
        Task(
            name="loss",
            inputs={
                "x": setting.normal(g, t, shape.width),
                "weight": setting.normal(g, shape.vocabulary, shape.width) * shape.width**-0.5,
                "targets": targets,
            },
            learned=("x", "weight"),
            outputs=("loss",),
            contenders=[
                *ours(setting, _cross_entropy, "cross_entropy"),
                Contender("torch linear_cross_entropy", *_fused()),
                Contender("torch, whole logits", whole_logits, scratch=logits * (12 + 2 * setting.dtype.itemsize)),
            ],
            forward=work.forward,
            backward=work.backward,
            kept=work.kept,
        )
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash", "cpu": "peer,words"},
    data={"uniform": "every target is as likely, one of 16 is left out"},
    tasks=tasks,
    make=lambda d, v: Shape(d, v, (4096,)),
    format="WIDTHxVOCABULARY",
)


def _cross_entropy(kernels: ModuleType, backend: str) -> Run:
    return lambda *inputs: (kernels.cross_entropy(*inputs, backend=backend),)


def _fused() -> tuple[Run | None, str]:
    """torch's own op, in chunks; torch has it from 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        return None, f"torch {torch.__version__} has none"
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, targets: (F.linear_cross_entropy(x, weight, targets, options=options),), ""


def whole_logits(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return (F.cross_entropy(F.linear(x, weight).float(), targets),)
