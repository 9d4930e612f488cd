"""What the ops ask of their tensors: what autocast makes of them, where engines accumulate (float32 for half precisions
and float32, float64 for float64, never under autocast), and whether a gradient may be asked for.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply `x`: autocast's where that is on, but float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def accumulation(x: Tensor) -> torch.dtype:
    """The dtype in which an engine computes on `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which matmuls keep the dtype they are given: autocast would round an engine's float32 to
    bfloat16.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of something computed from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
