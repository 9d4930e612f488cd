"""What of the exact linear layer is compiled ahead of time: see aot.py. What multiplies is torch's."""

import torch

PRODUCTS: set[str] = set()
MAIN = ["sm_80", "sm_90", "sm_100"]
ALL = [*MAIN, "sm_89", "sm_120", "gfx942"]
bf16, fp32 = torch.bfloat16, torch.float32


def both(n: int, d: int, o: int, dtype: torch.dtype = fp32) -> None:
    """What is split of the weight, and of the gradient."""
    from abyssal.kernels.exact_linear.triton import launch

    launch._parts(torch.empty(o, d, dtype=dtype), beside=False)
    launch._parts(torch.empty(n, o), beside=True)


CASES = {
    "exact linear, d=4096 o=1024": (ALL, lambda: both(4096, 4096, 1024)),
    "exact linear, d=4096 o=256": (MAIN, lambda: both(4096, 4096, 256)),
    "exact linear, d=70 o=7": (["sm_90"], lambda: both(100, 70, 7)),
    "exact linear, bf16, d=4096 o=1024": (MAIN, lambda: both(4096, 4096, 1024, bf16)),
}
