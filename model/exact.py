"""A linear map in float32, whatever the weights are kept in and also under autocast (compressors, router, head)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = W x in float32: x [..., d], weight [o, d] to [..., o]."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.float(), weight.float())
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())
