"""Tests of Triton alone: everything in this folder runs by it."""

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def backend(by_triton):
    """Triton by name."""
