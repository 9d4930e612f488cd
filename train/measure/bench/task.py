"""What an op offers to be measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..roofline import Work

Run = Callable[..., tuple[Tensor, ...]]  # of a task's inputs; the first output is the one that gradients start from


class NotHere(ImportError):
    """A foreign library does not hold what was to be compared, or cannot be imported here."""


@dataclass(frozen=True)
class Contender:
    """One implementation. `why_not` says why it cannot run here; `scratch` is the bytes it needs, where they are many.

    `scratch` counts a training step; a contender that would need more than there is free is left out.
    """

    name: str
    run: Run | None
    why_not: str = ""
    scratch: int = 0


@dataclass(frozen=True)
class Task:
    """Contenders for one result, eager first, on the same inputs; gradients go to the inputs in `learned`.

    Where nothing is learned there is no training step: the forward pass alone is measured.
    """

    name: str
    inputs: dict[str, Tensor]
    learned: tuple[str, ...]
    outputs: tuple[str, ...]
    contenders: list[Contender]
    forward: Work
    training_forward: Work | None = None  # where it writes what the backward pass will read; None = as `forward`
    backward: Work | None = None
    kept: int = 0  # bytes that have to live between forward and backward, above the inputs
    picks: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Outputs whose last axis lists distinct indices in any order, -1 = none, with the scores that were to be picked
    by: of equal scores any index is right. What must not be picked has the score -inf."""
    exact: tuple[str, ...] = ()  # outputs that have to be equal
    tolerance: float = 1.0  # times the error that is allowed in the dtype


@dataclass(frozen=True)
class Setting:
    """What one group of rows is measured at."""

    shape: Any  # one of the op's
    tokens: int
    dtype: torch.dtype
    device: torch.device
    data: str  # one of the op's
    seed: int = 0
    base: ModuleType | None = None  # the kernels of another commit

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, g: torch.Generator, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=g, device=self.device, dtype=dtype or self.dtype)


@dataclass(frozen=True)
class Op:
    """An op that can be measured. `shapes`: name to any frozen dataclass with `tokens`, the lengths to measure at."""

    shapes: Mapping[str, Any]
    defaults: Mapping[str, str]  # device type: names of shapes, with commas
    data: Mapping[str, str]  # name: meaning; the first is the default
    tasks: Callable[[Setting], list[Task]]
    format: str  # of a shape that has no name: its numbers' names with "x" between them
    make: Callable[..., Any]  # such a shape, of those numbers
