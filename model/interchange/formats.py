"""How the release stores its weights: E4M3 in blocks of 128 x 128, the routed experts in E2M1 by groups of 32.

    weights    routed experts                      other matrices
    exact      as they are                         as they are
    fp8        E4M3 [o, i], a scale per 128 x 128  the same                                     DeepSeek-V4-*-Base
    fp4        E2M1 [o, i / 2] bytes,              E4M3 [o, i], a scale per 128 x 128           DeepSeek-V4-*
               a scale per 32 columns

NAME.weight holds the codes, NAME.scale the scales, powers of two. Not quantised are embedding, head, gates, norms, mHC,
compressors and the indexer's head weights. A value of either format fits into bfloat16, so that reading loses nothing.

o rows · i columns
"""

import re
from typing import Any

import torch
from torch import Tensor

from ...kernels import dequantize, quantize

WEIGHTS = ("exact", "fp8", "fp4")
BLOCK, GROUP = (128, 128), 32
DTYPES = {"F8_E4M3": "e4m3", "I8": "e2m1", "U8": "e2m1"}  # as safetensors calls those of the codes
SCALES = "F8_E8M0"

_EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
_MATRIX = re.compile(
    r"(\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|\.ffn\.shared_experts\.w[123]|^mtp\.\d+\.(e|h)_proj)\.weight$"
)


def format_of(source: str, weights: str) -> str | None:
    """The number format of a tensor with that official name: "e4m3", "e2m1" or None, as it is."""
    if weights == "exact" or not (_EXPERT.search(source) or _MATRIX.search(source)):
        return None
    return "e2m1" if weights == "fp4" and _EXPERT.search(source) else "e4m3"


def scale_name(source: str) -> str:
    return source.removesuffix(".weight") + ".scale"


def stored_shapes(shape: tuple[int, ...], format: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the codes and of the scales of a matrix [o, i]; a byte each."""
    rows, columns = shape
    if format == "e2m1":
        return (rows, columns // 2), (rows, columns // GROUP)
    return (rows, columns), (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))


def encode(source: str, x: Tensor, format: str) -> dict[str, Tensor]:
    """Codes and scales of a matrix under their names.

    Raises:
        ValueError: `format` is e2m1 and the columns are no multiple of 32.
    """
    if format == "e2m1" and x.shape[1] % GROUP:
        raise ValueError(f"{source} has {x.shape[1]} columns: weights='fp4' needs multiples of {GROUP}")
    codes, scales = quantize(x, format, block=BLOCK if format == "e4m3" else GROUP)
    return {source: codes.view(torch.int8) if format == "e2m1" else codes, scale_name(source): scales}


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of codes and scales, exactly, rounded once to `dtype`. Scales of V3 are any float32 numbers."""
    if scales.dtype == torch.float32:
        rows, columns = codes.shape
        wide = scales.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
        return (codes.to(torch.float32) * wide).to(dtype)
    return dequantize(codes, scales, block=BLOCK if codes.dtype == torch.float8_e4m3fn else GROUP, dtype=dtype)


def described(weights: str) -> dict[str, Any]:
    """What the configuration says about it, as the released ones do."""
    if weights == "exact":
        return {"quantization_config": None, "expert_dtype": None}
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
    return {"quantization_config": config | {"weight_block_size": list(BLOCK)}, "expert_dtype": weights}
