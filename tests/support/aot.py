"""The compile report: what every shipped kernel takes on every architecture, found without a GPU.

    python tests/support/aot.py                    a Markdown table of everything
    python tests/support/aot.py --json sm_90       one JSON document: rows of dicts

Cases run the host code of an op at real shapes in a dry run; the rows say which case compiled them first.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
COLUMNS = ("target", "case", "kernel", "warps", "registers", "spilled", "shared", "hgmma", "mma", "tma")

# experts, width, expert width, slots, tokens; the numbers of tokens and experts do not change what is compiled, so
# the largest are taken where a table of experts is compiled with them, and few for the rest, to spare memory
WIDTHS = {"main": (2048, 768, 8), "flash": (4096, 2048, 6), "toy": (128, 64, 4), "odd": (52, 20, 3)}


def experts(widths: str, dtype: torch.dtype) -> None:
    """Forward and backward of the experts, and SwiGLU alone."""
    from abyssal.kernels.moe_experts import triton_launch as launch

    d, f, k = WIDTHS[widths]
    n, e = 64, 8
    x, weights = torch.empty(n, d, dtype=dtype), torch.empty(n, k)
    w13, w2 = torch.empty(e, 2 * f, d, dtype=dtype), torch.empty(e, d, f, dtype=dtype)
    rows = launch.Rows(*(torch.empty(shape, dtype=torch.int64) for shape in (n * k, e, (n, k))))
    out, h = launch.forward(x, weights, w13, w2, rows, 10.0, keep=True, shared=x)
    launch.backward(out, x, h, weights, w13, w2, rows, 10.0)
    launch.swiglu_backward(launch.swiglu(h, None, 10.0), h, None, 10.0)


def route(e: int, k: int) -> None:
    """Router forward and backward, expert order, and the tiles of that many experts."""
    from abyssal.kernels.moe_experts import triton_launch as launch
    from abyssal.kernels.moe_route import triton as router

    logits = torch.empty(4096, e)
    scores, ids, weights = router._route(logits, torch.empty(e), None, k, 1.5)
    router._route_gradient(scores, weights, scores, ids, 1.5, torch.float32)
    order, counts, _ = router._permutation(ids, e, None)
    launch._schedule(counts, len(order), 128)


def _cases() -> dict[str, tuple[list[str], Callable[[], None]]]:
    """Name: the architectures, and what to run."""
    main = ["sm_80", "sm_90", "sm_100"]
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return {
        "experts, bf16, d=2048 n=768 K=8": ([*main, "sm_86", "gfx942"], lambda: experts("main", bf16)),
        "experts, bf16, d=4096 n=2048 K=6": (main, lambda: experts("flash", bf16)),
        "experts, bf16, d=128 n=64 K=4": (main, lambda: experts("toy", bf16)),
        "experts, fp16, d=2048 n=768 K=8": (["sm_90"], lambda: experts("main", fp16)),
        "experts, fp32, d=2048 n=768 K=8": (main, lambda: experts("main", fp32)),
        "experts, bf16, d=52 n=20 K=3": (["sm_90"], lambda: experts("odd", bf16)),
        "route, E=128 K=8": (main, lambda: route(128, 8)),
        "route, E=256 K=6": (main, lambda: route(256, 6)),
        "route, E=384 K=6": (["sm_90"], lambda: route(384, 6)),
    }


def report(targets: list[str]) -> list[dict[str, Any]]:
    """A row for each kernel that the cases compile, with its case and target."""
    from dryrun import gpu

    rows = []
    for target in targets:
        with gpu(target) as (_, kernels):
            for case, (where, run) in _cases().items():
                start = len(kernels)
                if target in where:
                    run()
                rows += [{"target": target, "case": case, **k} for k in kernels[start:]]
    return rows


def main(arguments: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    targets = [a for a in arguments if a != "--json"] or ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"]
    rows = report(targets)
    if "--json" in arguments:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(str(row.get(c, "")) for c in COLUMNS) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
