"""RMSNorm and RoPE in Triton, alone and fused, as operators that autograd, torch.compile and CUDA graphs see whole.

Between forward and backward live x and one number per row. No atomics: a weight's gradient is the ordered sum of one
partial row per program.

b batch · t tokens · n rows (all leading axes of x) · d channels, the last `dim` of them rotated in adjacent pairs
"""

from typing import Any

import torch
from torch import Tensor

from . import launch

__all__ = ["norm_rope", "rms_norm", "rope"]


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


# norm, with or without rotation --------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::norm_rope", mutates_args=())
def _norm(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return launch.norm(x, weight, rotation, eps)


@_norm.register_fake
def _(x: Tensor, weight: Tensor | None, rotation: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("abyssal::norm_rope_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rotation: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return launch.norm_backward(dy, x, weight, rotation, scales)


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
    return launch.rotate(x, rotation, inverse)


@_rope.register_fake
def _(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rotation, ctx.inverse = inputs
    ctx.save_for_backward(rotation)


def _rotate_back(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None


_rope.register_autograd(_rotate_back, setup_context=_keep_rotation)
