"""A linear layer whose products and sums are those of float32, whatever its input is kept in: the router's and the
compressors' (V4's release keeps their weights in float32).

    y = W x

Axes: n rows (all leading axes of x) · d channels in · o channels out.
"""

import torch
from torch import Tensor

from ..backend import implementation


def exact_linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """`y = W x` in float32 (float64 where an input is), also under autocast.

    What is not finite gives what is not finite, on a GPU nan where it may be an infinity. Rows do not depend on those
    beside them but for rounding: of few, a GPU makes the product in another way.

    Args:
        x: `[..., d]`, any floating dtype.
        weight: `[o, d]`, any floating dtype.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        `[..., o]`, float32; gradients in the dtypes of `x` and `weight`.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: the released code's `Compressor` and `Gate` (spec B.1).
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: got {weight.dtype} {list(weight.shape)}, allowed is a float tensor [o, d]")
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, allowed is a float tensor [..., {weight.shape[1]}]")
    double = weight if weight.dtype == torch.float64 else x
    return implementation("exact_linear", backend, double).exact_linear(x, weight)
