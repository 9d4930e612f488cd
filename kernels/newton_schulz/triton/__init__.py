"""Newton-Schulz iteration in Triton, as an operator that torch.compile and CUDA graphs see whole.

`kernels` holds the kernels, `launch` their order and blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import orthogonalise

__all__ = ["newton_schulz"]


def newton_schulz(
    x: Tensor, *, coefficients: Sequence[tuple[float, float, float]], compute_dtype: torch.dtype
) -> Tensor:
    """See `kernels.newton_schulz.newton_schulz`."""
    return _newton_schulz(x, [value for step in coefficients for value in step], compute_dtype)


@torch.library.custom_op("abyssal::newton_schulz", mutates_args=())
def _newton_schulz(x: Tensor, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    m, n = x.shape[-2:]
    out = _output(x, coefficients, dtype)
    if out.numel():
        source, target = (t.reshape(-1, m, n) for t in (x, out))
        steps = list(zip(coefficients[::3], coefficients[1::3], coefficients[2::3]))
        if m > n:
            source, target = source.mT, target.mT
        orthogonalise(source, target, steps, dtype)
    return out


@_newton_schulz.register_fake
def _output(x: Tensor, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape)
