"""Orthogonalisation of matrices by Newton-Schulz iteration: what Muon makes of a momentum before it becomes an update.

    X = M / |M|_F,   then for each (a, b, c) of the schedule:   A = X X^T,   X <- a X + (b A + c A A) X

Each step maps every singular value s of X to a s + b s^3 + c s^5 and leaves the singular vectors alone, so the result
is near U V^T, the orthogonal factor of M = U S V^T. V4's schedule takes eight steep steps, in which a small s grows
3.4445 times each, and two that settle: in exact arithmetic s >= 3e-5 |M|_F ends within 1 .. 1.0021, and a smaller one
comes out 79,263 times as large. Zero stays zero.

e matrices · m n their sides as given · r <= c the same sides, the shorter one first
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import implementation
from ..precision import accumulation

__all__ = ["HYBRID", "newton_schulz", "newton_schulz_many"]

HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
HALVES = (torch.bfloat16, torch.float16)
BATCH = 2**24  # elements that `newton_schulz_many` copies together


def newton_schulz(
    x: Tensor,
    *,
    coefficients: Sequence[tuple[float, float, float]] = HYBRID,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Orthogonalise every matrix of a stack: `U p(S / |S|) V^T` for each `U S V^T`, p the steps of the schedule.

    `X <- a X + (b X X^T + c (X X^T)^2) X` from `X = M / |M|_F`, with no epsilon, in one batch for all leading axes; a
    tall matrix is iterated as its transpose. A matrix has the same bits in any batch and orientation, a zero matrix
    stays zero, and one that holds a NaN or an infinity comes back NaN, it alone. Scratch is bounded, whatever the
    number of matrices. There is no gradient: this belongs to an optimizer. (V4 2.4, Algorithm 1; V4 3.5.1.)

    Args:
        x: `[..., m, n]`, float; each matrix one logically independent weight.
        coefficients: `(a, b, c)` of each step, by default V4's eight and two.
        compute_dtype: of X and A between the products, which accumulate in fp32 all the same. None takes bfloat16 on
            CUDA, as in V4, and float32 elsewhere; float64 inputs are computed in float64.

    Returns:
        `[..., m, n]` in the dtype of x, contiguous.

    Raises:
        ValueError: x is no stack of float matrices, a step has not three coefficients, or compute_dtype is not one of
            those allowed.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: expected floats [..., m, n]")
    steps = [tuple(float(v) for v in step) for step in coefficients]
    if not steps or any(len(step) != 3 for step in steps):
        raise ValueError(f"coefficients={coefficients!r}: expected (a, b, c) for each step, at least one")
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, *HALVES)
    default = torch.bfloat16 if x.is_cuda and x.dtype != torch.float64 else accumulation(x)
    if (compute_dtype or default) not in allowed:
        raise ValueError(f"compute_dtype={compute_dtype}: allowed for a {x.dtype} x are {allowed} and None")
    run = implementation("newton_schulz", backend, x).newton_schulz
    return run(x.detach(), coefficients=steps, compute_dtype=compute_dtype or default)


def newton_schulz_many(
    matrices: Sequence[Tensor],
    *,
    coefficients: Sequence[tuple[float, float, float]] = HYBRID,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """`newton_schulz` of each tensor of a list, those of equal sides together, with the bits it has alone.

    A model's hundred small matrices become a few batches: `[m, n]` and `[n, m]` share one, and so do stacks of them.
    What is one logically independent matrix is the caller's to say, by a view: experts `[e, 2 f, d]` as
    `[e, 2, f, d]`, heads `[h d, q]` as `[h, d, q]`.

    Args:
        matrices: tensors `[..., m, n]`, each of any shape, float dtype and device.
        coefficients, compute_dtype: as in `newton_schulz`.

    Returns:
        A tensor for each of `matrices`, of its shape and dtype; it may be a view into a shared batch.

    Raises:
        ValueError: as in `newton_schulz`.
    """
    results: dict[int, Tensor] = {}
    for indices in _batches(matrices):
        wide = [_wide(matrices[i]) for i in indices]
        batch = wide[0] if len(wide) == 1 else torch.cat(wide)
        done = newton_schulz(batch, coefficients=coefficients, compute_dtype=compute_dtype, backend=backend)
        for i, part in zip(indices, done.split([len(stack) for stack in wide])):
            tall = matrices[i].shape[-2] > matrices[i].shape[-1]
            results[i] = (part.mT if tall else part).reshape(matrices[i].shape)
    return [results[i] for i in range(len(matrices))]


def _wide(x: Tensor) -> Tensor:
    """`[e, r, c]`: a stack as one axis of matrices, each with its shorter side first."""
    if x.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} among matrices: expected [..., m, n]")
    stack = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    return stack.mT if x.shape[-2] > x.shape[-1] else stack


def _batches(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors to take together: equal sides, dtype and device, up to BATCH elements in order."""
    batches: list[list[int]] = []
    latest: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for i, x in enumerate(matrices):
        key = *sorted(x.shape[-2:]), x.dtype, x.device
        batch, elements = latest.get(key, ([], 0))
        if not batch or elements + x.numel() > BATCH:
            batch, elements = [], 0
            batches.append(batch)
        batch.append(i)
        latest[key] = batch, elements + x.numel()
    return batches
