"""Launches of the kernels of RMSNorm and RoPE: over what grid, with what blocks.

b batch · t tokens · n rows (all leading axes of x) · d channels, the last `dim` of them rotated in adjacent pairs
"""

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device
from . import kernels

VALUES = 2048  # that a program holds, in whole rows: 8 to a thread
PROGRAMS = 512  # of the backward pass, each of which leaves a partial gradient of the weight


def norm(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y, and `1 / rms` of each row, fp32 `[n]`; rotation `[b|1, t, dim / 2, 2]` holds cos and sin."""
    scales = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return _forward(x, weight, rotation, scales, eps=eps), scales


def rotate(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
    return _forward(x, None, rotation, None, sign=-1.0 if inverse else 1.0)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    rotation: Tensor | None,
    scales: Tensor | None,
    eps: float = 0.0,
    sign: float = 1.0,
) -> Tensor:
    """`scales` takes those of the norm; without it nothing is normed."""
    x, weight, rotation = (v if v is None else v.contiguous() for v in (x, weight, rotation))
    n, d = x.shape[:-1].numel(), x.shape[-1]
    y, turns = x.new_empty(x.shape), _turns(x, rotation)
    options = _blocks(d, turns[0])
    with on_device(x):
        kernels.norm_rope_forward[(triton.cdiv(n, options["ROWS"]),)](
            x, weight, rotation, y, scales, n, d, *turns, eps, sign,
            NORM=scales is not None, WEIGHT=weight is not None, TURN=rotation is not None, **options,
        )  # fmt: skip
    return y


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and dweight; the latter is `[0, d]` without a weight."""
    dy, x, weight, rotation = (v if v is None else v.contiguous() for v in (dy, x, weight, rotation))
    n, d = len(scales), x.shape[-1]
    turns = _turns(x, rotation)
    options = _blocks(d, turns[0])
    blocks = triton.cdiv(n, options["ROWS"])
    programs = blocks if weight is None else min(blocks, PROGRAMS)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(0 if weight is None else programs, d, dtype=torch.float32)
    with on_device(x):
        kernels.norm_rope_backward[(programs,)](
            dy, x, weight, rotation, scales, dx, partial, n, d, *turns,
            WEIGHT=weight is not None, TURN=rotation is not None, **options,
        )  # fmt: skip
        return dx, partial if weight is None else partial.sum(0).to(weight.dtype)


def _blocks(d: int, dim: int) -> dict[str, int]:
    """Whole rows, of about `VALUES` values; a function of the widths alone."""
    plain, pairs = next_power(d - dim), next_power(dim // 2)
    rows = max(VALUES // next_power(d), 1)
    warps = min(max(rows * next_power(d) // 256, 1), 16)
    return {"ROWS": rows, "PLAIN": plain, "P": pairs, "num_warps": warps}


def _turns(x: Tensor, rotation: Tensor | None) -> tuple[int, int, int]:
    """Rotated channels, rows that share a token's rotation, and tokens after which the rotations begin anew."""
    if rotation is None:
        return 0, 1, 1
    return 2 * rotation.shape[2], x.shape[2:-1].numel(), rotation.shape[0] * rotation.shape[1]
