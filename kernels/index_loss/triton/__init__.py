"""The indexer's loss in Triton, as operators that torch.compile, autograd, checkpointing and CUDA graphs see whole.

As in eager the gradients are made in the forward pass, where the loss is: between forward and backward live
those of the index queries and weights, in their dtypes, and of the index keys in float32. The backward pass scales them
by dloss / queries. `kernels` holds the kernels, `launch` their order and blocks.

b batch · t queries · h attention heads · d head dim · i index heads · e index head dim · p entries · k picks
"""

from typing import Any

import torch
from torch import Tensor

from . import launch
from .launch import Compared, Student, Teacher

__all__ = ["index_loss"]


def index_loss(
    index_q: Tensor,
    index_weights: Tensor,
    index_keys: Tensor,
    q: Tensor,
    compressed: Tensor,
    lse: Tensor,
    *,
    scale: float,
    start: Tensor,
    end: Tensor,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.index_loss.index_loss`."""
    student = index_q, index_weights, index_keys
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    teacher = q.detach(), compressed.detach(), lse.detach()
    loss, share, *_ = _index_loss(*student, *teacher, scale, start, end, index, wanted)
    return loss, share.detach()


@torch.library.custom_op("abyssal::index_loss", mutates_args=())
def _index_loss(
    index_q: Tensor, index_weights: Tensor, index_keys: Tensor, q: Tensor, compressed: Tensor, lse: Tensor,
    scale: float, start: Tensor, end: Tensor, index: Tensor | None, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    student, teacher = Student(index_q, index_weights, index_keys), Teacher(q, lse, compressed)
    loss, share, queries, gradients = launch.index_loss(student, teacher, Compared(index, start, end), scale, wanted)
    return loss, share, queries, *gradients


@_index_loss.register_fake
def _(
    index_q: Tensor, index_weights: Tensor, index_keys: Tensor, q: Tensor, compressed: Tensor, lse: Tensor,
    scale: float, start: Tensor, end: Tensor, index: Tensor | None, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, share, queries = (q.new_empty((), dtype=torch.float32) for _ in range(3))
    dq, dweights = (x.new_empty(x.shape if wanted else (0,)) for x in (index_q, index_weights))
    dkeys = index_keys.new_empty(index_keys.shape if wanted else (0,), dtype=torch.float32)
    return loss, share, queries, dq, dweights, dkeys


@torch.library.custom_op("abyssal::index_loss_backward", mutates_args=())
def _scaled(gradient: Tensor, dloss: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient dloss / queries`, in float32 and rounded once, without a float32 copy."""
    return torch.mul(gradient, (dloss / queries).view(1), out=gradient.new_empty(gradient.shape, dtype=dtype))


@_scaled.register_fake
def _(gradient: Tensor, dloss: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [x.dtype for x in inputs[:3]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    queries, *gradients = ctx.saved_tensors
    student = zip(gradients, ctx.dtypes, ctx.needs_input_grad)
    return *(_scaled(g, dloss, queries, dtype) if need else None for g, dtype, need in student), *(None,) * 8


_index_loss.register_autograd(_gradients, setup_context=_keep)
