"""The blocks of each kernel on each architecture: one fixed choice, so that no query depends on the rest of its batch.

Chosen by compiling: no register spills, shared memory within the limit, wgmma on Hopper, which needs 64 heads.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Of a kernel with one query to a program: heads, keys of a step, warps, pipeline stages."""

    heads: int
    keys: int
    warps: int
    stages: int


class Owned(NamedTuple):
    """Of the kernel with one tile of keys to a program: keys, (query, head) rows of a step, channels, warps, stages."""

    keys: int
    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    forward: Blocks
    backward: Blocks  # dq; its keys divide those of `owned`
    counted: Blocks  # the same with counts, which take a few registers more
    owned: Owned  # dkv


HALF = {  # bf16 and fp16, chosen for d = 512
    "sm_80": Tiles(Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Owned(64, 64, 128, 8, 2)),
    "sm_86": Tiles(Blocks(32, 32, 8, 1), Blocks(32, 16, 8, 1), Blocks(32, 16, 8, 1), Owned(64, 64, 128, 8, 1)),
    "sm_90": Tiles(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1), Owned(64, 64, 256, 8, 2)),
    "sm_100": Tiles(Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Owned(64, 64, 256, 8, 2)),
    "hip": Tiles(Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Owned(64, 32, 128, 4, 1)),
}
_SMALL = Blocks(16, 16, 4, 1)
SINGLE = Tiles(Blocks(16, 16, 8, 1), _SMALL, _SMALL, Owned(32, 16, 64, 4, 1))  # float32 takes no tensor cores
