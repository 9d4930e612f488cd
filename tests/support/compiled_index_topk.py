"""What of the indexer's choice is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS = {"index_scores", "index_scores_of_few"}


def topk(dtype: torch.dtype, h: int, d: int, k: int, p: int, t: int = 256) -> None:
    """Scores and top-k of t queries."""
    from abyssal.kernels.index_topk.triton import launch

    q, weights, keys = torch.empty(1, t, h, d, dtype=dtype), torch.empty(1, t, h), torch.empty(1, p, d, dtype=dtype)
    seen = torch.empty(1, t, dtype=torch.int64)
    launch.index_topk(q, weights, keys, k, seen, seen)


NVIDIA = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
MAIN = [*NVIDIA, "gfx942"]
bf16, fp32 = torch.bfloat16, torch.float32
CASES = {
    "top-k, bf16, h=64 d=128 k=512 p=16384": (
        MAIN,
        lambda: topk(bf16, 64, 128, 512, 16384),
    ),
    "top-k, bf16, h=64 d=128 k=1024 p=262144": (NVIDIA, lambda: topk(bf16, 64, 128, 1024, 262144)),
    "top-k, bf16, h=64 d=128 k=512 p=8192": (["sm_90"], lambda: topk(bf16, 64, 128, 512, 8192)),
    "top-k, bf16, h=64 d=128 k=512 p=8192, one query": (MAIN, lambda: topk(bf16, 64, 128, 512, 8192, 1)),
    "top-k, bf16, h=2 d=32 k=16 p=100": (MAIN, lambda: topk(bf16, 2, 32, 16, 100)),
    "top-k, bf16, h=4 d=256 k=16 p=1000": (["sm_90"], lambda: topk(bf16, 4, 256, 16, 1000)),
    "top-k, fp32, h=64 d=128 k=512 p=4096": (NVIDIA, lambda: topk(fp32, 64, 128, 512, 4096)),
    "top-k, fp32, h=64 d=128 k=512 p=4096, one query": (NVIDIA, lambda: topk(fp32, 64, 128, 512, 4096, 1)),
    "top-k, bf16, h=4 d=256 k=16 p=1000, one query": (["sm_90"], lambda: topk(bf16, 4, 256, 16, 1000, 1)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90."""
    assert row.get("hgmma", 0) > 0 or "d=256" in row["case"], row
