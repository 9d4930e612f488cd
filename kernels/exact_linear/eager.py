"""The linear layer in PyTorch: a GPU multiplies two tensors of one half precision as they are, into float32.

Axes: d channels in · o channels out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import accumulation, tracked, without_autocast


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    with without_autocast(x):
        if x.is_cuda and x.itemsize == 2 and x.dtype == weight.dtype and not tracked(x, weight):
            y = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)
            return y.view(*x.shape[:-1], len(weight))
        dtype = torch.promote_types(accumulation(x), accumulation(weight))
        return F.linear(x.to(dtype), weight.to(dtype))
