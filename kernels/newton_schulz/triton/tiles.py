"""The blocks of the products on each architecture: one fixed choice by a matrix's shape, never by how many there are.

Chosen by compiling: no register spills, shared memory within the limit, wgmma on Hopper.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Of one product: rows and columns of a tile, inner, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    symmetric: Blocks  # X X^T and b A + c A A
    product: Blocks  # a X + B X
    tma: bool = False  # operands come by tensor memory access where they are aligned
    group: int = 8  # row tiles that take a column block in turn, to share it in L2


def _both(*blocks: int) -> Tiles:
    return Tiles(Blocks(*blocks), Blocks(*blocks))


HALF = {  # bf16 and fp16, sides that are multiples of 16
    "sm_80": _both(128, 128, 32, 8, 4),
    "sm_86": _both(128, 128, 32, 8, 3),
    "sm_90": Tiles(Blocks(128, 128, 64, 8, 4), Blocks(128, 256, 64, 8, 3), tma=True),
    "sm_100": Tiles(Blocks(128, 128, 64, 8, 4), Blocks(128, 256, 64, 8, 3)),
    "hip": _both(128, 128, 32, 8, 2),
}
NARROW = _both(64, 64, 64, 4, 3)  # matrices with a side of at most 64
PLAIN = _both(64, 32, 32, 4, 2)  # float32, whose products take no tensor cores, and other widths
