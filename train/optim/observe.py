"""What an update looks like: its size, and how near to orthogonal Muon's is.

    meter = UpdateMeter(model, recipe.optim)
    optimizer.step(observe=meter)
    meter.rms(), meter.orthogonality()

Where processes share the parameters, all of them look or none: every number is of the whole.
An update is counted per unit of learning rate and without the decay: ΔW = - η (update + λ W). Muon's and the balanced
rule's have a root mean square of γ wherever the gradient has full rank; AdamW's is at most about 1. Of the n² rows of
mHC's comb the gradient never has full rank: a constant added to a row of its logits changes nothing, so n singular
values stay near 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..settings import OptimConfig
from .muon import full, split
from .rules import parameter_rules


class Orthogonality(NamedTuple):
    """How far the singular values of the updates, over γ sqrt(max(n, m)), are from 1."""

    worst: float  # the largest |s - 1|
    rms: float  # the root of the mean (s - 1)²
    matrices: int


class UpdateMeter:
    """An observer of one step. `spectra` keeps what `orthogonality` needs: Muon's updates, as large as weights."""

    def __init__(self, model: nn.Module, optim: OptimConfig, spectra: bool = False) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._rules = parameter_rules(model, optim)
        self._scale, self._spectra = optim.update_scale, spectra
        self._squares: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def __call__(self, parameter: Tensor, update: Tensor) -> None:
        name = self._names[parameter]
        if name not in self._rules:
            name = name.removesuffix("rows") + "weight"
        self._squares[name] = full(update.square().mean())
        if self._spectra and self._rules[name].name == "muon":
            self._kept[name] = full(update).clone()

    def rms(self) -> dict[str, float]:
        """The root mean square of every parameter's update, by name; tables that a step holds rows of: of those."""
        return {name: math.sqrt(float(square)) for name, square in self._squares.items()}

    def orthogonality(self) -> Orthogonality:
        """Over all matrices of Muon's that had a gradient; a value that the momentum lacks (its rank is not full)
        counts as 0 and so as an error of 1.
        """
        return orthogonality(self._kept, {name: self._rules[name].rows for name in self._kept}, self._scale)


def orthogonality(updates: dict[str, Tensor], rows: dict[str, tuple[int, ...]], scale: float) -> Orthogonality:
    """Of updates [..., r, m], each a stack of matrices of `rows` along r, whose rms is meant to be `scale`."""
    worst, squares, count, matrices = 0.0, 0.0, 0, 0
    for name, update in updates.items():
        for stack in split(update, rows[name]):
            values = torch.linalg.svdvals(stack.double()) / (scale * math.sqrt(max(stack.shape[-2:])))
            error = (values - 1).abs()
            worst = max(worst, float(error.max()))
            squares, count = squares + float(error.square().sum()), count + error.numel()
            matrices += stack.shape[:-2].numel()
    return Orthogonality(worst, math.sqrt(squares / count) if count else 0.0, matrices)
