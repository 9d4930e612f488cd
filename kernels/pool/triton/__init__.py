"""The pooling in Triton, as operators that torch.compile, autograd, checkpointing and CUDA graphs see whole.

`kernels` holds the kernels, `launch` their order. Between forward and backward live the inputs alone: the
softmax is worked out once more.

Axes: b batch · t tokens · p entries · D channels of an entry.
"""

from typing import Any

import torch
from torch import Tensor

from . import launch

__all__ = ["pool"]


def pool(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    ratio: int,
    overlap: bool,
    first: Tensor | None = None,
    follows: Tensor | None = None,
) -> Tensor:
    """See `kernels.pool.pool`."""
    return _pool(kv, gate, bias, first, follows, ratio, overlap)


@torch.library.custom_op("abyssal::pool", mutates_args=())
def _pool(
    kv: Tensor, gate: Tensor, bias: Tensor, first: Tensor | None, follows: Tensor | None, ratio: int, overlap: bool
) -> Tensor:
    return launch.forward(kv, gate, bias, launch.Windows(first, follows, ratio, overlap))


@_pool.register_fake
def _(
    kv: Tensor, gate: Tensor, bias: Tensor, first: Tensor | None, follows: Tensor | None, ratio: int, overlap: bool
) -> Tensor:
    return launch.output(kv, launch.Windows(first, follows, ratio, overlap))


@torch.library.custom_op("abyssal::pool_backward", mutates_args=())
def _pool_backward(
    dout: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, first: Tensor | None, follows: Tensor | None,
    ratio: int, overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.backward(dout, kv, gate, bias, launch.Windows(first, follows, ratio, overlap))


@_pool_backward.register_fake
def _(
    dout: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, first: Tensor | None, follows: Tensor | None,
    ratio: int, overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dkv, dgate, dbias = (x.new_empty(x.shape) for x in (kv, gate, bias))
    return dkv, dgate, dbias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kv, gate, bias, first, follows, ctx.ratio, ctx.overlap = inputs
    ctx.save_for_backward(kv, gate, bias, first, follows)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = _pool_backward(dout, *ctx.saved_tensors, ctx.ratio, ctx.overlap)
    return *grads, None, None, None, None


_pool.register_autograd(_gradients, setup_context=_keep)
