"""Kernels run on the GPU where there is one; else in the interpreter, with blocks so small that all loops go round.

`python tests/sanitize` runs them compiled, on a CPU that says it is a GPU, with small blocks too.
"""

import importlib.util
import sys

import interp_shim
import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
ENGINES = ["eager", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"))]


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each engine of an op in turn, to be held against the definition."""
    if request.param == "triton":
        request.getfixturevalue("by_triton")
        request.getfixturevalue("launch")
    return request.param


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def emulated(device):
    """Whether no GPU is there, so that blocks must be small: time goes by the program, and a race takes two of them."""
    return device == "cpu" or "ttsem" in sys.modules


@pytest.fixture
def by_triton(monkeypatch):
    """Triton by name, and memory that no kernel has written is NaN, or an absurd id."""
    interp_shim.install()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *shape, **options):
        out = new_empty(self, *shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 10**6 if out.itemsize > 1 else 0xA5)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    with np.errstate(all="ignore"):  # a GPU does not warn of infinities either
        yield


@pytest.fixture
def launch():
    """Triton's launches of an op, shrunk; its tests say how, where they have to."""


@pytest.fixture
def shipped(launch, monkeypatch):
    """Triton as it ships: fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")
    return launch
