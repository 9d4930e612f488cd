"""Muon's orthogonalisation of a stack of equal matrices; T is the number of matrices here.

e matrices · m n their sides
"""

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ....kernels.newton_schulz import HYBRID
from .. import roofline
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task

MUON = ((3.4445, -4.7750, 2.0315),) * 5  # torch.optim.Muon's steps


@dataclass(frozen=True)
class Shape:
    rows: int
    columns: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(128, 256, (1, 48)),  # an expert's
    "v4-flash": Shape(2048, 4096, (1, 16)),
    "tall": Shape(4096, 1024, (1, 16)),
}


def tasks(setting: Setting) -> list[Task]:
    """V4's ten steps, and the five of torch's optimizer."""
    x = setting.normal(setting.generator(), setting.tokens, setting.shape.rows, setting.shape.columns)
    torchs = [_torchs_own(setting.dtype)]
    return [_task("V4's 10 steps", setting, x, HYBRID, []), _task("5 steps of torch's", setting, x, MUON, torchs)]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash,tall", "cpu": "peer"},
    data={"normal": "matrices of independent entries"},
    tasks=tasks,
    make=lambda m, n: Shape(m, n, (1, 16)),
    format="ROWSxCOLUMNS",
)


def _task(
    name: str, setting: Setting, x: Tensor, steps: tuple[tuple[float, float, float], ...], others: list[Contender]
) -> Task:
    shape = setting.shape
    work = roofline.NewtonSchulz(setting.tokens, shape.rows, shape.columns, len(steps), setting.dtype.itemsize)
    return Task(
        name=name,
        inputs={"x": x},
        learned=(),
        outputs=("orthogonal",),
        contenders=[
            *ours(setting, _newton_schulz(steps), "newton_schulz"),
            Contender("torch bmm", lambda x: (by_bmm(x, steps),)),
            *others,
        ],
        forward=work.forward,
        tolerance=2.0 if setting.dtype.itemsize == 2 else 1.0,  # two that round every product are a few percent apart
    )


def _newton_schulz(steps: tuple[tuple[float, float, float], ...]) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            return (kernels.newton_schulz(x, coefficients=steps, compute_dtype=x.dtype, backend=backend),)

        return run

    return make


def by_bmm(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The whole stack at once in `torch.bmm`, wide matrices as they are and tall ones turned."""
    turned = x.shape[1] > x.shape[2]
    y = x.mT if turned else x
    y = (y / torch.linalg.matrix_norm(y.float(), keepdim=True)).to(x.dtype)
    for a, b, c in steps:
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT.contiguous() if turned else y


def _torchs_own(dtype: torch.dtype) -> Contender:
    """What torch.optim.Muon calls for each matrix: a private function, in bfloat16 only."""
    name = "torch.optim.Muon's"
    try:
        step = importlib.import_module("torch.optim._muon")._zeropower_via_newtonschulz
    except (ModuleNotFoundError, AttributeError):
        return Contender(name, None, "not in this torch")
    why_not = "" if dtype == torch.bfloat16 else "computes in bfloat16 only"

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack([step(matrix.clone(), MUON[0], len(MUON), 1e-7) for matrix in x]),)

    return Contender(name, run, why_not)
