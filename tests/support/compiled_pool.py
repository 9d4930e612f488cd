"""What of the pooling is compiled ahead of time: see aot.py."""

import torch

PRODUCTS: set[str] = set()  # nothing here multiplies matrices
MAIN = ["sm_80", "sm_90", "sm_100"]
ALL = [*MAIN, "sm_89", "sm_120", "gfx942"]
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def pooling(ratio: int, d: int, overlap: bool, dtype: torch.dtype = fp32) -> None:
    """Forward and backward, of regular windows and of gathered ones."""
    from abyssal.kernels.pool.triton import launch

    channels = 2 * d if overlap else d
    kv, gate, bias = (torch.empty(n, dtype=dtype) for n in ((2, 300, channels), (2, 300, channels), (ratio, channels)))
    first, follows = torch.full((2, 300 // ratio), -1), torch.zeros(2, 300 // ratio, dtype=torch.bool)
    for windows in (
        launch.Windows(None, None, ratio, overlap),
        launch.Windows(first, follows if overlap else None, ratio, overlap),
    ):
        launch.backward(launch.forward(kv, gate, bias.float(), windows), kv, gate, bias.float(), windows)


CASES = {
    "pool, m=4 D=512 overlap": (ALL, lambda: pooling(4, 512, True)),
    "pool, m=4 D=128 overlap": (ALL, lambda: pooling(4, 128, True)),
    "pool, m=128 D=512": (ALL, lambda: pooling(128, 512, False)),
    "pool, m=4 D=512 overlap, bf16": (MAIN, lambda: pooling(4, 512, True, bf16)),
    "pool, m=32 D=64": (["sm_90"], lambda: pooling(32, 64, False)),
    "pool, m=3 D=20 overlap": (["sm_90"], lambda: pooling(3, 20, True)),
}
