"""What of the experts is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS = {"grouped_swiglu", "grouped_swiglu_backward", "grouped", "grouped_outer"}
# experts, width, expert width, slots, tokens; the numbers of tokens and experts do not change what is compiled, so
# the largest are taken where a table of experts is compiled with them, and few for the rest, to spare memory
WIDTHS = {"main": (2048, 768, 8), "flash": (4096, 2048, 6), "toy": (128, 64, 4), "odd": (52, 20, 3)}


def experts(widths: str, dtype: torch.dtype) -> None:
    """Forward and backward of the experts, and SwiGLU alone."""
    from abyssal.kernels.moe_experts.triton import launch
    from abyssal.kernels.moe_route.routing import Permutation

    d, f, k = WIDTHS[widths]
    n, e = 64, 8
    x, weights = torch.empty(n, d, dtype=dtype), torch.empty(n, k)
    w13, w2 = torch.empty(e, 2 * f, d, dtype=dtype), torch.empty(e, d, f, dtype=dtype)
    rows = Permutation(*(torch.empty(shape, dtype=torch.int64) for shape in (n * k, e, (n, k))))
    operands = launch.Operands(x, weights, w13, w2)
    out, h, plan = launch.forward(operands, rows, 10.0, keep=True, shared=x)
    launch.backward(out, h, operands, launch.Rows(rows.order, rows.inverse), plan, 10.0)
    launch.swiglu_backward(launch.swiglu(h, None, 10.0), h, None, 10.0)


def schedule(e: int, k: int) -> None:
    """The tiles of that many experts."""
    from abyssal.kernels.moe_experts.triton import launch

    launch.schedule(torch.empty(e, dtype=torch.int64), 4096 * k, 128)


MAIN = ["sm_80", "sm_90", "sm_100"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "experts, bf16, d=2048 n=768 K=8": ([*MAIN, "sm_89", "sm_120", "gfx942"], lambda: experts("main", bf16)),
    "experts, bf16, d=4096 n=2048 K=6": (MAIN, lambda: experts("flash", bf16)),
    "experts, bf16, d=128 n=64 K=4": (MAIN, lambda: experts("toy", bf16)),
    "experts, fp16, d=2048 n=768 K=8": (["sm_90"], lambda: experts("main", fp16)),
    "experts, fp32, d=2048 n=768 K=8": (MAIN, lambda: experts("main", fp32)),
    "experts, bf16, d=52 n=20 K=3": (["sm_90"], lambda: experts("odd", bf16)),
    "schedule, E=128 K=8": (MAIN, lambda: schedule(128, 8)),
    "schedule, E=256 K=6": (MAIN, lambda: schedule(256, 6)),
    "schedule, E=384 K=6": (["sm_90"], lambda: schedule(384, 6)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90."""
    assert row["hgmma"] > 0, row
    assert (row["tma"] > 0) == ("d=52" not in row["case"]), row
