"""The number formats in numpy, for one token; codes and scales are bytes.

Axes: D channels · G groups of `block` channels that share a scale, the last of which may be smaller · r rows.
"""

import math

import numpy as np
import torch

from .eager import dequantize

_BYTES = torch.arange(256, dtype=torch.uint8)
_SCALES = _BYTES.view(torch.float8_e8m0fnu).float().numpy()
_ONE = torch.full((256, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
_VALUES = {  # of each byte: one value, or two
    "e4m3": dequantize(_BYTES.view(torch.float8_e4m3fn)[:, None], _ONE, block=1).numpy(),
    "e2m1": dequantize(_BYTES[:, None], _ONE, block=2).numpy(),
}
_FLOOR, (_TOP_MANTISSA, _TOP_EXPONENT) = 1e-4, math.frexp(448.0)


def quantize_e4m3_step(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """`quantize(x, "e4m3")` of one row: float32 x [D] to codes [D] and scales [G]."""
    amax = np.maximum.reduceat(np.abs(x), np.arange(0, len(x), block))
    mantissa, exponent = np.frexp(np.maximum(amax, np.float32(_FLOOR)))
    exponent += 127 - _TOP_EXPONENT + (mantissa > _TOP_MANTISSA)
    exponent[~np.isfinite(amax)] = 255
    scales = exponent.astype(np.uint8)
    values = x / np.repeat(_SCALES[scales], block)[: len(x)]
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), scales


def dequantize_step(codes: np.ndarray, scales: np.ndarray, format: str, block: int) -> np.ndarray:
    """`dequantize` in float32: codes [r, D] (e4m3) or [r, D / 2] (e2m1) and scales [r, G] to [r, D]."""
    table = _VALUES[format]
    values = table.take(codes, 0).reshape(len(codes), codes.shape[1] * table.shape[1])
    for group, scale in enumerate(_SCALES.take(scales).T):
        values[:, group * block : (group + 1) * block] *= scale[:, None]
    return values
