"""The eager engine of the number formats, in exact arithmetic: exponents are integers, and every product and quotient
of the values is by a power of two.

Axes: D channels (the last axis) · R x C the blocks of a matrix.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from ..precision import accumulation

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FOLDED = 6  # 6 * 2^6 = 384 is the largest power-of-two multiple of E2M1's top that fits E4M3


class _Format(NamedTuple):
    top: float  # the largest value
    floor: float  # amax counts as at least this much
    exponent: int  # of the smallest normal value
    mantissa: int  # bits after the leading one


_FORMATS = {"e4m3": _Format(448.0, 1e-4, -6, 3), "e2m1": _Format(6.0, 6 * 2.0**-126, 0, 1)}


@torch.no_grad()
def quantize(x: Tensor, format: str, *, block: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    rule = _FORMATS[format]
    x = x.to(accumulation(x)).contiguous()
    scales = _scales(_block_amax(x.abs(), block), rule)
    values = _nearest(x / _spread(scales.to(x.dtype), block, x.shape), rule)
    return values.to(torch.float8_e4m3fn) if format == "e4m3" else _pack(values), scales


@torch.no_grad()
def dequantize(
    codes: Tensor, scales: Tensor, *, block: int | tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    exact = torch.promote_types(dtype, torch.float32)
    values = codes.to(exact) if codes.dtype == torch.float8_e4m3fn else _unpack(codes, exact)
    return (values * _spread(scales.to(exact), block, values.shape)).to(dtype)


def fake_quant(x: Tensor, format: str, *, block: int | tuple[int, int]) -> Tensor:
    return _StraightThrough.apply(x, format, block)


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: str, block: int | tuple[int, int]) -> Tensor:
        return dequantize(*quantize(x, format, block=block), block=block, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


@torch.no_grad()
def e2m1_to_e4m3(
    codes: Tensor, scales: Tensor, *, group: int = 32, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    values = dequantize(codes, scales, block=group, dtype=torch.float64)
    largest = _block_amax(scales.view(torch.uint8), (block[0], block[1] // group)).to(torch.int32) - 127
    common = _power_of_two((largest - _FOLDED).clamp_min(-127))
    factor = _spread(common.to(torch.float64), block, values.shape)
    folded = (values / factor).to(torch.float8_e4m3fn)
    lost = folded.to(torch.float64) * factor != values
    if not codes.is_meta and bool(lost.any()):
        first = lost.nonzero()[0].tolist()
        raise ValueError(
            f"scales: {int(lost.sum())} of {lost.numel()} values, the first at {first}, are not exact in e4m3 with one "
            f"scale per block={block}; allowed are group scales, none NaN, within a factor of 2^14 in a block"
        )
    return folded, common


def hadamard(x: Tensor) -> Tensor:
    d = x.shape[-1]
    y = x.to(accumulation(x))
    for bit in range(d.bit_length() - 1):  # sum and difference of the channels that differ in this bit of their index
        zero, one = y.unflatten(-1, (d >> bit + 1, 2, 1 << bit)).unbind(-2)
        y = torch.stack((zero + one, zero - one), -2).flatten(-3)
    return (y * d**-0.5).to(x.dtype)


def _scales(amax: Tensor, rule: _Format) -> Tensor:
    """The smallest power of two with `amax <= top * scale`; NaN where there is none.

    With amax = m 2^k and top = m' 2^k', both m in [1/2, 1), that is 2^(k - k'), or twice it where m > m'.
    """
    mantissa, exponent = torch.frexp(amax.clamp_min(rule.floor))
    top_mantissa, top_exponent = math.frexp(rule.top)
    exponent = exponent - top_exponent + (mantissa > top_mantissa)
    return _power_of_two(exponent.where(amax.isfinite() & (exponent < 128), 128))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as E8M0 for -127 to 127; 128 gives its NaN."""
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _nearest(x: Tensor, rule: _Format) -> Tensor:
    """The nearest value of the format for |x| <= top: a multiple of the step in x's binade, ties to the even one."""
    binade = torch.frexp(x).exponent - 1
    step = _power_of_two(binade.clamp_min(rule.exponent) - rule.mantissa).to(x.dtype)
    return torch.round(x / step) * step


def _pack(values: Tensor) -> Tensor:
    """E2M1 values [..., D] as bytes [..., D / 2], the even channel in the low half; NaN, told by the scale, as 0."""
    magnitude = torch.bucketize(values.abs().nan_to_num(0.0), values.new_tensor(_E2M1))
    code = (magnitude + 8 * (values.signbit() & ~values.isnan())).to(torch.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4


def _unpack(codes: Tensor, dtype: torch.dtype) -> Tensor:
    codes = codes.view(torch.uint8)
    code = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=dtype, device=codes.device)
    return table[code.int()]


def _block_amax(x: Tensor, block: int | tuple[int, int]) -> Tensor:
    """The largest value of each block of a non-negative tensor."""
    for axis, size in _axes(block):
        missing = -x.shape[axis] % size
        x = F.pad(x, [0, 0] * (-axis - 1) + [0, missing])
        x = x.unflatten(axis, (x.shape[axis] // size, size)).amax(axis)
    return x


def _spread(scales: Tensor, block: int | tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each value, in the shape of the values."""
    for axis, size in _axes(block):
        scales = scales.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scales


def _axes(block: int | tuple[int, int]) -> list[tuple[int, int]]:
    """The axes that blocks span, each with the size of a block along it."""
    return [(-1, block)] if isinstance(block, int) else [(-1, block[1]), (-2, block[0])]
