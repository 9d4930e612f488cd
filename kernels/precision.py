"""What the eager engines ask of their tensors: where to accumulate (float32 for half precisions and float32, float64
for float64, never under autocast), and whether a gradient may be asked for.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
