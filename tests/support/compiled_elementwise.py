"""What of pooling, norms, rotations and number formats is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS: set[str] = set()  # nothing here multiplies matrices
MAIN = ["sm_80", "sm_90", "sm_100"]
ALL = [*MAIN, "sm_86", "gfx942"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def pooling(ratio: int, d: int, overlap: bool, dtype: torch.dtype = fp32) -> None:
    """Forward and backward, of regular windows and of gathered ones."""
    from abyssal.kernels.pool.triton import launch

    channels = 2 * d if overlap else d
    kv, gate, bias = (torch.empty(n, dtype=dtype) for n in ((2, 300, channels), (2, 300, channels), (ratio, channels)))
    first, follows = torch.full((2, 300 // ratio), -1), torch.zeros(2, 300 // ratio, dtype=torch.bool)
    for windows in (
        launch.Windows(None, None, ratio, overlap),
        launch.Windows(first, follows if overlap else None, ratio, overlap),
    ):
        launch.backward(launch.forward(kv, gate, bias.float(), windows), kv, gate, bias.float(), windows)


def norms(d: int, dim: int, dtype: torch.dtype) -> None:
    """The norm with and without weight and rotation, the rotation alone, each with its backward pass."""
    from abyssal.kernels.norm_rope import triton as ops

    x, weight, angles = torch.empty(2, 9, 3, d, dtype=dtype), torch.empty(d), torch.empty(1, 9, dim // 2, 2)
    for w, a in ((weight, None), (None, angles), (weight, angles)) if dim else ((weight, None), (None, None)):
        y, scales = ops._forward(x, w, a, 1e-6, norm=True)
        ops._backward(y, x, w, a, scales)
    if dim:
        ops._forward(x, None, angles, 0.0, norm=False)


def formats(shape: tuple[int, int], block: int | tuple[int, int], format: str, dtype: torch.dtype) -> None:
    """Codes and scales, values, and both in one; four-bit weights to eight bits where they are given."""
    from abyssal.kernels.quant import triton as ops

    x = torch.empty(shape, dtype=dtype)
    where = (format == "e4m3", *ops._rows_columns(block), isinstance(block, int))
    codes, scales = ops._quantize(x, *where)
    ops._dequantize(codes, scales, *where, dtype)
    ops._fake_quant(x, *where)
    if format == "e2m1":
        ops._fold(codes, scales, 32, 128, 128)


def rotations(d: int, dtype: torch.dtype) -> None:
    from abyssal.kernels.quant import triton as ops

    ops._hadamard(torch.empty(3, d, dtype=dtype))


CASES = {
    "pool, m=4 D=512 overlap": (ALL, lambda: pooling(4, 512, True)),
    "pool, m=4 D=128 overlap": (ALL, lambda: pooling(4, 128, True)),
    "pool, m=128 D=512": (ALL, lambda: pooling(128, 512, False)),
    "pool, m=4 D=512 overlap, bf16": (MAIN, lambda: pooling(4, 512, True, bf16)),
    "pool, m=32 D=64": (["sm_90"], lambda: pooling(32, 64, False)),
    "pool, m=3 D=20 overlap": (["sm_90"], lambda: pooling(3, 20, True)),
    "norm and rope, d=512 of 64, bf16": (ALL, lambda: norms(512, 64, bf16)),
    "norm and rope, d=128 of 64, bf16": (MAIN, lambda: norms(128, 64, bf16)),
    "norm and rope, d=512 of 64, fp32": (MAIN, lambda: norms(512, 64, fp32)),
    "norm, d=4096, bf16": (MAIN, lambda: norms(4096, 0, bf16)),
    "norm, d=7168, bf16": (ALL, lambda: norms(7168, 0, bf16)),
    "norm, d=7168, fp32": (MAIN, lambda: norms(7168, 0, fp32)),
    "norm, d=1536, bf16": (["sm_90"], lambda: norms(1536, 0, bf16)),
    "norm and rope, d=21 of 6, fp32": (["sm_90"], lambda: norms(21, 6, fp32)),
    "e4m3, 1 by 128, bf16": (ALL, lambda: formats((9, 4096), 128, "e4m3", bf16)),
    "e4m3, 1 by 64 of 448, bf16": (MAIN, lambda: formats((9, 448), (1, 64), "e4m3", bf16)),
    "e4m3, 128 by 128, fp32": (ALL, lambda: formats((300, 520), (128, 128), "e4m3", fp32)),
    "e4m3, 128 by 128, bf16": (MAIN, lambda: formats((300, 520), (128, 128), "e4m3", bf16)),
    "e2m1, 1 by 32, bf16": (ALL, lambda: formats((9, 2048), 32, "e2m1", bf16)),
    "e2m1, 1 by 32, fp32": (MAIN, lambda: formats((9, 2048), 32, "e2m1", fp32)),
    "e4m3, 256 by 256, fp32": (["sm_90"], lambda: formats((300, 520), (256, 256), "e4m3", fp32)),
    "hadamard, d=128, bf16": (ALL, lambda: rotations(128, bf16)),
    "hadamard, d=128, fp32": (MAIN, lambda: rotations(128, fp32)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90, of which there is none."""
