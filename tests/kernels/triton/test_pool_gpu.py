"""The pooling on a CUDA device, at sizes with many programs: accuracy, the same bits, CUDA graphs, memory."""

import pytest
import torch

from abyssal.kernels import pool
from abyssal.kernels.pool import eager

pytestmark = pytest.mark.gpu
SIZES = [(4, 512, True), (4, 128, True), (128, 512, False), (3, 20, True), (100, 72, False)]
NAMES = ("entries", "dkv", "dgate", "dbias")


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def make(ratio, d, overlap, dtype=torch.float32, b=2, t=3001):
    torch.manual_seed(0)
    c = 2 * d if overlap else d
    kv, gate = (torch.randn(b, t, c, device="cuda").to(dtype) for _ in range(2))
    return [kv, 2 * gate, torch.randn(ratio, c, device="cuda")]


def documents(ratio, b=2, t=3001):
    """Windows of documents of 700 tokens, the last of which leaves a gap; the second row has no entry at its end."""
    first = torch.cat([torch.arange(o, o + 700 - ratio + 1, ratio) for o in range(0, t - 699, 700)])
    follows = first % 700 > 0
    first = first.expand(b, -1).clone()
    first[1:, -2:] = -1
    return {"first": first.cuda(), "follows": follows.expand(b, -1).cuda()}


def results(run, arguments, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in arguments]
    out = run(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ratio", "d", "overlap"), SIZES)
def test_entries_and_gradients(ratio, d, overlap, dtype, gathered):
    windows = documents(ratio) if gathered else {"first": None, "follows": None}
    arguments, options = make(ratio, d, overlap, dtype), {"ratio": ratio, "overlap": overlap, **windows}
    got, plain = (results(run, arguments, **options) for run in (pool, eager.pool))
    exact = results(eager.pool, arguments, torch.float64, **options)
    for name, a, b, c in zip(NAMES, got, plain, exact):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{name}: {error(a, c):.2e}, the reference {error(b, c):.2e}"
    assert all(torch.equal(a, b) for a, b in zip(got, results(pool, arguments, **options)))


def test_an_entry_does_not_depend_on_its_batch():
    for ratio, d, overlap in SIZES:
        kv, gate, bias = make(ratio, d, overlap)
        full = pool(kv, gate, bias, ratio=ratio, overlap=overlap)
        few = pool(kv[1:, : 7 * ratio + 1], gate[1:, : 7 * ratio + 1], bias, ratio=ratio, overlap=overlap)
        assert torch.equal(full[1:, :7], few)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_cuda_graph_replays_other_values(gathered):
    kv, gate, bias = make(4, 128, True)
    options = {"ratio": 4, "overlap": True, **(documents(4) if gathered else {})}

    dout = torch.randn_like(pool(kv, gate, bias, **options))

    def step():
        leaves = [x.detach().requires_grad_() for x in (kv, gate, bias)]
        return torch.autograd.grad(pool(*leaves, **options), leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    kv.normal_(), gate.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_nothing_waits_for_the_device():
    arguments = [x.requires_grad_() for x in make(4, 128, True)]
    windows = documents(4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, windows):
            pool(*arguments, ratio=4, overlap=True, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_kept_for_the_backward_pass():
    arguments = [x.requires_grad_() for x in make(4, 128, True)]
    before = torch.cuda.memory_allocated()
    out = pool(*arguments, ratio=4, overlap=True)
    assert torch.cuda.memory_allocated() - before - out.nbytes < 100_000
