"""What of Engram is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS: set[str] = set()  # no kernel multiplies matrices
# streams, width, orders, heads per order, head width
SHAPES = {
    "v4.1": (4, 5120, 3, 8, 256),
    "paper": (4, 2560, 2, 8, 80),  # the 27B model's
    "toy": (4, 128, 3, 2, 32),
    "odd": (3, 52, 2, 3, 20),
}
TOKENS = 48


def engram(shape: str, dtype: torch.dtype) -> None:
    """Hash with documents and history, gather, gate, and the gradients; key and value are slices of one projection."""
    from abyssal.kernels.engram.triton import launch

    n, d, orders, k, w = SHAPES[shape]
    ids = torch.empty(2, TOKENS // 2, dtype=torch.int64)
    integers = ids.new_empty(orders + 1), ids.new_empty(orders, k), ids.new_empty(orders * k)
    launch.hash_rows(ids, *integers, 2, None, None)
    rows = launch.hash_rows(ids, *integers, 2, ids, ids.new_empty(2, orders)).flatten()
    launch.sum_lookups(launch.gather(torch.empty(500, w, dtype=dtype), rows), rows, 500)
    h, both = torch.empty(TOKENS, n, d, dtype=dtype), torch.empty(TOKENS, n + 1, d, dtype=dtype)
    inputs = launch.Inputs(h, both[:, :n], both[:, n], torch.empty(n, d), torch.empty(n, d))
    out, kept = launch.gate(inputs, 1e-20)
    launch.gate_backward(out, inputs, kept)


ALL = ["sm_80", "sm_90", "sm_100", "sm_89", "sm_120", "gfx942"]
CASES = {
    "engram, bf16, n=4 d=5120 rows of 256": (ALL, lambda: engram("v4.1", torch.bfloat16)),
    "engram, bf16, n=4 d=2560 rows of 80": (["sm_90"], lambda: engram("paper", torch.bfloat16)),
    "engram, fp32, n=4 d=5120 rows of 256": (["sm_80", "sm_90", "sm_100"], lambda: engram("v4.1", torch.float32)),
    "engram, fp16, n=4 d=128 rows of 32": (["sm_90"], lambda: engram("toy", torch.float16)),
    "engram, fp32, n=4 d=128 rows of 32": (["sm_80", "sm_90", "sm_100"], lambda: engram("toy", torch.float32)),
    "engram, bf16, n=3 d=52 rows of 20": (["sm_90"], lambda: engram("odd", torch.bfloat16)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90: there is none."""
