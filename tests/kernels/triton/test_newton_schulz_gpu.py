"""Newton-Schulz iteration on a CUDA device, at a model's sizes: parity, bits, a CUDA graph, scratch."""

import pytest
import torch

from abyssal.kernels import newton_schulz, newton_schulz_many
from abyssal.kernels.newton_schulz import HYBRID
from abyssal.kernels.newton_schulz.triton import launch

pytestmark = pytest.mark.gpu
SHAPES = [
    (3, 2048, 4096),
    (2, 8192, 1024),
    (6, 1000, 1008),
    (40, 24, 16384),
    (64, 128, 64),
    (5, 129, 77),
    (1, 64, 4096),
]


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(x, steps=HYBRID):
    """The iteration in float64, which no kernel of ours computes."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.double().mT if tall else x.double()
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
def test_as_near_to_float64_as_the_reference(shape, compute):
    x = torch.randn(shape, device="cuda")
    want = exact(x, HYBRID[:2] + HYBRID[-1:])
    got, plain = (
        newton_schulz(x, coefficients=HYBRID[:2] + HYBRID[-1:], compute_dtype=compute, backend=b)
        for b in ("triton", "eager")
    )
    assert error(got, want) <= 2 * error(plain, want) + 1e-6


@pytest.mark.parametrize("shape", [s for s in SHAPES if max(s[1:]) >= 2 * min(s[1:])], ids=str)
def test_v4s_schedule_in_bfloat16_orthogonalises(shape):
    """Of random matrices twice as long as wide, no singular value is small."""
    x = torch.randn(shape, device="cuda").bfloat16()
    got = newton_schulz(x)
    assert got.dtype == torch.bfloat16
    wide = got.double() if shape[1] <= shape[2] else got.double().mT
    away = wide @ wide.mT - torch.eye(min(shape[1:]), device="cuda", dtype=torch.float64)
    assert float(away.flatten(1).norm(dim=1).max()) / min(shape[1:]) ** 0.5 < 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_the_same_bits_on_each_run_and_in_any_batch(shape, compute, monkeypatch):
    x = torch.randn(shape, device="cuda")
    full = newton_schulz(x, compute_dtype=compute)
    assert torch.equal(full, newton_schulz(x, compute_dtype=compute))
    assert torch.equal(full[-1], newton_schulz(x[-1], compute_dtype=compute))
    assert torch.equal(full.mT, newton_schulz(x.mT, compute_dtype=compute))
    parts = newton_schulz_many([x[0], x.mT, *x], compute_dtype=compute)
    assert torch.equal(full[0], parts[0]) and torch.equal(full.mT, parts[1]) and torch.equal(full[-1], parts[-1])
    monkeypatch.setattr(launch, "SCRATCH", 1)
    assert torch.equal(full, newton_schulz(x, compute_dtype=compute)), "one by one"


def test_large_small_zero_and_nan_matrices():
    x = torch.randn(6, 200, 304, device="cuda")
    want = newton_schulz(x)
    x[1] *= 2.0**110
    x[2] *= 2.0**-110
    x[3], x[4, 7, 7] = 0, float("nan")
    got = newton_schulz(x)
    assert torch.equal(got[[0, 5]], want[[0, 5]]) and not got[3].any() and got[4].isnan().all()
    assert error(got[1:3], want[1:3]) < 1e-2


def test_a_cuda_graph_and_nothing_that_waits():
    x = torch.randn(4, 256, 512, device="cuda")
    newton_schulz(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        newton_schulz(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = newton_schulz(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, newton_schulz(x))


def test_scratch_is_bounded():
    """Of 64 matrices, what is at work at once is what SCRATCH says, beside the result."""
    x = torch.randn(64, 2048, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = newton_schulz(x)
    peak = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert peak <= 2 * launch.SCRATCH + 4_000_000
