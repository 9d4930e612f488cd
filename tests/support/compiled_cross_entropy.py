"""What of cross_entropy is compiled ahead of time: see aot.py. Its products are the library's."""

from typing import Any

import torch

PRODUCTS: set[str] = set()


def rows(v: int, dtype: torch.dtype | None) -> None:
    """Losses, and gradients in `dtype`; how many rows there are does not change what is compiled."""
    from abyssal.kernels.cross_entropy.triton.launch import loss_rows

    loss_rows(torch.empty(4, v), torch.zeros(4, dtype=torch.int64), torch.empty(4), -100, 0.0, dtype)


def loss(v: int, d: int, dtype: torch.dtype) -> None:
    """All of the host code, at a width that a CPU can multiply."""
    from abyssal.kernels.cross_entropy import triton as op

    x, weight, targets = (
        torch.zeros(8, d, dtype=dtype),
        torch.zeros(v, d, dtype=dtype),
        torch.zeros(8, dtype=torch.int64),
    )
    scalar, share, dx, dw = op._cross_entropy(x, weight, targets, -100, 1e-4, True, 4, True, True)
    op._backward(scalar, share, dx, dw, dtype)


ALL = ["sm_80", "sm_89", "sm_120", "sm_90", "sm_100", "gfx942"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "loss, to bf16, V=129280": (ALL, lambda: rows(129_280, bf16)),
    "loss, to fp16, V=129280": (["sm_90"], lambda: rows(129_280, fp16)),
    "loss, fp32, V=129280": (ALL, lambda: rows(129_280, fp32)),
    "loss, no gradient, V=129280": (["sm_90"], lambda: rows(129_280, None)),
    "loss, to bf16, V=129279": (["sm_90"], lambda: rows(129_279, bf16)),
    "loss, V=260, d=128": (["sm_80", "sm_90", "sm_100"], lambda: loss(260, 128, bf16)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """There are no products of its own."""
    raise AssertionError(row)
