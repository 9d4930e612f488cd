"""The blocks of mHC's two products on each architecture: one fixed choice, so that no token depends on its batch.

Chosen by compiling: no register spills, shared memory within the limit, tensor cores. The products are skinny, their
traffic is that of the streams: a tile has so many tokens that the projection, which every tile reads, stays cheap.
"""

from typing import NamedTuple

SPLIT = 4096  # columns of the flattened streams that one program of the projection sums over
GROUPS = 16  # at most so many partial sums of the projection's gradient,
STEPS = 16  # each over at least so many tiles of tokens
TOKENS = 32  # of one block of coefficients
PARTS = 256  # at most so many partial sums of the gradients of base and scale


class Blocks(NamedTuple):
    """Of one product: tokens, columns of the streams, warps, pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture. `precision` is that of float32 factors; tf32x3 is exact to about 2^-21."""

    project: Blocks
    backward: Blocks
    precision: str = "tf32x3"


TABLE = {  # n <= 4: up to 32 rows of the projection
    "sm_80": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "sm_86": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "sm_90": Tiles(Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 2)),
    "sm_100": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "hip": Tiles(Blocks(32, 64, 4, 2), Blocks(32, 32, 4, 2), "ieee"),
}
_WIDE = Tiles(Blocks(32, 32, 4, 2), Blocks(16, 32, 8, 2))
WIDE = {  # more streams: up to 128 rows
    **dict.fromkeys(TABLE, _WIDE),
    "hip": _WIDE._replace(precision="ieee"),
}


def panel(n: int, width: int) -> tuple[int, int]:
    """Columns of every stream that a program holds at once, and its warps: so that n (n + 1) sums fit in registers."""
    most, each = {1: (1024, 8), 2: (1024, 8), 3: (512, 4), 4: (512, 4)}.get(n, (128, 1))
    columns = min(1 << (width - 1).bit_length(), most)
    return columns, max(columns // (32 * each), 1)
