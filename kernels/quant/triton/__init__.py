"""The number formats in Triton, bit for bit those of the reference, as operators that torch sees whole.

Axes: D channels (the last axis) · R x C rows and columns of a matrix, in blocks of r x c.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device, registers
from .. import eager
from . import kernels

__all__ = ["dequantize", "e2m1_to_e4m3", "fake_quant", "hadamard", "quantize"]

HELD = 4096  # elements that a program holds at most: a larger block is read twice
FEW = 2048  # that a program takes where blocks are smaller
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


# launches ------------------------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """How matrices are cut: R, C of a matrix, r, c of a block, blocks down and across, matrices."""

    rows: int
    columns: int
    r: int
    c: int
    down: int
    across: int
    matrices: int

    @classmethod
    def of(cls, shape: torch.Size, r: int, c: int, lines: bool) -> "_Blocks":
        """`lines`: blocks are groups within the last axis; all other axes are rows of one matrix."""
        matrices, rows = (1, shape[:-1].numel()) if lines else (shape[:-2].numel(), shape[-2])
        return cls(rows, shape[-1], r, c, triton.cdiv(rows, r), triton.cdiv(shape[-1], c), matrices)

    @property
    def number(self) -> int:
        return self.matrices * self.down * self.across

    def options(self) -> tuple[tuple[int], dict[str, int]]:
        """The grid over blocks and what a program holds."""
        columns = next_power(self.c, 2)
        everything = next_power(self.r) * columns
        held = min(everything, HELD)
        blocks = max(FEW // everything, 1)
        warps = max(blocks * held // 512, 1)
        tile = {"G": blocks, "W": held, "ALL": everything, "COLUMNS": columns, "num_warps": warps}
        return (triton.cdiv(self.number, blocks),), tile

    def arguments(self) -> tuple[int, ...]:
        return self[:6]


def _scales_shape(shape: torch.Size, b: _Blocks, lines: bool) -> tuple[int, ...]:
    return (*shape[:-1], b.across) if lines else (*shape[:-2], b.down, b.across)


def _encode(x: Tensor, b: _Blocks, e4m3: bool, codes: Tensor, scales: Tensor, y: Tensor, fake: bool) -> None:
    """Fills in codes and scales, or y. Two e2m1 codes make a byte at once unless blocks cut through bytes."""
    pack = not e4m3 and b.c % 2 == 0
    single = codes if e4m3 or pack or fake else codes.new_empty(x.shape)
    grid, tile = b.options()
    with on_device(x):
        kernels.encode[grid](
            x.contiguous(), single, scales, y, b.number, *b.arguments(), E4M3=e4m3, FAKE=fake, PACK=pack, **tile
        )
        if single is not codes:
            torch.bitwise_or(single[..., 0::2], single[..., 1::2] << 4, out=codes)


@torch.library.custom_op("abyssal::quantize", mutates_args=())
def _quantize(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _quantized(x, e4m3, r, c, lines)
    _encode(x, _Blocks.of(x.shape, r, c, lines), e4m3, codes, scales, x, fake=False)
    return codes, scales


@_quantize.register_fake
def _quantized(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> tuple[Tensor, Tensor]:
    codes = (*x.shape[:-1], x.shape[-1] if e4m3 else x.shape[-1] // 2)
    scales = _scales_shape(x.shape, _Blocks.of(x.shape, r, c, lines), lines)
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.uint8)


@torch.library.custom_op("abyssal::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scales: Tensor, e4m3: bool, r: int, c: int, lines: bool, dtype: torch.dtype) -> Tensor:
    y = _dequantized(codes, scales, e4m3, r, c, lines, dtype)
    codes, scales = codes.contiguous(), scales.contiguous()
    b = _Blocks.of(y.shape, r, c, lines)
    columns = min(next_power(b.columns), 1024)
    grid = triton.cdiv(b.matrices * b.rows, 1024 // columns), triton.cdiv(b.columns, columns)
    with on_device(codes):
        kernels.decode[grid](
            codes, scales, y, b.matrices * b.rows, *b.arguments(),
            E4M3=e4m3, WIDE=dtype == torch.float64, ROWS=1024 // columns, COLUMNS=columns,
        )  # fmt: skip
    return y


@_dequantize.register_fake
def _dequantized(codes: Tensor, scales: Tensor, e4m3: bool, r: int, c: int, lines: bool, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * (1 if e4m3 else 2)), dtype=dtype)


@torch.library.custom_op("abyssal::fake_quant", mutates_args=())
def _fake_quant(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> Tensor:
    y = x.new_empty(x.shape)
    _encode(x, _Blocks.of(x.shape, r, c, lines), e4m3, y, y, y, fake=True)
    return y


@_fake_quant.register_fake
def _(x: Tensor, e4m3: bool, r: int, c: int, lines: bool) -> Tensor:
    return x.new_empty(x.shape)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None


_fake_quant.register_autograd(_straight_through)


@torch.library.custom_op("abyssal::e2m1_to_e4m3", mutates_args=())
def _fold(codes: Tensor, scales: Tensor, group: int, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    folded, common, lost = _folded(codes, scales, group, r, c)
    b = _Blocks.of(folded.shape, r, c, lines=False)
    grid, tile = b.options()
    tile |= registers(tile["num_warps"])
    with on_device(codes):
        kernels.fold[grid](
            codes.contiguous(), scales.contiguous(), folded, common, lost, b.number, *b.arguments(), group, **tile
        )
    return folded, common, lost


@_fold.register_fake
def _folded(codes: Tensor, scales: Tensor, group: int, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))
    b = _Blocks.of(shape, r, c, lines=False)
    lost = codes.new_empty(b.number, dtype=torch.int32)
    return codes.new_empty(shape), codes.new_empty(_scales_shape(shape, b, lines=False)), lost


@torch.library.custom_op("abyssal::hadamard", mutates_args=())
def _hadamard(x: Tensor) -> Tensor:
    x = x.contiguous()
    y, d, n = x.new_empty(x.shape), x.shape[-1], x.shape[:-1].numel()
    rows = max(FEW // d, 1)
    with on_device(x):
        kernels.walsh_hadamard[(triton.cdiv(n, rows),)](
            x, y, n, d**-0.5, D=d, BITS=d.bit_length() - 1, ROWS=rows, num_warps=min(max(rows * d // 512, 1), 16)
        )
    return y


@_hadamard.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _hadamard_again(ctx: Any, grad: Tensor) -> Tensor:
    return _hadamard(grad)


_hadamard.register_autograd(_hadamard_again)
