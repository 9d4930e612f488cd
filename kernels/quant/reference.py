"""The number formats by their tables of values, in float64: the definition that every engine is held against.

D channels (the last axis) · R x C the blocks of a matrix, of r x c values
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation

VALUES = {  # without a sign, in the order of their codes
    "e4m3": [(mantissa + 8 * (e > 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for mantissa in range(8)][:127],
    "e2m1": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
}
FLOORS = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
SCALES = [2.0**e for e in range(-127, 128)]  # byte 255 is NaN
Block = int | tuple[int, int]


@torch.no_grad()
def quantize(x: Tensor, format: str, *, block: Block) -> tuple[Tensor, Tensor]:
    """`scale = 2^ceil(log2(max(amax, floor) / top))`, `code = nearest(x / scale)`, ties to the even code."""
    x, values = x.double().contiguous(), x.new_tensor(VALUES[format], dtype=torch.float64)
    amax = _largest(x.abs(), block).clamp_min(FLOORS[format])
    scales = torch.searchsorted(x.new_tensor(SCALES) * values[-1], amax).to(torch.uint8).view(torch.float8_e8m0fnu)
    scaled = x / _each(scales.double(), block, x.shape)
    above = torch.searchsorted(values, scaled.abs()).clamp_max(len(values) - 1)
    below = (above - 1).clamp_min(0)
    up, down = values[above] - scaled.abs(), scaled.abs() - values[below]
    code = torch.where((up < down) | (up == down) & (above % 2 == 0), above, below)
    bad, sign = scaled.isnan(), x.signbit().long()
    if format == "e4m3":
        return torch.where(bad, 127, code + 128 * sign).to(torch.uint8).view(torch.float8_e4m3fn), scales
    code = torch.where(bad, 0, code + 8 * sign)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8), scales


@torch.no_grad()
def dequantize(codes: Tensor, scales: Tensor, *, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """`code * scale`, rounded once to `dtype`."""
    format = "e4m3" if codes.dtype == torch.float8_e4m3fn else "e2m1"
    table = VALUES[format] + [torch.nan] * (format == "e4m3")
    code = codes.view(torch.uint8).long()
    if format == "e2m1":
        code = torch.stack((code % 16, code // 16), -1).flatten(-2)
    values = torch.tensor(table + [-x for x in table], dtype=torch.float64, device=codes.device)[code]
    return (values * _each(scales.double(), block, values.shape)).to(dtype)


def fake_quant(x: Tensor, format: str, *, block: Block) -> Tensor:
    """`dequantize(quantize(x))`, with the gradient of the identity."""
    rounded = dequantize(*quantize(x, format, block=block), block=block, dtype=x.dtype)
    return rounded - (x.detach() - x)  # a difference of 0 that carries the gradient, and leaves -0 alone


@torch.no_grad()
def e2m1_to_e4m3(
    codes: Tensor, scales: Tensor, *, group: int = 32, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """`scale = max of the block's group scales / 2^6`, at least 2^-127, and the same values as before."""
    values = dequantize(codes, scales, block=group, dtype=torch.float64)
    largest = _largest(scales.view(torch.uint8).double(), (block[0], block[1] // group))
    common = (largest - 6).clamp_min(0).to(torch.uint8).view(torch.float8_e8m0fnu)
    folded = (values / _each(common.double(), block, values.shape)).to(torch.float8_e4m3fn)
    lost = dequantize(folded, common, block=block, dtype=torch.float64) != values
    if not codes.is_meta and bool(lost.any()):
        raise ValueError(f"scales: {int(lost.sum())} of {lost.numel()} values are not exact in e4m3, or NaN")
    return folded, common


def hadamard(x: Tensor) -> Tensor:
    """`d^-1/2 H x`, H the Kronecker product of log2(d) matrices [1 1; 1 -1]."""
    wide, d = x.to(accumulation(x)), x.shape[-1]
    two = wide.new_tensor([[1.0, 1.0], [1.0, -1.0]])
    signs = reduce(torch.kron, [two] * (d.bit_length() - 1), wide.new_ones(1, 1))
    return ((wide[..., None, :] * signs).sum(-1) * d**-0.5).to(x.dtype)


def _largest(x: Tensor, block: Block) -> Tensor:
    """Of each block of a non-negative x."""
    if isinstance(block, int):
        return x.unflatten(-1, (-1, block)).amax(-1)
    r, c = block
    x = F.pad(x, (0, -x.shape[-1] % c, 0, -x.shape[-2] % r))
    return x.unflatten(-1, (-1, c)).unflatten(-3, (-1, r)).amax((-3, -1))


def _each(scales: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """The scale of each value."""
    r, c = (1, block) if isinstance(block, int) else block
    column = torch.arange(shape[-1], device=scales.device) // c
    if isinstance(block, int):
        return scales[..., column]
    return scales[..., torch.arange(shape[-2], device=scales.device)[:, None] // r, column]
