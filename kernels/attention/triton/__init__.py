"""Attention in Triton, as operators that torch.compile, autograd, autocast, checkpointing and CUDA graphs see whole.

`forward`, `backward` and `decode` hold the kernels, `seen` what they share, `launch` their order and blocks. Between
forward and backward live the inputs, out and the log-sum-exp.

b batch · t queries · h query heads · d head dim · s window rows · p compressed entries · k picked entries
"""

from typing import Any

import torch
from torch import Tensor

from . import launch

__all__ = ["attention"]


def attention(
    q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor,
    *, window: int, scale: float, window_start: Tensor | None = None,
    start: Tensor | None = None, end: Tensor | None = None, index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kernels.attention.attention`."""
    dtype = torch.promote_types(q.dtype, kv.dtype)
    if compressed is not None:
        dtype = torch.promote_types(dtype, compressed.dtype)
        compressed = compressed.to(dtype)
    if index is not None:
        start = end = None
    out, lse = _attention(q.to(dtype), kv.to(dtype), compressed, sink, window_start, start, end, index, window, scale)
    return out.to(q.dtype), lse.detach()


@torch.library.custom_op("abyssal::attention", mutates_args=())
def _attention(
    q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor,
    window_start: Tensor | None, start: Tensor | None, end: Tensor | None, index: Tensor | None,
    window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mask = launch.Mask(window, window_start, start, end, index)
    return launch.forward(launch.Inputs(q, kv, compressed, sink, mask, scale))


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("abyssal::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, out: Tensor, lse: Tensor,
    window_start: Tensor | None, start: Tensor | None, end: Tensor | None, index: Tensor | None,
    window: int, scale: float, need_q: bool, need_kv: bool, need_compressed: bool, need_sink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mask = launch.Mask(window, window_start, start, end, index)
    needs = launch.Needs(need_q, need_kv, need_compressed, need_sink)
    grads = launch.backward(dout, launch.Inputs(q, kv, compressed, sink, mask, scale), out, lse, needs)
    dq, dkv, dcompressed, dsink = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dkv, dcompressed, dsink


@_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, out: Tensor, lse: Tensor,
    window_start: Tensor | None, start: Tensor | None, end: Tensor | None, index: Tensor | None,
    window: int, scale: float, need_q: bool, need_kv: bool, need_compressed: bool, need_sink: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    needed = (q, need_q), (kv, need_kv), (compressed, need_compressed), (sink, need_sink)
    dq, dkv, dcompressed, dsink = (
        x.new_empty(x.shape) if need and x is not None else q.new_empty(0) for x, need in needed
    )
    return dq, dkv, dcompressed, dsink


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, compressed, sink, *bounds, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, compressed, sink, *output, *bounds)


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 10
    needs = ctx.needs_input_grad[:4]
    grads = _attention_backward(dout, *ctx.saved_tensors, ctx.window, ctx.scale, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs)), *(None,) * 6


_attention.register_autograd(_gradients, setup_context=_keep)
