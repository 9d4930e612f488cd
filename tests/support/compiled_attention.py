"""What of attention is compiled ahead of time: see aot.py."""

import os
from typing import Any
from unittest import mock

import torch

PRODUCTS = {
    "attention_tile", "attention_list", "attention_split",
    "queries_tile", "queries_list", "keys_tile", "keys_again", "keys_list",
}  # fmt: skip


def attention(h: int, d: int, window: int, k: int, dtype: torch.dtype, documents: bool = False) -> None:
    """Forward and backward of a sliding, a heavily compressed and, in both ways, a compressed sparse layer. The numbers
    of queries and entries do not change what is compiled.
    """
    from abyssal.kernels.attention.triton import launch

    t, p = 64, 72 * k
    q, kv, compressed = (
        torch.empty(1, t, h, d, dtype=dtype),
        torch.empty(1, t, d, dtype=dtype),
        torch.empty(1, p, d, dtype=dtype),
    )
    few, sink, bound = compressed[:, :k].contiguous(), torch.empty(h), torch.zeros(1, t, dtype=torch.int64)
    index = torch.zeros(1, t, k, dtype=torch.int64)
    starts = bound if documents else None
    for entries, mask in (
        (None, launch.Mask(window, starts)),
        (few, launch.Mask(window, starts, bound, bound)),
        (few, launch.Mask(window, starts, picks=index)),
        (compressed, launch.Mask(window, starts, picks=index)),
    ):
        inputs = launch.Inputs(q, kv, entries, sink, mask, d**-0.5)
        out, lse = launch.forward(inputs)
        launch.backward(out, inputs, out, lse, launch.Needs())


def one_query(h: int, d: int, window: int, k: int, dtype: torch.dtype) -> None:
    """Forward of a decoded token in a heavily compressed and in a compressed sparse layer."""
    from abyssal.kernels.attention.triton import launch

    q, kv, compressed = (torch.empty(n, dtype=dtype) for n in ((1, 1, h, d), (1, window, d), (1, 8 * k, d)))
    bound, index = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, k, dtype=torch.int64)
    for mask in (launch.Mask(window, None, bound, bound), launch.Mask(window, picks=index)):
        launch.forward(launch.Inputs(q, kv, compressed, torch.empty(h), mask, d**-0.5))


def atomics(h: int, d: int, window: int, k: int) -> None:
    """Gradients of picks by float atomics."""
    with mock.patch.dict(os.environ, ABYSSAL_ATOMICS="1"):
        attention(h, d, window, k, bf16)


NVIDIA = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
MAIN = [*NVIDIA, "gfx942"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "attention, bf16, h=64 d=512 k=512": (MAIN, lambda: attention(64, 512, 128, 512, bf16)),
    "attention, bf16, h=128 d=512 k=1024": (MAIN, lambda: attention(128, 512, 128, 1024, bf16)),
    "attention, bf16, documents, h=64 d=512 k=512": (["sm_90"], lambda: attention(64, 512, 128, 512, bf16, True)),
    "attention, fp16, h=64 d=512 k=512": (["sm_90"], lambda: attention(64, 512, 128, 512, fp16)),
    "attention, fp32, h=64 d=512 k=512": (NVIDIA, lambda: attention(64, 512, 128, 512, fp32)),
    "attention, bf16, h=8 d=128 k=256": (MAIN, lambda: attention(8, 128, 128, 256, bf16)),
    "attention, bf16, documents, h=8 d=128 k=256": (["sm_90"], lambda: attention(8, 128, 128, 256, bf16, True)),
    "attention, bf16, h=64 d=128 k=256": (["sm_90"], lambda: attention(64, 128, 128, 256, bf16)),
    "attention, bf16, h=12 d=256 k=256": (MAIN, lambda: attention(12, 256, 128, 256, bf16)),
    "attention, bf16, h=32 d=512 k=512": (["sm_90"], lambda: attention(32, 512, 128, 512, bf16)),
    "attention, bf16, h=4 d=64 k=32": (MAIN, lambda: attention(4, 64, 32, 32, bf16)),
    "attention, bf16, h=1 d=32 k=32": (["sm_90"], lambda: attention(1, 32, 32, 32, bf16)),
    "attention, fp32, h=4 d=64 k=32": (NVIDIA, lambda: attention(4, 64, 32, 32, fp32)),
    "attention, bf16, h=6 d=16 k=5": (MAIN, lambda: attention(6, 16, 8, 5, bf16)),
    "attention, bf16, h=6 d=40 k=5": (["sm_90"], lambda: attention(6, 40, 8, 5, bf16)),
    "attention, bf16, one query, h=64 d=512 k=512": (MAIN, lambda: one_query(64, 512, 128, 512, bf16)),
    "attention, bf16, one query, h=4 d=64 k=32": (MAIN, lambda: one_query(4, 64, 32, 32, bf16)),
    "attention, fp32, one query, h=64 d=512 k=512": (NVIDIA, lambda: one_query(64, 512, 128, 512, fp32)),
    "attention with atomics, bf16, h=64 d=512 k=512": (["sm_90"], lambda: atomics(64, 512, 128, 512)),
}

ATOMIC_CASES = {"attention with atomics, bf16, h=64 d=512 k=512"}  # that are meant to have them


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90: see test_speed.py for what its instructions are."""
    if "one query" not in row["case"] and ("h=64" in row["case"] or "h=128" in row["case"]):
        assert row["hgmma"] > 0 and row["registers"] <= 255 and row["async"] >= 8, row
