"""Launches of the number formats' kernels: how tensors are cut into blocks, and blocks given to programs.

D channels (the last axis) · R x C rows and columns of a matrix, in blocks of r x c
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device, registers
from . import kernels

HELD = 4096  # elements that a program holds at most: a larger block is read twice
FEW = 2048  # that a program takes where blocks are smaller


class Blocks(NamedTuple):
    """How matrices are cut: R, C of a matrix, r, c of a block, blocks down and across; all of them, and the shape of
    their scales.
    """

    rows: int
    columns: int
    r: int
    c: int
    down: int
    across: int
    matrices: int
    scales: tuple[int, ...]

    @classmethod
    def of(cls, shape: torch.Size, r: int, c: int, lines: bool) -> "Blocks":
        """`lines`: blocks are groups within the last axis; all other axes are rows of one matrix."""
        matrices, rows = (1, shape[:-1].numel()) if lines else (shape[:-2].numel(), shape[-2])
        down, across = triton.cdiv(rows, r), triton.cdiv(shape[-1], c)
        scales = (*shape[:-1], across) if lines else (*shape[:-2], down, across)
        return cls(rows, shape[-1], r, c, down, across, matrices, scales)

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
        return self.rows, self.columns, self.r, self.c, self.down, self.across


def quantize(x: Tensor, e4m3: bool, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Codes and scales, as bytes. Two e2m1 codes make a byte at once unless blocks cut through bytes."""
    codes, scales = coded(x, e4m3, blocks)
    pack = not e4m3 and blocks.c % 2 == 0
    single = codes if e4m3 or pack else codes.new_empty(x.shape)
    _encode(x, blocks, codes=single, scales=scales, y=x, E4M3=e4m3, FAKE=False, PACK=pack)
    if single is not codes:
        with on_device(x):
            torch.bitwise_or(single[..., 0::2], single[..., 1::2] << 4, out=codes)
    return codes, scales


def coded(x: Tensor, e4m3: bool, blocks: Blocks) -> tuple[Tensor, Tensor]:
    codes = (*x.shape[:-1], x.shape[-1] // (1 if e4m3 else 2))
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(blocks.scales, dtype=torch.uint8)


def fake_quant(x: Tensor, e4m3: bool, blocks: Blocks) -> Tensor:
    y = x.new_empty(x.shape)
    _encode(x, blocks, codes=y, scales=y, y=y, E4M3=e4m3, FAKE=True, PACK=False)
    return y


def _encode(x: Tensor, blocks: Blocks, *, codes: Tensor, scales: Tensor, y: Tensor, **forms: bool) -> None:
    """Fills in codes and scales, or y."""
    grid, tile = blocks.options()
    with on_device(x):
        kernels.encode[grid](x.contiguous(), codes, scales, y, blocks.number, *blocks.arguments(), **forms, **tile)


def dequantize(codes: Tensor, scales: Tensor, y: Tensor, e4m3: bool, blocks: Blocks) -> None:
    """Fills in y, in panels of the rows of all matrices."""
    rows, columns = blocks.matrices * blocks.rows, min(next_power(blocks.columns), 1024)
    grid = triton.cdiv(rows, 1024 // columns), triton.cdiv(blocks.columns, columns)
    with on_device(codes):
        kernels.decode[grid](
            codes.contiguous(), scales.contiguous(), y, rows, *blocks.arguments(),
            E4M3=e4m3, WIDE=y.dtype == torch.float64, ROWS=1024 // columns, COLUMNS=columns,
        )  # fmt: skip


def fold(codes: Tensor, scales: Tensor, group: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of e4m3, and for each block whether a value does not fit."""
    folded, common, lost = folds(codes, blocks)
    grid, tile = blocks.options()
    tile |= registers(tile["num_warps"])
    with on_device(codes):
        kernels.fold[grid](
            codes.contiguous(), scales.contiguous(), folded, common, lost, blocks.number, *blocks.arguments(),
            group, **tile,
        )  # fmt: skip
    return folded, common, lost


def folds(codes: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    lost = codes.new_empty(blocks.number, dtype=torch.int32)
    return codes.new_empty(*codes.shape[:-1], blocks.columns), codes.new_empty(blocks.scales), lost


def hadamard(x: Tensor) -> Tensor:
    x = x.contiguous()
    y, d, n = x.new_empty(x.shape), x.shape[-1], x.shape[:-1].numel()
    rows = max(FEW // d, 1)
    with on_device(x):
        kernels.walsh_hadamard[(triton.cdiv(n, rows),)](
            x, y, n, d**-0.5, D=d, BITS=d.bit_length() - 1, ROWS=rows, num_warps=min(max(rows * d // 512, 1), 16)
        )
    return y
