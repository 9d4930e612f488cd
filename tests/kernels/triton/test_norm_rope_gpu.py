"""RMSNorm and RoPE on a CUDA device, at sizes with many programs: accuracy, the same bits, CUDA graphs, memory."""

import pytest
import torch

from abyssal.kernels import norm_rope, rms_norm, rope, rope_frequencies, rope_rotation
from abyssal.kernels.norm_rope import eager

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def rotation(t, dim=64):
    return rope_rotation(torch.arange(t)[None] * 7, rope_frequencies(dim, 1e4)).cuda()


def make(t=1001, h=6, d=512, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return 3 * torch.randn(2, t, h, d, device="cuda").to(dtype), torch.randn(d, device="cuda")


def results(run, *leaves, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    out = run(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


RUNS = {
    "norm": lambda ops, x, w: ops.rms_norm(x, None, 1e-6),
    "weighted": lambda ops, x, w: ops.rms_norm(x, w, 1e-6),
    "fused": lambda ops, x, w: ops.norm_rope(x, None, 1e-6, rotation(x.shape[1])),
    "fused and weighted": lambda ops, x, w: ops.norm_rope(x, w, 1e-6, rotation(x.shape[1])),
    "rotation": lambda ops, x, w: ops.rope(x, rotation(x.shape[1])),
    "back": lambda ops, x, w: ops.rope(x, rotation(x.shape[1]), inverse=True),
}


class twin:
    rms_norm, norm_rope, rope = staticmethod(rms_norm), staticmethod(norm_rope), staticmethod(rope)


@pytest.mark.parametrize("d", [64, 128, 500, 512, 4096, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RUNS)
def test_values_and_gradients(name, dtype, d):
    x, w = make(301, 3, d, dtype)
    leaves = (x, w) if "weighted" in name else (x,)
    got, plain, exact = (
        results(lambda x, w=None, ops=ops: RUNS[name](ops, x, w), *leaves, dtype=of)
        for ops, of in ((twin, None), (eager, None), (eager, torch.float64))
    )
    for a, b, c in zip(got, plain, exact):
        assert error(a, c) <= 2 * error(b, c) + 1e-6, f"{error(a, c):.2e}, the reference {error(b, c):.2e}"


def test_rows_do_not_depend_on_their_batch():
    x, w = make()
    for name, run in RUNS.items():
        full, again = (results(lambda x, w, run=run: run(twin, x, w) * w.to(x.dtype), x, w) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(full, again)), name
        assert torch.equal(run(twin, x, w)[:, :37], run(twin, x[:, :37], w)), name


def test_a_cuda_graph_replays_other_values():
    x, w = make()
    turn = rotation(x.shape[1])
    dout = torch.randn_like(x)

    def step():
        leaves = [y.detach().requires_grad_() for y in (x, w)]
        return torch.autograd.grad(rope(norm_rope(*leaves, 1e-6, turn), turn, inverse=True), leaves, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


def test_nothing_waits_and_one_number_per_row_is_kept():
    x, w = (y.requires_grad_() for y in make())
    turn = rotation(x.shape[1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        before = torch.cuda.memory_allocated()
        out = norm_rope(x, w, 1e-6, turn)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept <= 4 * out.shape[:-1].numel() + 1_000_000  # x and the rotation are the caller's
