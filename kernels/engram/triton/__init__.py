"""Engram in Triton, as operators that torch.compile, autograd, autocast, checkpointing and CUDA graphs see whole.

Between forward and backward live the inputs and three fp32 scalars per token and stream. The gradient of a table is its
rows' sums over their look-ups, sorted stably by row: whatever collides adds up in the order of the tokens.

b batch · t tokens · n streams · d width · o orders · k heads per order · r table rows · w their width · q look-ups
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device
from ...triton.scatter import entry_lists, scatter_sum
from . import kernels

__all__ = ["engram_gate", "engram_gather", "engram_hash"]

ELEMENTS = 2048  # of a block of streams by columns
STRIP, STRIPS = 64, 256  # tokens of a strip at least, strips at most
SHARES = 16  # of strips, summed at once


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
    ids, multipliers, moduli, offsets = (x.contiguous() for x in (ids, multipliers, moduli, offsets))
    start, history = (x if x is None else x.contiguous() for x in (start, history))
    (b, t), (orders, k) = ids.shape, moduli.shape
    out = ids.new_empty(b, t, orders * k)
    heads = next_power(k)
    tokens = max(256 // heads, 1)
    with on_device(ids):
        kernels.hash_rows[triton.cdiv(b * t, tokens),](
            ids, multipliers, moduli, offsets, start, history, out, b * t, t, k, pad,
            t if start is not None and len(start) > 1 else 0,
            STARTED=start is not None, CONTINUED=history is not None, ORDERS=orders, TOKENS=tokens, HEADS=heads,
        )  # fmt: skip
    return out


@_hash.register_fake
def _(
    ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor, pad: int,
    start: Tensor | None, history: Tensor | None,
) -> Tensor:  # fmt: skip
    return ids.new_empty(*ids.shape, moduli.numel())


# gather --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::engram_gather", mutates_args=())
def _gather(table: Tensor, rows: Tensor) -> Tensor:
    table, rows = table.contiguous(), rows.contiguous()
    (r, w), q = table.shape, len(rows)
    out = table.new_empty(q, w)
    columns = min(next_power(w), 256, ELEMENTS)
    lookups = ELEMENTS // columns
    with on_device(table):
        kernels.gather_rows[triton.cdiv(q, lookups), triton.cdiv(w, columns)](
            table, rows, out, r, q, w, LOOKUPS=lookups, COLUMNS=columns
        )
    return out


@_gather.register_fake
def _(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(len(rows), table.shape[1])


@torch.library.custom_op("abyssal::engram_gather_backward", mutates_args=())
def _sum_lookups(grad: Tensor, rows: Tensor, r: int) -> Tensor:
    """`[r, w]`: each row's sum of grad `[q, w]` over the look-ups of it, in their order."""
    q, w = grad.shape
    sums = scatter_sum(grad.reshape(1, q, 1, w), entry_lists(rows.view(1, q, 1), r))
    return sums.view(r, w).to(grad.dtype)


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
    h, key, value = (_rows_apart(x) for x in (h, key, value))
    tokens, n, d = h.shape
    out, dots, h_rms, k_rms = outputs = _gate_outputs(h, key, value, weight_h, weight_k, eps)
    with on_device(h):
        kernels.gate_forward[tokens,](
            h, key, value, _product(weight_h, weight_k), dots, h_rms, k_rms, out, n, d,
            h.stride(0), key.stride(0), value.stride(0), eps, d**-0.5, **_block(n, d),
        )  # fmt: skip
    return outputs


@_gated.register_fake
def _gate_outputs(
    h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dots, h_rms, k_rms = (h.new_empty(h.shape[:2], dtype=torch.float32) for _ in range(3))
    return h.new_empty(h.shape), dots, h_rms, k_rms


@torch.library.custom_op("abyssal::engram_gate_backward", mutates_args=())
def _gate_gradients(
    grad: Tensor, h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor,
    dots: Tensor, h_rms: Tensor, k_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, h, key, value = (_rows_apart(x) for x in (grad, h, key, value))
    weight_h, weight_k = weight_h.contiguous(), weight_k.contiguous()
    tokens, n, d = h.shape
    outputs = _gradients_of(h, key, value, weight_h, weight_k)
    dh, dkey, dvalue, dweight_h, dweight_k = outputs
    strip = max(triton.cdiv(tokens, STRIPS), STRIP)
    strips = triton.cdiv(tokens, strip)
    ddots, shares = dots.new_empty(dots.shape), dots.new_empty(strips, n, d)
    block = _block(n, d)
    with on_device(h):
        kernels.gate_slopes[tokens,](
            grad, value, dots, h_rms, k_rms, dvalue, ddots, n, d, grad.stride(0), value.stride(0), d**-0.5, **block
        )
        kernels.gate_backward[strips, triton.cdiv(d, block["COLUMNS"])](
            h, key, _product(weight_h, weight_k), dots, h_rms, k_rms, ddots, dh, dkey, shares,
            tokens, strip, n, d, h.stride(0), key.stride(0), **block,
        )  # fmt: skip
        kernels.sum_shares[triton.cdiv(n * d, 128),](
            shares, weight_h, weight_k, dweight_h, dweight_k, strips, n * d, STRIPS=SHARES, COLUMNS=128
        )
    return outputs


@_gate_gradients.register_fake
def _(
    grad: Tensor, h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor,
    dots: Tensor, h_rms: Tensor, k_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients_of(h, key, value, weight_h, weight_k)


def _gradients_of(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh, dkey, dvalue, dweight_h, dweight_k = (x.new_empty(x.shape) for x in inputs)
    return dh, dkey, dvalue, dweight_h, dweight_k


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *_gate_gradients(grad, *ctx.saved_tensors), None


_gated.register_autograd(_gradients, setup_context=_keep)


def _rows_apart(x: Tensor) -> Tensor:
    """x where a token's values lie side by side, whatever lies between two tokens; else a copy of it."""
    return x if x.stride()[1:] == x.new_empty(0, *x.shape[1:]).stride()[1:] else x.contiguous()


def _product(weight_h: Tensor, weight_k: Tensor) -> Tensor:
    return (weight_h.float() * weight_k.float()).contiguous()


def _block(n: int, d: int) -> dict[str, int]:
    """All streams by a block of columns."""
    wide = next_power(n)
    return {"N": wide, "COLUMNS": min(next_power(d), max(ELEMENTS // wide, 1))}
