"""Whether an op has to remember anything for a backward pass."""

import torch
from torch import Tensor


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of something computed from these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
