"""Tests of Triton alone: everything in this folder runs by it."""

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def backend(by_triton):
    """Triton by name."""


@pytest.fixture
def small_blocks(emulated, monkeypatch):
    """Blocks so small that a few tokens need several, where no GPU is; the shipped ones on a GPU."""
    from abyssal.kernels.moe_experts.triton import launch as triton_launch
    from abyssal.kernels.moe_experts.triton import tiles

    def use(rows=16, columns=16, inner=32, tma=False):
        block = tiles.Blocks(columns, inner, 4, 2)
        table = tiles.Tiles(rows, block, block, block, block, tma=tma, group=3)
        monkeypatch.setattr(triton_launch, "tiles_for", lambda w2: table)

    if emulated:
        use()
    return use
