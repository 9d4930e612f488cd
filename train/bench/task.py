"""What an op offers to be measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..roofline import Work

Run = Callable[..., tuple[Tensor, ...]]  # of a task's inputs; the first output is the one that gradients start from


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
    """Contenders for one result, the reference first, on the same inputs; gradients go to the inputs in `learned`."""

    name: str
    inputs: dict[str, Tensor]
    learned: tuple[str, ...]
    outputs: tuple[str, ...]
    contenders: list[Contender]
    forward: Work
    training_forward: Work  # writes what the backward pass will read
    backward: Work
    kept: int  # bytes that have to live between forward and backward, above the inputs


@dataclass(frozen=True)
class Setting:
    """What one group of rows is measured at."""

    shape: Any  # one of the op's
    tokens: int
    dtype: torch.dtype
    device: torch.device
    data: str  # one of the op's
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class Op:
    """An op that can be measured. `shapes`: name to any frozen dataclass with `tokens`, the lengths to measure at."""

    shapes: Mapping[str, Any]
    defaults: Mapping[str, str]  # device type: names of shapes, with commas
    data: Mapping[str, str]  # name: meaning; the first is the default
    tasks: Callable[[Setting], list[Task]]
    parse: Callable[[str], Any] | None = None  # a shape that has no name, or None if the text is none
    format: str = field(default="")  # of such a text
