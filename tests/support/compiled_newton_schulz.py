"""What of the Newton-Schulz iteration is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS = {"symmetric", "product"}


def iterate(m: int, n: int, dtype: torch.dtype, source: torch.dtype = torch.float32) -> None:
    """Two steps for one matrix; how many there are does not change what is compiled."""
    from abyssal.kernels.newton_schulz.triton import _newton_schulz

    _newton_schulz(torch.empty(1, m, n, dtype=source), [3.4445, -4.7750, 2.0315, 2.0, -1.5, 0.5], dtype)


MAIN = ["sm_80", "sm_90", "sm_100"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "newton_schulz, bf16, 2048 x 4096": ([*MAIN, "sm_89", "sm_120", "gfx942"], lambda: iterate(2048, 4096, bf16)),
    "newton_schulz, bf16, 32768 x 1024": (["sm_90"], lambda: iterate(32768, 1024, bf16)),
    "newton_schulz, bf16 of bf16, 2048 x 4096": (["sm_90"], lambda: iterate(2048, 4096, bf16, bf16)),
    "newton_schulz, fp16, 2048 x 4096": (["sm_90"], lambda: iterate(2048, 4096, fp16)),
    "newton_schulz, bf16, 128 x 64": ([*MAIN, "sm_89", "sm_120", "gfx942"], lambda: iterate(128, 64, bf16)),
    "newton_schulz, fp32, 128 x 64": (MAIN, lambda: iterate(128, 64, fp32)),
    "newton_schulz, bf16, 24 x 500": (["sm_90"], lambda: iterate(24, 500, bf16)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90."""
    assert row["hgmma"] > 0, row
    assert (row["tma"] > 0) == ("4096" in row["case"] or "1024" in row["case"]), row
