"""Faults planted in kernels of a few lines: each run must find them, or it would not find others."""

import pytest
import torch
import triton
import triton.language as tl
from ttsem.sanitize import KernelFault

ADD = 16


@triton.jit
def racing(out, BLOCK: tl.constexpr):
    """Neighbouring programs share half a block."""
    place = tl.program_id(0) * BLOCK // 2 + tl.arange(0, BLOCK)
    tl.store(out + place, tl.program_id(0) + place)


@triton.jit
def past_the_end(x, out, n, LOADS: tl.constexpr, STORES: tl.constexpr, BLOCK: tl.constexpr):
    """out = x, by blocks; where LOADS or STORES is false, without the mask."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < n, other=0) if LOADS else tl.load(x + place)
    tl.store(out + place, values, mask=(place < n) | (not STORES))


def test_the_kernel_without_a_fault():
    x, out = torch.arange(20.0, device="cuda"), torch.empty(20, device="cuda")
    past_the_end[2,](x, out, 20, True, True, BLOCK=16)
    assert torch.equal(x, out)


def test_a_race_between_programs():
    out = torch.zeros(40, dtype=torch.int32, device="cuda")
    with pytest.raises(KernelFault, match=r"program instances .* both touch element"):
        racing[4,](out, BLOCK=16)


@pytest.mark.parametrize(("masks", "verb"), [((True, False), "writes"), ((False, True), "reads")])
def test_an_access_past_the_end(masks, verb):
    x, out = torch.zeros(20, device="cuda"), torch.zeros(20, device="cuda")
    with pytest.raises(KernelFault, match=rf"{verb} 12 element\(s\) past the end"):
        past_the_end[2,](x, out, 20, *masks, BLOCK=16)


def test_memory_that_nobody_wrote_is_nan():
    x = torch.empty(20, device="cuda")
    out = torch.zeros_like(x)
    past_the_end[2,](x, out, 20, True, True, BLOCK=16)
    assert out.isnan().all()


def test_memory_that_nobody_wrote_is_nan_in_a_backward_pass():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.empty_like(grad)

    x = torch.zeros(3, device="cuda", requires_grad=True)
    Identity.apply(x).sum().backward()
    assert x.grad.isnan().all()
