"""The linear layer in float32: the definition that every engine is held against.

Axes: d channels in · o channels out.
"""

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.promote_types(accumulation(x), accumulation(weight))
    with without_autocast(x):
        return torch.einsum("...d,od->...o", x.to(dtype), weight.to(dtype))
