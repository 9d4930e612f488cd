"""The linear layer by the tensor cores, as operators that torch.compile, autograd, checkpointing and CUDA graphs see
whole. A float32 number is the sum of three of bfloat16, and the product of two of those is exact in float32:

    W = W1 + W2 + W3        y = W1 x + W2 x + W3 x

of a bfloat16 x, by torch's products of halves into float32, many times as fast as its products of float32, for which
NVIDIA has no tensor cores. `kernels` holds what splits, `launch` what multiplies.

Axes: d channels in · o channels out.
"""

from typing import Any

import torch
from torch import Tensor

from .. import eager
from . import launch

__all__ = ["exact_linear"]


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `kernels.exact_linear.exact_linear`. Other dtypes, few rows and little work are left to torch."""
    if launch.fits(x, weight):
        return _exact_linear(x, weight)
    return eager.exact_linear(x, weight)


@torch.library.custom_op("abyssal::exact_linear", mutates_args=())
def _exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    return launch.forward(x, weight)


@_exact_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)


@torch.library.custom_op("abyssal::exact_linear_backward", mutates_args=())
def _exact_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return launch.backward(dy, x, weight, need_x, need_weight)


@_exact_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    needs = ctx.needs_input_grad
    dx, dweight = _exact_linear_backward(dy, *ctx.saved_tensors, *needs)
    return dx if needs[0] else None, dweight if needs[1] else None


_exact_linear.register_autograd(_gradients, setup_context=_keep)
