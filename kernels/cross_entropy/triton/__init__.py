"""Linear cross-entropy in Triton, as operators that torch.compile, autograd, autocast and CUDA graphs see whole.

`kernels` holds the kernel, `launch` the products around it. The gradients are made in the forward pass and scaled in
the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from . import launch

__all__ = ["cross_entropy"]


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """See `kernels.cross_entropy.cross_entropy`."""
    need_x, need_w = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    mean = reduction == "mean"
    return _cross_entropy(x, weight, targets, ignore_index, z_loss, mean, chunk or launch.CHUNK, need_x, need_w)[0]


@torch.library.custom_op("abyssal::cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, chunk: int,
    need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `launch.Outputs`."""
    options = launch.Options(ignore_index, z_loss, mean, chunk)
    return tuple(launch.forward(x, weight, targets, options, need_x, need_w))


@_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, chunk: int,
    need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(launch.new_outputs(x, weight, need_x, need_w))


@torch.library.custom_op("abyssal::cross_entropy_backward", mutates_args=())
def _backward(dloss: Tensor, share: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return launch.backward(dloss, share, dx, dw, dtype)


@_backward.register_fake
def _(dloss: Tensor, share: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dx.new_empty(dx.shape), dw.new_empty(dw.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dloss is None:
        return (None,) * 9
    dx, dw = _backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return dx if needs[0] else None, dw if needs[1] else None, *(None,) * 7


_cross_entropy.register_autograd(_gradients, setup_context=_keep)
