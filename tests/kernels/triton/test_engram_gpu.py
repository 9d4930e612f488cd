"""Engram on a CUDA device, at V4.1's widths: the same comparisons, the same bits, a CUDA graph, no waiting."""

import pytest
import torch

from abyssal.kernels import engram_gate, engram_gather, engram_hash
from abyssal.kernels.engram import engram_layout

pytestmark = pytest.mark.gpu
T, N, D, W = 1500, 4, 5120, 256


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def gate_inputs(dtype, t=T):
    shapes = (1, t, N, D), (1, t, N, D), (1, t, D)
    tensors = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*tensors, *(torch.rand(2, N, D, device="cuda") + 0.5))]


def run(inputs, grad, **options):
    out = engram_gate(*inputs, eps=1e-20, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_and_gradients(dtype):
    inputs = gate_inputs(dtype)
    grad = torch.randn(1, T, N, D, device="cuda", dtype=dtype)
    got, plain = run(inputs, grad), run(inputs, grad, backend="eager")
    exact = run([x.detach().double().requires_grad_() for x in inputs], grad, backend="eager")
    for name, a, b, c in zip(("out", "streams", "key", "value", "weight_h", "weight_k"), got, plain, exact):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, the reference {error(b, c):.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_on_each_run_and_of_a_prefix(dtype):
    inputs = gate_inputs(dtype)
    grad = torch.randn(1, T, N, D, device="cuda", dtype=dtype)
    first, again = run(inputs, grad), run(inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    few = [x[:, :37].detach().requires_grad_() for x in inputs[:3]] + inputs[3:]
    for a, b in zip(first[:4], run(few, grad[:, :37])):
        assert torch.equal(a[:, :37], b)


def addresses():
    layout = engram_layout([1, 14], classes=99_092, vocab_size=16_000_000, max_ngram=4, heads=8)[1]
    return [torch.tensor(x, device="cuda") for x in layout[:3]]


def test_hash_is_that_of_the_reference():
    arguments, ids = addresses(), torch.randint(0, 99_092, (3, 4000), device="cuda")
    start = (torch.arange(4000, device="cuda") // 77 * 77).expand(3, -1)
    got, want = (engram_hash(ids, *arguments, pad=2, start=start, backend=b) for b in ("triton", "eager"))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_and_its_gradient_past_two_to_the_31(dtype):
    """A table of 2^31 values and more, and one row that half of all look-ups share."""
    r = 2**31 // W + 100
    table = torch.zeros(r, W, device="cuda", dtype=dtype)
    table[-100:] = torch.randn(100, W, device="cuda").to(dtype)
    rows = torch.randint(r - 100, r, (1, 3000, 24), device="cuda")
    rows[:, ::2] = r - 1
    assert torch.equal(engram_gather(table, rows), engram_gather(table, rows, backend="eager"))
    small, at = table[-100:].clone().requires_grad_(), rows - (r - 100)
    grad = torch.randn(1, 3000, 24 * W, device="cuda", dtype=dtype)
    once, twice = (torch.autograd.grad(engram_gather(small, at), small, grad)[0] for _ in range(2))
    assert torch.equal(once, twice)
    exact = torch.zeros(100, W, device="cuda", dtype=torch.float64)
    exact.index_add_(0, at.flatten(), grad.double().view(-1, W))
    assert error(once, exact) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_a_cuda_graph_replays_and_nothing_waits():
    arguments, table = addresses(), torch.randn(400_000_000 // 256, 256, device="cuda").requires_grad_()
    ids = torch.randint(0, 99_092, (1, 200), device="cuda")
    streams, _, _, weight_h, weight_k = gate_inputs(torch.float32, 200)
    wkv = torch.randn(24 * 256, 5 * D, device="cuda") * 0.01

    def step():
        rows = engram_hash(ids, *arguments, pad=2) % len(table)
        keys = (engram_gather(table, rows) @ wkv).unflatten(-1, (5, D))
        out = engram_gate(streams, keys[:, :, :4], keys[:, :, 4], weight_h, weight_k, eps=1e-20)
        return [out, *torch.autograd.grad(out.float().square().sum(), (streams, weight_h, weight_k, table))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    for _ in range(2):
        ids.copy_(torch.randint_like(ids, 99_092))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(kept, step()))


def test_memory_kept_for_the_backward_pass():
    inputs = gate_inputs(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    out = engram_gate(*inputs, eps=1e-20)
    assert torch.cuda.memory_allocated() - before - out.nbytes <= 3 * 4 * T * N + 10_000
