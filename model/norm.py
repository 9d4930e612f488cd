"""What stays in float32 whatever the weights are kept in: norms, and the projections of compressors, router and head.

    RMSNorm         y = w x / sqrt(mean(x^2) + eps), rounded once (spec B.0)
    exact_linear    y = W x

A model in float64, which serves to tell rounding from mistakes, stays in float64.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import rms_norm


class RMSNorm(nn.Module):
    """w x / rms(x) over the last axis; w is kept in float32 by convention of the release."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = W x in float32 (float64 for float64), also under autocast: x [..., d], weight [o, d] to [..., o]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(wide), weight.to(wide))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide))
