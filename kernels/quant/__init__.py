"""The released number formats: eight- and four-bit values that share one power of two per block.

    scale = 2^ceil(log2(max(amax, floor) / top))        amax of the block, exponent in exact arithmetic
    code  = nearest(x / scale)                          ties to the even code

    format  values                                               top  floor      blocks in the release
    e4m3    4 exponent and 3 mantissa bits, steps of 2^-9 up     448  1e-4       64 (cache entries), 128 (activations),
                                                                                 (128, 128) (weights)
    e2m1    0, 0.5, 1, 1.5, 2, 3, 4, 6, two in a byte              6  6 2^-126   32 (index queries and keys, experts)

The exponent is rounded up, so that |x| / scale never passes `top`: nothing is clipped. The values have at most four
significant bits: bfloat16 holds them exactly.

Scales are `torch.float8_e8m0fnu`, the dtype in which checkpoints hold them: a byte e for 2^(e - 127), with 255 for NaN.
That NaN is what a block gets which no scale fits (see `quantize`). `scales.view(torch.uint8)` are the bytes.

A cached entry takes 448 codes + 7 scales + 1 unused byte + 64 bfloat16 rotary channels = 584 bytes, an index key
64 + 4 = 68.

Axes: D channels (the last axis) · R x C the blocks of a matrix.
"""

import torch
from torch import Tensor

from ..backend import implementation

_FORMATS = ("e4m3", "e2m1")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BYTES = (torch.uint8, torch.int8)


