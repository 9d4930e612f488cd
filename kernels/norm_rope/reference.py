"""RMSNorm and RoPE as the papers write them: the definition that every engine is held against.

b batch · t positions · D channels, the last `dim` of them rotated in adjacent pairs
"""

import torch
from torch import Tensor

from ..precision import accumulation


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`weight x / sqrt(mean(x^2) + eps)`, x [..., D]."""
    wide = x.to(accumulation(x))
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y if weight is None else y * weight).to(x.dtype)


def rope(x: Tensor, rotation: Tensor, *, inverse: bool = False) -> Tensor:
    """`(a cos - b sin, a sin + b cos)` of each pair a, b; x [b, t, ..., D], rotation [b|1, t, dim / 2]."""
    angles = rotation.detach().view(*rotation.shape[:2], *[1] * (x.ndim - 3), rotation.shape[2])
    cos, sin = angles.real, -angles.imag if inverse else angles.imag
    first = x.shape[-1] - 2 * rotation.shape[2]
    a, b = x[..., first:].to(accumulation(x)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[..., :first], turned.to(x.dtype)), -1)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, rotation: Tensor) -> Tensor:
    """One after the other."""
    return rope(rms_norm(x, weight, eps), rotation)
