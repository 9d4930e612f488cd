"""Attention on a CUDA device at real widths: as near to float64 as the reference, same bits, a graph, no waiting."""

import pytest
import torch
from attention_cases import NAMES, causal, error, make, picks, results

from abyssal.kernels.attention import attention, eager
from abyssal.kernels.attention.triton import launch

pytestmark = pytest.mark.gpu
REACH = {"window": 128, "scale": 512**-0.5}


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def case(entries, t=600, h=64, d=512, p=300, k=64, dtype=torch.bfloat16):
    tensors = make(1, t, h, d, p=0 if entries == "window" else p, past=40, dtype=dtype, device="cuda")
    sight = {"window": {}, "range": causal(t, p, "cuda"), "picks": {"index": picks(1, t, k, p, "cuda")}}[entries]
    return tensors, {**REACH, **sight}, torch.randn_like(tensors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("entries", ["window", "range", "picks"])
@pytest.mark.parametrize(("h", "d"), [(64, 512), (128, 512), (4, 64), (6, 40)])
def test_output_and_gradients(dtype, entries, h, d):
    tensors, options, dout = case(entries, t=200, h=h, d=d, dtype=dtype)
    got, plain = (results(run, tensors, dout, **options) for run in (attention, eager.attention))
    exact = results(eager.attention, tensors, dout.double(), dtype=torch.float64, **options)
    for name, a, b, c in zip(NAMES, got, plain, exact):
        if c is not None:
            floor = 1e-6 if dtype == torch.float32 else 6e-3  # p and ds are rounded where the reference keeps float32
            assert error(a, c) <= 2 * error(b, c) + floor, f"{name}: {error(a, c):.2e}, reference {error(b, c):.2e}"


@pytest.mark.parametrize("dense", [0, 1000], ids=["rows", "counts"])
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_the_same_bits_on_each_run_and_for_each_query(monkeypatch, entries, dense):
    monkeypatch.setattr(launch, "DENSE", dense)
    tensors, options, dout = case(entries)
    full, again = (results(attention, tensors, dout, **options) for _ in range(2))
    for name, a, b in zip(NAMES, full, again):
        assert torch.equal(a, b), f"{name}, run to run"
    q, kv, compressed, sink = tensors
    few = {name: x[:, :100] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    part = results(attention, (q[:, :100], kv[:, :140], compressed, sink), dout[:, :100], **few)
    for name, a, b in zip(NAMES[:3], full, part):
        assert torch.equal(a[:, :100], b), f"{name} of a prefix"


@pytest.mark.parametrize("entries", ["range", "picks"])
def test_chunks_and_atomics_change_only_the_order(monkeypatch, entries):
    tensors, options, dout = case(entries)
    want = results(attention, tensors, dout, **options)
    monkeypatch.setattr(launch, "BUDGET", 1 << 22)
    assert all(error(a, b) < 1e-3 for a, b in zip(results(attention, tensors, dout, **options), want))
    monkeypatch.setenv("ABYSSAL_ATOMICS", "1")
    assert all(error(a, b) < 1e-3 for a, b in zip(results(attention, tensors, dout, **options), want))


def test_a_cuda_graph_replays_other_picks():
    tensors, options, _ = case("picks")
    index = options["index"]
    for x in tensors:
        x.requires_grad_()

    def run():
        out, _ = attention(*tensors, **options)
        return out, *torch.autograd.grad(out.sum(), tensors)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        index.copy_(picks(*index.shape, 300, "cuda", seed))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@pytest.mark.parametrize("dense", [0, 1000], ids=["rows", "counts"])
def test_nothing_waits_for_the_device(monkeypatch, dense):
    monkeypatch.setattr(launch, "DENSE", dense)
    tensors, options, dout = case("picks")
    leaves = [x.requires_grad_() for x in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*leaves, **options)[0].backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_within_the_formula(monkeypatch):
    monkeypatch.setattr(launch, "BUDGET", 1 << 26)
    tensors, options, dout = case("picks", t=2048, p=2048)
    leaves = [x.requires_grad_() for x in tensors]
    before = torch.cuda.memory_allocated()
    out, lse = attention(*leaves, **options)
    assert torch.cuda.memory_allocated() - before <= out.nbytes + lse.nbytes + 10_000
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out.backward(dout)
    sums = 3 * sum(x.numel() * 4 for x in leaves[1:3])  # in float32, a chunk's parts of them, and the results
    peak = torch.cuda.max_memory_allocated() - held
    assert peak <= 2 * launch.BUDGET + leaves[0].nbytes + 3 * sums + 50_000_000
