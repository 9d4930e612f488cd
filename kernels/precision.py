"""Where the references accumulate: float32 for half precisions and float32, float64 for float64, never under
autocast.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation(x: Tensor) -> torch.dtype:
    """The dtype in which a reference computes on `x`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which matmuls keep the dtype they are given: autocast would round a reference's float32 to
    bfloat16.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
