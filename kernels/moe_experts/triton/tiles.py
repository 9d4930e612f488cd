"""The blocks of each kernel on each architecture: one fixed choice, so that no token depends on the rest of its batch.

Chosen by compiling: no register spills, shared memory within the limit, wgmma on Hopper. Tiles have 128 rows for 16-bit
inputs even where an expert has few: below some 200 rows to an expert the weights' bytes are what takes time, and tensor
cores, which sum in another order below 64 rows, would make a token's bits depend on the load.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Of one product: columns, inner, warps, pipeline stages."""

    columns: int
    inner: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    rows: int  # of every tile
    swiglu: Blocks  # x w13: two accumulators
    swiglu_backward: Blocks  # dout w2, then SwiGLU backwards
    product: Blocks  # a w2 and dh w13
    outer: Blocks  # dw13 and dw2: `rows` by `columns` of the weight
    tma: bool = False  # weights, and rows in expert order, come by tensor memory access where they are aligned
    group: int = 8  # tiles that take a column block in turn, to share it in L2


HALF = {  # bf16 and fp16, widths that are multiples of 16
    "sm_80": Tiles(128, Blocks(64, 32, 8, 4), Blocks(64, 32, 8, 4), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3)),
    "sm_86": Tiles(128, Blocks(64, 32, 8, 3), Blocks(64, 32, 8, 3), Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 3)),
    "sm_90": Tiles(
        128, Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 3), Blocks(256, 64, 8, 4), tma=True
    ),
    "sm_100": Tiles(128, Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 3), Blocks(256, 64, 8, 3)),
    "hip": Tiles(128, Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
}
_SMALL = Blocks(32, 16, 4, 2)
# float32, whose products take no tensor cores, and other widths
PLAIN = Tiles(64, _SMALL._replace(warps=8), _SMALL, _SMALL, _SMALL)
