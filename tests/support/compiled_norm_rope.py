"""What of RMSNorm and RoPE is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS: set[str] = set()  # nothing here multiplies matrices
MAIN = ["sm_80", "sm_90", "sm_100"]
ALL = [*MAIN, "sm_89", "sm_120", "gfx942"]
bf16, fp32 = torch.bfloat16, torch.float32


def norms(d: int, dim: int, dtype: torch.dtype) -> None:
    """The norm with and without weight and rotation, the rotation alone, each with its backward pass."""
    from abyssal.kernels.norm_rope.triton import launch

    x, weight, angles = torch.empty(2, 9, 3, d, dtype=dtype), torch.empty(d), torch.empty(1, 9, dim // 2, 2)
    for w, a in ((weight, None), (None, angles), (weight, angles)) if dim else ((weight, None), (None, None)):
        y, scales = launch.norm(x, w, a, 1e-6)
        launch.norm_backward(y, x, w, a, scales)
    if dim:
        launch.rotate(x, angles, inverse=False)


CASES = {
    "norm and rope, d=512 of 64, bf16": (ALL, lambda: norms(512, 64, bf16)),
    "norm and rope, d=128 of 64, bf16": (MAIN, lambda: norms(128, 64, bf16)),
    "norm and rope, d=512 of 64, fp32": (MAIN, lambda: norms(512, 64, fp32)),
    "norm, d=4096, bf16": (MAIN, lambda: norms(4096, 0, bf16)),
    "norm, d=7168, bf16": (ALL, lambda: norms(7168, 0, bf16)),
    "norm, d=7168, fp32": (MAIN, lambda: norms(7168, 0, fp32)),
    "norm, d=1536, bf16": (["sm_90"], lambda: norms(1536, 0, bf16)),
    "norm and rope, d=21 of 6, fp32": (["sm_90"], lambda: norms(21, 6, fp32)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90, of which there is none."""
