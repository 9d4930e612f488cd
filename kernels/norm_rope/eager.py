"""The eager engine of RMSNorm and RoPE: in blocks of rows, with their backward passes written out.

Axes: t rows (all leading axes of x) · d channels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..precision import accumulation, tracked

_BLOCK_VALUES = 1 << 18  # rows are worked on in blocks of this many values, which stay in the cache


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.numel() <= _BLOCK_VALUES and not tracked(x, weight):
        return _normed(x, weight, eps)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)


def rope(x: Tensor, rotation: Tensor, *, inverse: bool = False) -> Tensor:
    if not tracked(x):
        return _rotated(x, rotation, inverse)
    return _Rope.apply(x, rotation, inverse)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, rotation: Tensor) -> Tensor:
    return rope(rms_norm(x, weight, eps), rotation)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """One block, of which nothing is kept."""
    wide = x.to(accumulation(x))
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = wide * r
    return (y if weight is None else y.mul_(weight)).to(x.dtype)


class _RMSNorm(Function):
    """`y = w x r` with `r = 1 / sqrt(mean(x^2) + eps)`. Saves x, w and r.

    dx = r (w dy - r^2 mean(x w dy) x)        dw = sum_t r x dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        dtype = accumulation(x)
        y = x.new_empty(x.shape)
        r = x.new_empty(len(x), 1, dtype=dtype)
        for rows in _blocks(x):
            block = x[rows].to(dtype)
            scale = torch.linalg.vector_norm(block, dim=1, keepdim=True, out=r[rows])
            block = block * scale.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            y[rows] = block if weight is None else block.mul_(weight)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        factor = x.new_ones(x.shape[1], dtype=r.dtype) if weight is None else weight.to(r.dtype)
        dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        dfactor = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for rows in _blocks(x):
            block, grad, scale = x[rows].to(r.dtype), dy[rows].to(r.dtype), r[rows]
            product = block * grad
            if dfactor is not None:
                dfactor.addmv_(product.t(), scale[:, 0])
            if dx is not None:
                shrink = torch.mv(product, factor, out=scale.new_empty(len(scale)))[:, None]
                shrink.mul_(scale).mul_(scale).div_(-x.shape[1])
                dx[rows] = torch.mul(grad, factor, out=product).addcmul_(block, shrink).mul_(scale)
        return dx, None if dfactor is None else dfactor.to(weight.dtype), None


def _blocks(x: Tensor) -> Iterator[slice]:
    """The rows of [t, d] in blocks of about `_BLOCK_VALUES` values."""
    size = max(1, _BLOCK_VALUES // x.shape[1])
    return (slice(start, start + size) for start in range(0, len(x), size))


class _Rope(Function):
    """The rotation is orthogonal: the gradient is rotated back. Saves the rotation only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
        ctx.save_for_backward(rotation)
        ctx.inverse = inverse
        return _rotated(x, rotation, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rotation,) = ctx.saved_tensors
        return _rotated(grad, rotation, not ctx.inverse), None, None


def _rotated(x: Tensor, rotation: Tensor, inverse: bool) -> Tensor:
    dim = 2 * rotation.shape[2]
    rotation = rotation.view(*rotation.shape[:2], *[1] * (x.ndim - 3), dim // 2)
    rotation = rotation.conj_physical() if inverse else rotation  # compiled code would drop a lazy one
    result = x.clone(memory_format=torch.contiguous_format)
    pairs = result[..., x.shape[-1] - dim :].unflatten(-1, (-1, 2))
    if x.dtype == accumulation(x) and x.shape[-1] % 2 == 0:
        torch.view_as_complex(pairs).mul_(rotation)
    else:
        turned = torch.view_as_complex(pairs.to(accumulation(x)).contiguous()) * rotation
        pairs.copy_(torch.view_as_real(turned))
    return result
