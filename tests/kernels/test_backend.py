"""Which engine computes: Triton on GPUs that its kernels are made for, eager elsewhere."""

import logging

import pytest
import torch

from abyssal.kernels import backend

NEEDS_TRITON = pytest.mark.skipif(not backend._has_triton("pool"), reason="triton is not installed")


@pytest.fixture(params=[(7, 5), (6, 1)])
def old_gpu(request, monkeypatch):
    """One without bf16 in tensor cores; nothing of the choice is remembered."""
    monkeypatch.setattr(backend, "_choose", backend._choose.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: request.param)
    return "{}.{}".format(*request.param)


def test_auto_takes_eager_on_an_old_gpu_and_says_why(old_gpu, caplog):
    caplog.set_level(logging.INFO, "abyssal.kernels")
    assert backend._choose("pool", "auto", "cuda", False) == "eager"
    assert caplog.messages == [f"pool: eager on cuda of compute capability {old_gpu}, allowed is 8.0 or more"]
    assert backend._choose("pool", "eager", "cuda", False) == "eager"


@NEEDS_TRITON
def test_triton_by_name_is_refused_on_an_old_gpu(old_gpu):
    with pytest.raises(RuntimeError, match=f"pool got .* compute capability {old_gpu}, allowed is 8.0 or more"):
        backend._choose("pool", "triton", "cuda", False)


@NEEDS_TRITON
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_triton_is_taken_from_ampere_on(capability, monkeypatch):
    monkeypatch.setattr(backend, "_choose", backend._choose.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert [backend._choose("pool", name, "cuda", False) for name in ("auto", "triton")] == ["triton", "triton"]
    assert backend._choose("pool", "auto", "cuda", True) == "eager"
