"""RMSNorm and RoPE in Triton, alone and fused, as operators that autograd, torch.compile and CUDA graphs see whole.

Between forward and backward live x and one number per row. No atomics: a weight's gradient is the ordered sum of one
partial row per program.

b batch · t tokens · n rows (all leading axes of x) · d channels, the last `dim` of them rotated in adjacent pairs
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device
from . import kernels

__all__ = ["norm_rope", "rms_norm", "rope"]

VALUES = 2048  # that a program holds, in whole rows: 8 to a thread
PROGRAMS = 512  # of the backward pass, each of which leaves a partial gradient of the weight


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `kernels.norm_rope.rms_norm`."""
    return _norm(x, weight, None, eps)[0]


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, rotation: Tensor) -> Tensor:
    """See `kernels.norm_rope.norm_rope`."""
    return _norm(x, weight, _angles(rotation), eps)[0]


def rope(x: Tensor, rotation: Tensor, *, inverse: bool = False) -> Tensor:
    """See `kernels.norm_rope.rope`."""
    return _rope(x, _angles(rotation), inverse)


def _angles(rotation: Tensor) -> Tensor:
    """cos and sin, float32 [b|1, t, dim / 2, 2]."""
    return torch.view_as_real(rotation.detach().resolve_conj()).float()


# launches ------------------------------------------------------------------------------------------------------------


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


def _forward(
    x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float, norm: bool, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    x, weight, rotation = (t if t is None else t.contiguous() for t in (x, weight, rotation))
    n, d = x.shape[:-1].numel(), x.shape[-1]
    y, scales = x.new_empty(x.shape), x.new_empty(n if norm else 0, dtype=torch.float32)
    turns = _turns(x, rotation)
    options = _blocks(d, turns[0])
    with on_device(x):
        kernels.norm_rope_forward[(triton.cdiv(n, options["ROWS"]),)](
            x, weight, rotation, y, scales, n, d, *turns, eps, -1.0 if inverse else 1.0,
            NORM=norm, WEIGHT=weight is not None, TURN=rotation is not None, **options,
        )  # fmt: skip
    return y, scales


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor]:
    dy, x, weight, rotation = (t if t is None else t.contiguous() for t in (dy, x, weight, rotation))
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


# norm, with or without rotation --------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::norm_rope", mutates_args=())
def _norm(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, rotation, eps, norm=True)


@_norm.register_fake
def _(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("abyssal::norm_rope_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return _backward(dy, x, weight, rotation, scales)


@_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, scales: Tensor) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(0, x.shape[-1], dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, rotation, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rotation, output[1])


def _gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    dx, dweight = _norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None


_norm.register_autograd(_gradients, setup_context=_keep)


# rotation alone ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::rope", mutates_args=())
def _rope(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
    return _forward(x, None, rotation, 0.0, norm=False, inverse=inverse)[0]


@_rope.register_fake
def _(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rotation, ctx.inverse = inputs
    ctx.save_for_backward(rotation)


def _rotated_back(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None


_rope.register_autograd(_rotated_back, setup_context=_keep_rotation)
