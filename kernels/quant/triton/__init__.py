"""The number formats in Triton, bit for bit the definition's, as operators that torch sees whole.

Axes: D channels (the last axis) · R x C rows and columns of a matrix, in blocks of r x c.
"""

from typing import Any

import torch
from torch import Tensor

from .. import eager
from . import launch
from .launch import Blocks

__all__ = ["dequantize", "e2m1_to_e4m3", "fake_quant", "hadamard", "quantize"]

_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def quantize(x: Tensor, format: str, *, block: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """See `kernels.quant.quantize`."""
    codes, scales = _quantize(x.detach(), format == "e4m3", *_rows_columns(block), isinstance(block, int))
    return codes.view(_E4M3) if format == "e4m3" else codes, scales.view(_E8M0)


def dequantize(
    codes: Tensor, scales: Tensor, *, block: int | tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """See `kernels.quant.dequantize`."""
    whole, parts = isinstance(block, int), (codes.view(torch.uint8), scales.view(torch.uint8))
    return _dequantize(*parts, codes.dtype == _E4M3, *_rows_columns(block), whole, dtype)


def fake_quant(x: Tensor, format: str, *, block: int | tuple[int, int]) -> Tensor:
    """See `kernels.quant.fake_quant`."""
    return _fake_quant(x, format == "e4m3", *_rows_columns(block), isinstance(block, int))


def e2m1_to_e4m3(
    codes: Tensor, scales: Tensor, *, group: int = 32, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """See `kernels.quant.e2m1_to_e4m3`."""
    folded, common, lost = _fold(codes.view(torch.uint8), scales.view(torch.uint8), group, *block)
    if bool(lost.any()):
        return eager.e2m1_to_e4m3(codes, scales, group=group, block=block)  # which says what is lost
    return folded.view(_E4M3), common.view(_E8M0)


def hadamard(x: Tensor) -> Tensor:
    """See `kernels.quant.hadamard`."""
    return _hadamard(x)


def _rows_columns(block: int | tuple[int, int]) -> tuple[int, int]:
    return (1, block) if isinstance(block, int) else block


# operators -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::quantize", mutates_args=())
def _quantize(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> tuple[Tensor, Tensor]:
    return launch.quantize(x, e4m3, Blocks.of(x.shape, r, c, lines))


@_quantize.register_fake
def _(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> tuple[Tensor, Tensor]:
    return launch.coded(x, e4m3, Blocks.of(x.shape, r, c, lines))


@torch.library.custom_op("abyssal::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scales: Tensor, e4m3: bool, r: int, c: int, lines: bool, dtype: torch.dtype) -> Tensor:
    y = _decoded(codes, scales, e4m3, r, c, lines, dtype)
    launch.dequantize(codes, scales, y, e4m3, Blocks.of(y.shape, r, c, lines))
    return y


@_dequantize.register_fake
def _decoded(codes: Tensor, scales: Tensor, e4m3: bool, r: int, c: int, lines: bool, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * (1 if e4m3 else 2)), dtype=dtype)


@torch.library.custom_op("abyssal::fake_quant", mutates_args=())
def _fake_quant(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> Tensor:
    return launch.fake_quant(x, e4m3, Blocks.of(x.shape, r, c, lines))


@_fake_quant.register_fake
def _(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None


_fake_quant.register_autograd(_straight_through)


@torch.library.custom_op("abyssal::e2m1_to_e4m3", mutates_args=())
def _fold(codes: Tensor, scales: Tensor, group: int, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch.fold(codes, scales, group, _folded(codes, r, c))


@_fold.register_fake
def _(codes: Tensor, scales: Tensor, group: int, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch.folds(codes, _folded(codes, r, c))


def _folded(codes: Tensor, r: int, c: int) -> Blocks:
    """Those of the values that the codes stand for."""
    return Blocks.of(torch.Size((*codes.shape[:-1], 2 * codes.shape[-1])), r, c, lines=False)


@torch.library.custom_op("abyssal::hadamard", mutates_args=())
def _hadamard(x: Tensor) -> Tensor:
    return launch.hadamard(x)


@_hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _hadamard_again(ctx: Any, grad: Tensor) -> Tensor:
    return _hadamard(grad)


_hadamard.register_autograd(_hadamard_again)
