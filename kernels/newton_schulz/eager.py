"""Newton-Schulz iteration in PyTorch, an engine: a cache's worth of matrices at a time, each in products of its own
shorter side.

e matrices · m n their sides as given · r <= c the same sides, the shorter one first
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast

SCRATCH = 2**19  # elements of the iterates that are at work at once: 2 MiB of fp32 stay in a cache
ALIGNED = 8  # rows and columns are filled up with zeros to multiples of this


def newton_schulz(
    x: Tensor, *, coefficients: Sequence[tuple[float, float, float]], compute_dtype: torch.dtype
) -> Tensor:
    """See `kernels.newton_schulz.newton_schulz`."""
    m, n = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    source, target = (t.reshape(x.shape[:-2].numel(), m, n) for t in (x, out))
    if m > n:
        source, target = source.mT, target.mT
    chunk = max(SCRATCH // (3 * m * n), 1)
    with without_autocast(x):
        for stack, into in zip(source.split(chunk), target.split(chunk)):
            into.copy_(_iterate(_normalised(stack, compute_dtype), coefficients)[:, : into.shape[1], : into.shape[2]])
    return out


def _normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x / |x|_F` for each matrix, by way of its largest entry, as the square of a finite entry need not be finite.

    Zeros fill it up to an aligned shape, so that no matrix lies in memory in a way of its own, and a matrix library
    sums it as it would anywhere else.
    """
    e, r, c = x.shape
    wide = x.new_zeros(e, r + -r % ALIGNED, c + -c % ALIGNED, dtype=accumulation(x))
    wide[:, :r, :c] = x
    wide /= _or_one(torch.linalg.vector_norm(wide, torch.inf, -1).amax(-1))
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(wide, dim=-1), dim=-1)
    return (wide / _or_one(norm)).to(dtype)


def _or_one(size: Tensor) -> Tensor:
    """`[e, 1, 1]` to divide by: 1 for a zero."""
    return (size + (size == 0))[:, None, None]


def _iterate(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """X <- a X + (b A + c A A) X, A = X X^T, for each step; x [e, r, c]."""
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
