"""Engram in Triton, as operators that torch.compile, autograd, autocast, checkpointing and CUDA graphs see whole.

Between forward and backward live the inputs and three fp32 scalars per token and stream. The gradient of a table is its
rows' sums over their look-ups, sorted stably by row: whatever collides adds up in the order of the tokens.

b batch · t tokens · n streams · d width · o orders · k heads per order · r table rows · w their width · q look-ups
"""

from typing import Any

import torch
from torch import Tensor

from . import launch

__all__ = ["engram_gate", "engram_gather", "engram_hash"]


def engram_hash(
    ids: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    *,
    pad: int,
    start: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """See `kernels.engram.engram_hash`."""
    return _hash(ids, multipliers, moduli, offsets, pad, start, history)


def engram_gather(table: Tensor, rows: Tensor) -> Tensor:
    """See `kernels.engram.engram_gather`; NaN for a row that the table does not have."""
    return _gather(table, rows.flatten()).view(*rows.shape[:2], rows.shape[2] * table.shape[1])


def engram_gate(
    streams: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, *, eps: float
) -> Tensor:
    """See `kernels.engram.engram_gate`."""
    tokens = streams.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    return _gated(*tokens, weight_h, weight_k, eps)[0].view(streams.shape)


# hash ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::engram_hash", mutates_args=())
def _hash(
    ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor, pad: int,
    start: Tensor | None, history: Tensor | None,
) -> Tensor:  # fmt: skip
    return launch.hash_rows(ids, multipliers, moduli, offsets, pad, start, history)


@_hash.register_fake
def _(
    ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor, pad: int,
    start: Tensor | None, history: Tensor | None,
) -> Tensor:  # fmt: skip
    return ids.new_empty(*ids.shape, moduli.numel())


# gather --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::engram_gather", mutates_args=())
def _gather(table: Tensor, rows: Tensor) -> Tensor:
    return launch.gather(table, rows)


@_gather.register_fake
def _(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(len(rows), table.shape[1])


@torch.library.custom_op("abyssal::engram_gather_backward", mutates_args=())
def _sum_lookups(grad: Tensor, rows: Tensor, r: int) -> Tensor:
    return launch.sum_lookups(grad, rows, r)


@_sum_lookups.register_fake
def _(grad: Tensor, rows: Tensor, r: int) -> Tensor:
    return grad.new_empty(r, grad.shape[1])


def _keep_rows(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.r = len(inputs[0])
    ctx.save_for_backward(inputs[1])


def _table_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _sum_lookups(grad, ctx.saved_tensors[0], ctx.r), None


_gather.register_autograd(_table_gradient, setup_context=_keep_rows)


# gate ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::engram_gate", mutates_args=())
def _gated(
    h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, kept = launch.gate(launch.Inputs(h, key, value, weight_h, weight_k), eps)
    return out, *kept


@_gated.register_fake
def _(
    h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, kept = launch.gate_outputs(h)
    return out, *kept


@torch.library.custom_op("abyssal::engram_gate_backward", mutates_args=())
def _gate_gradients(
    grad: Tensor, h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor,
    dots: Tensor, h_rms: Tensor, k_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = launch.Inputs(h, key, value, weight_h, weight_k)
    return launch.gate_backward(grad, inputs, launch.Statistics(dots, h_rms, k_rms))


@_gate_gradients.register_fake
def _(
    grad: Tensor, h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor,
    dots: Tensor, h_rms: Tensor, k_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dh, dkey, dvalue, dweight_h, dweight_k = (x.new_empty(x.shape) for x in (h, key, value, weight_h, weight_k))
    return dh, dkey, dvalue, dweight_h, dweight_k


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_gate_gradients(grad, *ctx.saved_tensors), None


_gated.register_autograd(_gradients, setup_context=_keep)
