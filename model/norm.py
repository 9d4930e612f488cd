"""RMSNorm with a learned weight:  y = w x / sqrt(mean(x^2) + eps)  in float32, rounded once (spec B.0)."""

import torch
from torch import Tensor, nn

from ..kernels import rms_norm


class RMSNorm(nn.Module):
    """w x / rms(x) over the last axis; w is kept in float32 by convention of the release."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
