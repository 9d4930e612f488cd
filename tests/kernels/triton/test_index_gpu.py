"""The indexer's kernels on a CUDA device, at sizes with many full tiles: exact picks of their own scores, the loss
against float64, the same bits, a CUDA graph, no waiting, bounded memory.
"""

import pytest
import torch

from abyssal.kernels import attention, index_loss, index_topk
from abyssal.kernels.index_loss import eager
from abyssal.kernels.index_topk.eager import index_scores
from abyssal.kernels.index_topk.triton import launch

pytestmark = pytest.mark.gpu
SCALE = 512**-0.5


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def student(b, t, h, d, p, dtype=torch.bfloat16):
    """q, weights, keys, and the ranges of two packed documents."""
    g = torch.Generator("cuda").manual_seed(0)
    q, weights, keys = (
        torch.randn(shape, generator=g, device="cuda") for shape in ((b, t, h, d), (b, t, h), (b, p, d))
    )
    token, half = torch.arange(t, device="cuda"), t // 3
    start = torch.where(token < half, 0, half * p // t)[None]
    end = ((token + 1) * p // t)[None].maximum(start)
    return q.to(dtype), weights * (d * h) ** -0.5, keys.to(dtype), {"start": start, "end": end}


def scores_of(q, weights, keys, seen):
    """The kernel's own scores `[b, t, p]` of all that is visible, -inf elsewhere."""
    (b, t), p, blocks = q.shape[:2], keys.shape[1], launch.blocks_for(q)
    start, end = (x.expand(b, t).contiguous() for x in seen.values())
    tiles = -(-t // blocks.queries)
    out = torch.zeros(b * tiles * blocks.queries, -(-p // 16) * 16, device="cuda")
    launch.scores(q, weights, keys, start, end, out, 0, b * tiles, 0, blocks)
    entry = torch.arange(p, device="cuda")
    hidden = (entry < start[..., None]) | (entry >= end[..., None])
    return out.view(b, -1, out.shape[1])[:, :t, :p].masked_fill(hidden, -torch.inf)


def sorted_picks(scores, k, seen):
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values
    entry = seen["start"][..., None] + torch.arange(best.shape[-1], device="cuda")
    few = (seen["end"] - seen["start"])[..., None] <= k
    return torch.where(few, torch.where(entry < seen["end"][..., None], entry, -1), best)


@pytest.mark.parametrize(
    ("dtype", "shape", "k"),
    [
        (torch.bfloat16, (1, 2000, 64, 128, 4000), 512),
        (torch.float16, (2, 700, 64, 128, 1500), 512),
        (torch.float32, (1, 300, 64, 128, 900), 100),
        (torch.bfloat16, (1, 300, 2, 32, 9000), 1024),
        (torch.bfloat16, (1, 140, 4, 128, 70000), 1024),
    ],
    ids=["bf16", "fp16", "fp32", "toy", "streamed"],
)
def test_picks_are_those_of_a_stable_sort(dtype, shape, k):
    q, weights, keys, seen = student(*shape, dtype)
    scores = scores_of(q, weights, keys, seen)
    exact = index_scores(q.double(), weights.double(), keys.double())
    plain = index_scores(q, weights, keys)
    visible = scores.isfinite()
    error, allowed = ((x - exact)[visible].norm() / exact[visible].norm() for x in (scores, plain))
    assert error <= 2 * allowed + 1e-6
    assert torch.equal(index_topk(q, weights, keys, k=k, **seen), sorted_picks(scores, k, seen))


@pytest.mark.parametrize("p", [16384, 1 << 18])
def test_picks_of_many_ties(p):
    rows = torch.randint(-3, 4, (64, p), device="cuda").float()
    rows[:8] = 0
    rows[8:16] = torch.randn(8, p, device="cuda")
    start = torch.randint(0, p // 4, (1, 64), device="cuda")
    end = torch.randint(p // 2, p + 1, (1, 64), device="cuda")
    entry = torch.arange(p, device="cuda")
    hidden = (entry < start[0, :, None]) | (entry >= end[0, :, None])
    for k in (1, 512, 1000):
        picks = torch.empty(1, 64, k, dtype=torch.int64, device="cuda")
        launch.select(rows, start, end, picks, 0, 1, k, 64)
        want = sorted_picks(rows.masked_fill(hidden, -torch.inf)[None], k, {"start": start, "end": end})
        assert torch.equal(picks, want)


def test_offsets_beyond_32_bits():
    """2^31 channels of queries: the last ones pick what they pick alone."""
    t, h, d, p = (1 << 18) + 200, 64, 128, 300
    q = torch.zeros(1, t, h, d, dtype=torch.bfloat16, device="cuda")
    few, weights, keys, _ = student(1, 100, h, d, p)
    q[:, -100:] = few
    wide = torch.zeros(1, t, h, device="cuda")
    wide[:, -100:] = weights
    seen = {"start": torch.zeros(1, t, dtype=torch.int64, device="cuda"), "end": torch.full((1, t), p, device="cuda")}
    last = {name: x[:, -100:] for name, x in seen.items()}
    want = index_topk(few, weights, keys, k=64, **last)
    assert torch.equal(index_topk(q, wide, keys, k=64, **seen)[:, -100:], want)
    assert want.diff(dim=-1).min() > 0 and not torch.equal(want[0, 0], want[0, 1])


def teacher(q, end, h=64, d=512, p=400):
    g = torch.Generator("cuda").manual_seed(1)
    b, t = q.shape[:2]
    heads, kv, c = (
        torch.randn(shape, generator=g, device="cuda").to(q.dtype) for shape in ((b, t, h, d), (b, t, d), (b, p, d))
    )
    sink = torch.zeros(h, device="cuda")
    start = torch.zeros_like(end)
    _, lse = attention(heads, kv, c, sink, window=16, scale=SCALE, start=start, end=end, backend="eager")
    return heads, c, lse


def results(run, leaves, fixed, seen, index):
    leaves = [x.detach().requires_grad_() for x in leaves]
    loss, share = run(*leaves, *fixed, scale=SCALE, **seen, index=index)
    return [loss.detach(), share, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("picked", [True, False], ids=["picks", "all"])
@pytest.mark.parametrize(
    ("dtype", "h", "d", "i", "e"),
    [(torch.bfloat16, 64, 512, 64, 128), (torch.float16, 128, 512, 64, 128), (torch.float32, 4, 64, 4, 32)],
    ids=["bf16", "fp16-128-heads", "fp32-toy"],
)
def test_loss_and_gradients(dtype, h, d, i, e, picked):
    *leaves, seen = student(1, 700, i, e, 400, dtype)
    fixed = teacher(leaves[0], seen["end"], h, d)
    index = index_topk(*leaves, k=100, **seen) if picked else None
    got, plain = (results(run, leaves, fixed, seen, index) for run in (index_loss, eager.index_loss))
    double = [[x.double() for x in xs] for xs in (leaves, fixed)]
    exact = results(eager.index_loss, *double, seen, index)
    for name, a, b, c in zip(("loss", "share", "dq", "dweights", "dkeys"), got, plain, exact):
        error, allowed = ((x.double() - c).norm() / c.norm() for x in (a, b))
        floor = 5e-6 if dtype == torch.float32 else 3e-3 if name in ("dq", "dweights", "dkeys") else 1e-4
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, the reference {allowed:.2e}"


@pytest.mark.parametrize("picked", [True, False], ids=["picks", "all"])
def test_the_same_bits_on_each_run_and_for_a_prefix(picked):
    *leaves, seen = student(2, 700, 64, 128, 400)
    fixed = teacher(leaves[0], seen["end"])
    index = index_topk(*leaves, k=100, **seen)
    assert torch.equal(index, index_topk(*leaves, k=100, **seen))
    whole = index_topk(*leaves, k=8, **seen)
    for few in (690, 37):
        some = (slice(1, 2), slice(0, few))
        early = {name: x[:, :few] for name, x in seen.items()}
        part = index_topk(leaves[0][some], leaves[1][some], leaves[2][1:], k=8, **early)
        assert torch.equal(whole[some], part)
    full, again = (results(index_loss, leaves, fixed, seen, index if picked else None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(full, again))


def test_a_cuda_graph_replays_other_inputs():
    *leaves, seen = student(1, 500, 64, 128, 300)
    heads, c, lse = teacher(leaves[0], seen["end"], p=300)
    leaves = [x.requires_grad_() for x in leaves]

    def run():
        index = index_topk(*leaves, k=64, **seen)
        loss, share = index_loss(*leaves, heads, c, lse, scale=SCALE, **seen, index=index)
        return loss, share, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(2):
        for x in (*leaves, heads):
            x.data.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, run()))


def test_nothing_waits_for_the_device():
    *leaves, seen = student(1, 500, 64, 128, 300)
    fixed = teacher(leaves[0], seen["end"], p=300)
    leaves = [x.requires_grad_() for x in leaves]
    torch.cuda.set_sync_debug_mode("error")
    try:
        index = index_topk(*leaves, k=64, **seen)
        for picks in (index, None):
            index_loss(*leaves, *fixed, scale=SCALE, **seen, index=picks)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_bounded():
    """Scores of 32,768 queries and 8,192 entries are a gigabyte: a quarter of it is the scratch. Between forward and
    backward lie the gradients alone.
    """
    *leaves, seen = student(1, 32768, 4, 128, 8192)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index = index_topk(*leaves, k=64, **seen)
    assert torch.cuda.max_memory_allocated() - before <= launch.SCRATCH + index.nbytes + (8 << 20)
    fixed = torch.randn(1, 32768, 2, 64, device="cuda"), torch.randn(1, 8192, 64, device="cuda")
    lse = torch.zeros(1, 32768, 2, device="cuda")
    leaves = [x.requires_grad_() for x in leaves]
    before = torch.cuda.memory_allocated()
    loss, _ = index_loss(*leaves, *fixed, lse, scale=SCALE, **seen, index=index)
    q, weights, keys = leaves
    assert torch.cuda.memory_allocated() - before <= q.nbytes + weights.nbytes + 2 * keys.nbytes + (1 << 20)
    loss.backward()
