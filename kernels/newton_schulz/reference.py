"""The definition of `newton_schulz`, against which every engine is held: the iteration as V4's Algorithm 1 writes it.

m n sides of a matrix; its leading axes are those of a stack
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast


def newton_schulz(
    x: Tensor, *, coefficients: Sequence[tuple[float, float, float]], compute_dtype: torch.dtype
) -> Tensor:
    """X = M / |M|_F, then X <- a X + (b X X^T + c (X X^T)^2) X for each step; a zero matrix stays zero. [..., m, n]"""
    y = x.to(accumulation(x))
    norm = y.square().sum((-2, -1), keepdim=True).sqrt()
    y = (y / torch.where(norm == 0, 1, norm)).to(compute_dtype)
    with without_autocast(x):
        for a, b, c in coefficients:
            gram = y @ y.mT
            y = a * y + (b * gram + c * gram @ gram) @ y
    return y.to(x.dtype)
