"""Norms, in float32 whatever the weights are kept in: y = w x / sqrt(mean(x^2) + eps), rounded once (spec B.0).

A model in float64, which serves to tell rounding from mistakes, stays in float64.
"""

import torch
from torch import Tensor, nn

from ..kernels import norm_rope, rms_norm, rope
from .kept import KeepingModule


class RMSNorm(KeepingModule):
    """w x / rms(x) over the last axis, turned by a rotation if one is given; w is in float32, as in the release."""

    KEPT = ("weight",)

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        if rotation is None:
            return rms_norm(x, self.weight, self.eps)
        return norm_rope(x, self.weight, self.eps, rotation)


def norm_then_rope(norm: nn.Module, x: Tensor, rotation: Tensor) -> Tensor:
    """rope(norm(x), rotation), in one pass where `norm` is ours."""
    if type(norm).forward is RMSNorm.forward:
        return norm(x, rotation)
    return rope(norm(x), rotation)
