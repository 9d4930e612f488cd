"""On a CUDA device, at sizes with many full tiles: the same comparisons, the same bits, and a CUDA graph."""

import pytest
import torch
from moe_cases import NAMES, error, make, results

from abyssal.kernels import moe_experts, moe_permutation, moe_route
from abyssal.kernels.moe_experts import eager

pytestmark = pytest.mark.gpu
SIZES = {"n": 2000, "k": 8, "e": 64, "d": 1024, "f": 512}


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [1.0, None])
def test_output_and_gradients(dtype, limit):
    arguments = make(**SIZES, dtype=dtype, device="cuda")
    dout = torch.randn_like(arguments[0])
    got, plain = (results(run, arguments, limit, dout) for run in (moe_experts, eager.moe_experts))
    exact = results(eager.moe_experts, arguments, limit, dout.double(), dtype=torch.float64)
    for name, a, b, c in zip(NAMES, got, plain, exact):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, the reference {error(b, c):.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_on_each_run_and_in_any_batch(dtype):
    x, experts, weights, w13, w2 = arguments = make(**SIZES, dtype=dtype, device="cuda")
    dout = torch.randn_like(x)
    full, again = (results(moe_experts, arguments, 1.0, dout) for _ in range(2))
    for name, a, b in zip(NAMES, full, again):
        assert torch.equal(a, b), f"{name}, run to run"
    order = torch.randperm(len(x), device="cuda")
    mixed = results(moe_experts, (x[order], experts[order], weights[order], w13, w2), 1.0, dout[order])
    few = results(moe_experts, (x[:37], experts[:37], weights[:37], w13, w2), 1.0, dout[:37])
    for name, a, b, c in zip(NAMES[:3], full, mixed, few):
        assert torch.equal(a[order], b), f"{name} of permuted tokens"
        assert torch.equal(a[:37], c), f"{name} of a prefix"


def test_routing_is_that_of_the_reference():
    z, bias = torch.randn(5000, 256, device="cuda"), torch.randn(256, device="cuda")
    got, want = (moe_route(z, top_k=6, scale=1.5, bias=bias, backend=b) for b in ("triton", "eager"))
    assert (got.experts == want.experts).all(-1).float().mean() > 0.999  # scores within a rounding of each other
    same = (got.experts == want.experts).all(-1)
    torch.testing.assert_close(got.weights[same], want.weights[same])
    for a, b in zip(*(moe_permutation(got.experts, 256, backend=b) for b in ("triton", "eager"))):
        assert torch.equal(a, b)


def test_a_cuda_graph_replays_other_routings():
    x, _, _, w13, w2 = make(**SIZES, dtype=torch.bfloat16, device="cuda")
    logits = torch.randn(len(x), 64, device="cuda")

    def run():
        routing = moe_route(logits, top_k=8, scale=1.5)
        return moe_experts(x, routing.experts, routing.weights, w13, w2, limit=1.0)

    stream = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for crowded in (False, True):
            logits.copy_(torch.randn_like(logits))
            if crowded:
                logits[:, 8:] -= 50
            graph.replay()
            assert torch.equal(out, run())


def test_nothing_waits_for_the_device():
    x, _, _, w13, w2 = (t.requires_grad_() if t.is_floating_point() else t for t in make(**SIZES, device="cuda"))
    logits = torch.randn(len(x), 64, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = moe_route(logits, top_k=8, scale=1.5)
        moe_experts(x, routing.experts, routing.weights, w13, w2, limit=1.0).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_kept_for_the_backward_pass_is_the_formula():
    x, experts, weights, w13, w2 = make(**SIZES, dtype=torch.bfloat16, device="cuda")
    leaves = [t.requires_grad_() for t in (x, weights, w13, w2)]
    n, k, f = (SIZES[key] for key in "nkf")
    before = torch.cuda.memory_allocated()
    out = moe_experts(leaves[0], experts, *leaves[1:], limit=1.0)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    assert kept <= 4 * n * k * f + 16 * n * k + 100_000  # h, order and inverse; x and the weights are the caller's
