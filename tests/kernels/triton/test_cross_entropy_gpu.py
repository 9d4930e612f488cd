"""The loss on a CUDA device, at a language model's sizes: parity, bits, memory, a CUDA graph."""

import pytest
import torch

from abyssal.kernels import cross_entropy
from abyssal.kernels.cross_entropy import triton as op

pytestmark = pytest.mark.gpu
N, V, D = 5000, 129_280, 512


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def case(n=N, v=V, d=D, dtype=torch.bfloat16, scale=1.0):
    g = torch.Generator(device="cuda").manual_seed(0)
    x, weight = (torch.randn(rows, d, generator=g, device="cuda") for rows in (n, v))
    targets = torch.randint(0, v, (n,), generator=g, device="cuda")
    targets[torch.rand(n, generator=g, device="cuda") < 0.2] = -100
    return (x * scale).to(dtype).requires_grad_(), (weight / d**0.5).to(dtype).requires_grad_(), targets


def results(x, weight, targets, **options):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    loss = cross_entropy(x, weight, targets, **options)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("v", [8192, 32_003])
def test_as_near_to_float64_as_the_reference(dtype, v):
    x, weight, targets = case(v=v, dtype=dtype, scale=4.0)
    got, plain = (results(x, weight, targets, z_loss=1e-4, chunk=2048, backend=b) for b in ("triton", "eager"))
    exact = results(x.double(), weight.double(), targets, z_loss=1e-4, chunk=512, backend="eager")
    for name, a, b, c in zip(("loss", "dx", "dweight"), got, plain, exact):
        assert a.dtype == b.dtype, name
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.1e}, the reference {error(b, c):.1e}"


def test_rows_are_those_of_the_equations():
    """Given logits, so that no product rounds: also where the gradient overwrites them in half precision."""
    logits = torch.randn(64, V, device="cuda") * 5
    targets = torch.randint(0, V, (64,), device="cuda")
    want = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    dwant = logits.double().softmax(-1) - torch.nn.functional.one_hot(targets, V)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-3), (torch.float16, 5e-4)):
        for _ in range(5):
            losses = torch.empty(64, device="cuda")
            grads = op.loss_rows(logits.clone(), targets, losses, -100, 0.0, dtype)
            torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
            assert error(grads, dwant) < limit


def test_the_same_bits_on_each_run():
    x, weight, targets = case(n=9000)
    for a, b in zip(*(results(x, weight, targets) for _ in range(2))):
        assert torch.equal(a, b)


def test_ignored_tokens_and_targets_outside():
    x, weight, targets = case()
    want = results(x, weight, targets)
    with torch.no_grad():
        x[targets == -100] = float("nan")
    for a, b in zip(results(x, weight, targets), want):
        assert torch.equal(a, b)
    targets[7] = V
    assert cross_entropy(x, weight, targets).isnan()
    assert cross_entropy(x, weight, torch.full_like(targets, -100)) == 0


@pytest.mark.parametrize("n", [4096, 16_384])
def test_memory_is_one_chunk_of_logits_and_the_gradients(n):
    x, weight, targets = case(n=n)
    cross_entropy(x[:64], weight, targets[:64]).backward()  # the library's workspace
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = cross_entropy(x, weight, targets)
    chunk = 4 * op.CHUNK * V
    gradients = x.nbytes + 2 * weight.nbytes  # dx in bf16, dw in fp32
    assert torch.cuda.max_memory_allocated() - before <= chunk + gradients + 4 * x[: op.CHUNK].nbytes + 30_000_000
    assert torch.cuda.memory_allocated() - before <= gradients + 100_000
    loss.backward()


def test_nothing_waits_for_the_device_and_a_graph_replays():
    x, weight, targets = case(v=8192)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(x, weight, targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(x, weight, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cross_entropy(x, weight, targets)
        x.copy_(torch.randn_like(x))
        targets.fill_(-100)
        targets[5:50] = 17
        graph.replay()
        assert torch.equal(out, cross_entropy(x, weight, targets))