def quantize(
    x: Tensor, format: str, *, block: int | tuple[int, int], backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x`: `scale = 2^ceil(log2(max(amax, floor) / top))`, `code = nearest(x / scale)`.

    A block with a NaN or an infinity in it, or with a float64 value past the largest scale times `top`, gets a NaN for
    its scale: all of it reads back as NaN, its neighbours are untouched. A block of zeros gets the scale of the floor.
    Zeros keep their sign. The result has no gradient; see `fake_quant`.

    Args:
        x: [..., D], float16, bfloat16, float32 or float64; each is quantised as the exact value that it holds.
        format: `e4m3` or `e2m1`.
        block: what shares a scale: that many channels, which must divide D, or `(rows, columns)` of the last two axes,
            where the blocks at the end may be smaller.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        `(codes, scales)`. Codes: for `e4m3` float8_e4m3fn [..., D], for `e2m1` uint8 [..., D / 2] with the even channel
        in the low four bits. Scales: float8_e8m0fnu [..., D / block] or [..., R, C]. Both are contiguous.

    Raises:
        ValueError: `x` is no float tensor, `format` is unknown, `block` does not fit, or D is odd for `e2m1`.

    Source: V4's released code; arXiv 2209.05433 for E4M3, the OCP microscaling formats for E2M1 and UE8M0.
    """
    _check_input(x, format, block)
    return implementation("quant", backend, x).quantize(x, format, block=block)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    *,
    block: int | tuple[int, int],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """The values `code * scale`: exact, then rounded once to `dtype`.

    The format is told by the dtype of `codes`. Where float16 or bfloat16 is asked for, a value past its largest becomes
    an infinity, and for float32 one from 2^128 on.

    Args:
        codes: float8_e4m3fn [..., D], or two e2m1 values to a byte, uint8 or int8 (as in the release) [..., D / 2].
        scales: float8_e8m0fnu [..., D / block] or [..., R, C].
        block: as for `quantize`.
        dtype: float16, bfloat16, float32 or float64.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [..., D] in `dtype`.

    Raises:
        ValueError: a dtype is not among these, or a shape does not fit.

    Source: V4's released code.
    """
    if codes.dtype not in (torch.float8_e4m3fn, *_BYTES) or codes.ndim < 1:
        raise ValueError(f"codes: got {codes.dtype} {list(codes.shape)}, allowed is float8_e4m3fn, uint8 or int8")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype={dtype}: allowed are {', '.join(map(str, _FLOATS))}")
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if codes.dtype in _BYTES else 1))
    _check_scales(scales, shape, block)
    return implementation("quant", backend, codes).dequantize(codes, scales, block=block, dtype=dtype)


def fake_quant(x: Tensor, format: str, *, block: int | tuple[int, int], backend: str | None = None) -> Tensor:
    """`dequantize(quantize(x))` with the gradient of the identity (straight-through): `dx = dy`.

    What training uses to see the rounding of a cache or of a weight. Applied twice it changes nothing more.

    Args:
        x: as for `quantize`.
        format: `e4m3` or `e2m1`.
        block: as for `quantize`.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        A new tensor with the shape and dtype of `x`; NaN throughout each block that `quantize` gives a NaN scale, and
        infinite where rounding up passes the largest value of the dtype.

    Raises:
        ValueError: as `quantize`.

    Source: arXiv 1308.3432 for the straight-through gradient; V4 3.4 and its released code for where it stands.
    """
    _check_input(x, format, block)
    return implementation("quant", backend, x).fake_quant(x, format, block=block)


def e2m1_to_e4m3(
    codes: Tensor,
    scales: Tensor,
    *,
    group: int = 32,
    block: tuple[int, int] = (128, 128),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The same values as E4M3 with one scale per block: `scale = max of its group scales / 2^6`, the rest in the codes.

    6 * 2^6 = 384 fits below 448. Nothing is lost as long as no group with a non-zero value has a scale more than 2^14
    below the largest of its block; a wider block passes where its values still fit.

    Args:
        codes: two e2m1 values to a byte, uint8 or int8 [..., N, K / 2].
        scales: float8_e8m0fnu [..., N, K / group].
        group: columns that share a scale in `scales`; divides K and the columns of `block`.
        block: rows and columns that share a scale in the result; the blocks at the end may be smaller.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        `(codes, scales)`: float8_e4m3fn [..., N, K] and float8_e8m0fnu [..., R, C], for `dequantize(block=block)`.

    Raises:
        ValueError: a shape or dtype does not fit; or a value would be lost, or is NaN (not looked at on meta tensors).

    Source: V4 3.4; the released converter.
    """
    if codes.dtype not in _BYTES or codes.ndim < 2:
        raise ValueError(f"codes: got {codes.dtype} {list(codes.shape)}, allowed is uint8 or int8 [..., N, K / 2]")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    _check_scales(scales, shape, group, "group")
    _check_block(block, shape)
    if isinstance(block, int) or block[1] % group:
        raise ValueError(f"block={block}: must be (rows, columns) with a multiple of group={group} columns")
    return implementation("quant", backend, codes).e2m1_to_e4m3(codes, scales, group=group, block=block)


def hadamard(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The Walsh-Hadamard rotation of the last axis, `y_i = d^-1/2 sum_j (-1)^popcount(i & j) x_j`, in float32.

    Orthonormal and its own inverse, so that products of rotated vectors are those of the vectors themselves. It spreads
    a channel that sticks out over all of them, which is what four-bit groups need.

    Args:
        x: [..., d] with d a power of two (128 in V4's index queries and keys).
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        A new tensor with the shape and dtype of `x`, accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: `x` is no float tensor or d is not a power of two.

    Source: arXiv 2404.00456; V4's released code, natural order and no random signs.
    """
    d = x.shape[-1] if x.ndim else 0
    if x.dtype not in _FLOATS or d < 1 or d & (d - 1):
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, allowed is a float tensor [..., d], d a power of two")
    return implementation("quant", backend, x).hadamard(x)


def _check_input(x: Tensor, format: str, block: int | tuple[int, int]) -> None:
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}: allowed are {', '.join(_FORMATS)}")
    if x.dtype not in _FLOATS or x.ndim < 1:
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, allowed is [..., D] in {', '.join(map(str, _FLOATS))}")
    if format == "e2m1" and x.shape[-1] % 2:
        raise ValueError(f"x: {x.shape[-1]} channels, but e2m1 packs two into a byte and needs an even number")
    _check_block(block, x.shape)


def _check_block(block: int | tuple[int, int], shape: tuple[int, ...], name: str = "block") -> None:
    if isinstance(block, int):
        if block < 1 or shape[-1] % block:
            raise ValueError(f"{name}={block}: must divide the {shape[-1]} channels of {list(shape)}")
    elif len(block) != 2 or min(block) < 1 or len(shape) < 2:
        raise ValueError(f"{name}={block}: must be positive (rows, columns), of the last two axes; got {list(shape)}")


def _check_scales(scales: Tensor, shape: tuple[int, ...], block: int | tuple[int, int], name: str = "block") -> None:
    _check_block(block, shape, name)
    if isinstance(block, int):
        allowed = (*shape[:-1], shape[-1] // block)
    else:
        allowed = (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block)))
    if scales.dtype != torch.float8_e8m0fnu or scales.shape != allowed:
        expected = f"float8_e8m0fnu {list(allowed)} for {name}={block} of {list(shape)}"
        raise ValueError(f"scales: got {scales.dtype} {list(scales.shape)}, allowed is {expected}")
