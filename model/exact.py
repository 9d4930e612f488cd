"""A linear map in float32, whatever the weights are kept in and also under autocast (compressors, router, head).

A model in float64, which serves to tell rounding from mistakes, stays in float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = W x in float32 (float64 for float64): x [..., d], weight [o, d] to [..., o]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(wide), weight.to(wide))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide))
