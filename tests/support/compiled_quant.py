"""What of the number formats is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS: set[str] = set()  # nothing here multiplies matrices
MAIN = ["sm_80", "sm_90", "sm_100"]
ALL = [*MAIN, "sm_89", "sm_120", "gfx942"]
bf16, fp32 = torch.bfloat16, torch.float32


def formats(shape: tuple[int, int], block: int | tuple[int, int], format: str, dtype: torch.dtype) -> None:
    """Codes and scales, values, and both in one; four-bit weights to eight bits where they are given."""
    from abyssal.kernels.quant.triton import launch

    x, e4m3 = torch.empty(shape, dtype=dtype), format == "e4m3"
    r, c = (1, block) if isinstance(block, int) else block
    blocks = launch.Blocks.of(x.shape, r, c, lines=isinstance(block, int))
    codes, scales = launch.quantize(x, e4m3, blocks)
    launch.dequantize(codes, scales, x, e4m3, blocks)
    launch.fake_quant(x, e4m3, blocks)
    if not e4m3:
        launch.fold(codes, scales, 32, launch.Blocks.of(x.shape, 128, 128, lines=False))


def rotations(d: int, dtype: torch.dtype) -> None:
    from abyssal.kernels.quant.triton import launch

    launch.hadamard(torch.empty(3, d, dtype=dtype))


CASES = {
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
