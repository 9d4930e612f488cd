"""What of mHC is compiled ahead of time: see aot.py."""

from typing import Any

import torch

PRODUCTS = {"project", "project_backward"}
TF32X3 = PRODUCTS  # in three products of 10-bit factors, which keep float32's accuracy
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def site(n: int, d: int, dtype: torch.dtype, t: int = 64, iterations: int = 20) -> None:
    """Forward and backward of a site, of the head, and of each op by itself."""
    from abyssal.kernels.hyper.triton import launch

    streams, output = torch.empty(t, n, d, dtype=dtype), torch.empty(t, d, dtype=dtype)
    for m, parts, rounds in (((n + 2) * n, 3, iterations), (n, 1, 0)):
        fn, base, scale = torch.empty(m, n * d), torch.empty(m), torch.empty(parts)
        where = launch.Site(streams, fn, base, scale, rounds, 1e-6)
        u, pre, post, comb, mix, r, _ = launch.read(where, 1e-6, True)
        upstream = launch.Upstream(u, pre, *((post, comb, streams) if rounds else (None, None, None)))
        launch.read_backward(upstream, where, launch.Saved(pre, mix, r), need_streams=True, need_fn=True)
        if rounds:
            launch.recombine_backward(launch.recombine(output, streams, post, comb), output, streams, post, comb)
    launch.collapse_backward(launch.collapse(streams, pre), streams, pre)


MAIN = ["sm_80", "sm_90", "sm_100"]
CASES = {
    "mHC, bf16, n=4 d=4096": ([*MAIN, "sm_89", "sm_120", "gfx942"], lambda: site(4, 4096, bf16)),
    "mHC, bf16, n=4 d=7168": (MAIN, lambda: site(4, 7168, bf16)),
    "mHC, bf16, n=4 d=256": (MAIN, lambda: site(4, 256, bf16)),
    "mHC, fp32, n=4 d=4096": (MAIN, lambda: site(4, 4096, fp32)),
    "mHC, fp16, n=8 d=2048": (["sm_90"], lambda: site(8, 2048, fp16)),
    "mHC, bf16, n=3 d=250": (["sm_90"], lambda: site(3, 250, bf16)),
    "mHC, fp32, n=5 d=48": (["sm_90"], lambda: site(5, 48, fp32)),
    "mHC, bf16, n=1 d=64": (["sm_90"], lambda: site(1, 64, bf16)),
    "mHC, fp32, n=1 d=1": (["sm_90"], lambda: site(1, 1, fp32, t=1, iterations=1)),
}


def check_hopper(row: dict[str, Any]) -> None:
    """Of a half-precision product on sm_90: the projection of up to four streams takes wgmma."""
    if row["kernel"] == "project" and "n=8" not in row["case"]:
        assert row["hgmma"] > 0, row
