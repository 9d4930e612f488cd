"""What of the indexer's loss is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS = {"sum_heads", "query_gradient", "key_gradient"}


def loss(dtype: torch.dtype, i: int, e: int, h: int, d: int, k: int, p: int) -> None:
    """Loss, share and gradients of a few queries, over picks, few and most of the entries, and over all."""
    from abyssal.kernels.index_loss.triton import launch

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, dtype=dtype)

    student = launch.Student(tensor(64, i, e), tensor(64, i).float(), tensor(p, e))
    teacher = launch.Teacher(tensor(64, h, d), tensor(64, h).float(), tensor(p, d))
    seen = torch.zeros(1, 64, dtype=torch.int64)
    for picks in (*(torch.zeros(1, 64, n, dtype=torch.int64) for n in (k, p)), None):
        launch.index_loss(student, teacher, launch.Compared(picks, seen, seen), scale=0.04, wanted=True)


NVIDIA = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
bf16, fp32 = torch.bfloat16, torch.float32
CASES = {
    "loss, bf16, i=64 e=128 k=512 h=64 d=512": (
        [*NVIDIA, "gfx942"],
        lambda: loss(bf16, 64, 128, 64, 512, 512, 4096),
    ),
    "loss, bf16, i=64 e=128 k=1024 h=128 d=512": (NVIDIA, lambda: loss(bf16, 64, 128, 128, 512, 1024, 4096)),
    "loss, bf16, i=4 e=32 k=32 h=4 d=64": (NVIDIA, lambda: loss(bf16, 4, 32, 4, 64, 32, 96)),
    "loss, fp32, i=4 e=32 k=32 h=4 d=64": (NVIDIA, lambda: loss(fp32, 4, 32, 4, 64, 32, 96)),
    "loss, fp32, i=64 e=128 k=512 h=64 d=512": (["sm_90"], lambda: loss(fp32, 64, 128, 64, 512, 512, 4096)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90."""
    assert row.get("hgmma", 0) > 0, row
