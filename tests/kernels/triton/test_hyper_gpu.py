"""mHC on a CUDA device, at sizes with many full tiles: the same comparisons, the same bits, and a CUDA graph."""

import pytest
import torch
from hyper_cases import NAMES, gradients, inputs, oracle_sublayer, rms_error

from abyssal.kernels import hyper_collapse, hyper_head_weights, hyper_read, hyper_recombine

pytestmark = pytest.mark.gpu
TOKENS, N, D = 2000, 4, 1024


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def site(streams, fn, base, scale, y, backend="triton"):
    u, (pre, post, comb) = hyper_read(streams, fn, base, scale, backend=backend)
    mixed = hyper_recombine(y, streams, post, comb, backend=backend)
    return {"pre": pre, "post": post, "comb": comb, "collapsed": u, "mixed": mixed}


def make(dtype, tokens=TOKENS, n=N, d=D, std=1.0):
    return [x.cuda().requires_grad_() for x in inputs((tokens,), n, d, dtype, std)]


@pytest.mark.parametrize("n, d", [(1, 64), (3, 250), (4, 1024), (4, 4096), (8, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_and_gradients(dtype, n, d):
    arguments = make(dtype, 700, n, d)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    got, plain, want = site(*arguments), site(*arguments, backend="eager"), oracle_sublayer(*exact)
    pairs = [(name, got[name], plain[name], want[name]) for name in want]
    pairs += zip(NAMES, gradients(got, arguments), gradients(plain, arguments), gradients(want, exact))
    for name, a, b, c in pairs:
        assert rms_error(a, c) <= 2 * rms_error(b, c) + 2e-6, f"{name}: {rms_error(a, c):.2e}, {rms_error(b, c):.2e}"


@pytest.mark.parametrize("std", [4.0, 30.0])
def test_sharp_logits(std):
    arguments = make(torch.float32, 300, std=std)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    got, want = site(*arguments), oracle_sublayer(*exact)
    pairs = [(name, got[name], want[name]) for name in want]
    pairs += zip(NAMES, gradients(got, arguments), gradients(want, exact))
    for name, a, b in pairs:
        assert rms_error(a, b) < 5e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_on_each_run_and_in_any_batch(dtype):
    streams, fn, base, scale, y = make(dtype)

    def run(rows):
        x, output = (t.detach()[rows].requires_grad_() for t in (streams, y))
        results = site(x, fn, base, scale, output)
        grads = torch.autograd.grad([t.float().square().sum() for t in results.values()], (x, output, fn, base, scale))
        return [*results.values(), *grads[:2]], grads[2:]

    (tokens, constants), (again, others) = run(slice(None)), run(slice(None))
    assert all(torch.equal(a, b) for a, b in zip([*tokens, *constants], [*again, *others]))
    for rows in (slice(0, 1), slice(0, 37), torch.randperm(TOKENS, device="cuda")):
        assert all(torch.equal(a[rows], b) for a, b in zip(tokens, run(rows)[0]))


def test_a_cuda_graph_replays_other_streams():
    arguments = [x.detach() for x in make(torch.bfloat16)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        site(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = site(*arguments)
    for _ in range(2):
        arguments[0].copy_(torch.randn_like(arguments[0]))
        graph.replay()
        want = site(*arguments)
        assert all(torch.equal(out[name], want[name]) for name in want)


def test_nothing_waits_for_the_device():
    arguments = make(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = site(*arguments)
        weights = hyper_head_weights(results["mixed"], arguments[1][:N], arguments[2][:N], arguments[3][:1])
        (hyper_collapse(results["mixed"], weights).sum() + results["collapsed"].sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_values_than_an_int32_counts():
    tokens = 2**31 // (4 * 4096) + 64
    streams = torch.zeros(tokens, 4, 4096, dtype=torch.bfloat16, device="cuda")
    fn, base, scale = (x.cuda() for x in inputs((0,), 4, 4096, torch.float32)[1:4])
    streams[-64:] = inputs((64,), 4, 4096, torch.bfloat16)[0].cuda()
    y = torch.ones(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        whole, tail = site(streams, fn, base, scale, y), site(streams[-64:], fn, base, scale, y[-64:])
    assert all(torch.equal(whole[name][-64:], tail[name]) for name in tail)


def test_memory_kept_for_the_backward_pass_is_the_formula():
    arguments = make(torch.bfloat16)
    before = torch.cuda.memory_allocated()
    results = site(*arguments)
    kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in results.values())
    assert kept <= TOKENS * 4 * (N * (N + 2) + 1) + 100_000  # mix and r; the streams are the caller's
