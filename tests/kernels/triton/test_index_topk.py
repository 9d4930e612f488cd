"""The indexer's choice in Triton against a stable sort of scores computed entry by entry: every tie, range and path."""

import math

import pytest
import torch

from abyssal.kernels import index_topk
from abyssal.kernels.index_topk import eager
from abyssal.kernels.index_topk import triton as kernels
from abyssal.kernels.index_topk.triton import launch


@pytest.fixture(autouse=True)
def blocks(emulated, monkeypatch):
    """Blocks so small that all loops go round; the shipped ones on a GPU."""
    if emulated:
        monkeypatch.setattr(launch, "blocks_for", lambda q: launch.Blocks(8, 32, 4, 2))
        monkeypatch.setattr(launch, "STREAMED", 32)
    monkeypatch.setattr(launch, "SCRATCH", 4 * 3 * 8 * 48)  # a few tiles


@pytest.fixture(params=["held", "streamed"])
def path(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(launch, "LONGEST_HELD", 0)


def scores_of(q, weights, keys):
    hits = torch.einsum("bthd,bpd->bthp", q.double(), keys.double()).relu()
    return torch.einsum("bthp,bth->btp", hits, weights.double())


def oracle(scores, k, start, end):
    """The first k of a stable descending sort of what is visible, NaN as -inf; ascending, -1 behind."""
    b, t, p = scores.shape
    picks = torch.full((b, t, min(k, p)), -1)
    for row in range(b):
        for query in range(t):
            first, last = int(start.expand(b, -1)[row, query]), int(end.expand(b, -1)[row, query])
            visible = scores[row, query, first:last].cpu()
            visible = torch.where(visible.isnan(), -math.inf, visible) + 0.0
            best = visible.sort(descending=True, stable=True).indices[:k].sort().values + first
            picks[row, query, : len(best)] = best
    return picks.to(scores.device)


def make(b, t, h, d, p, ratio=4, seed=0, dtype=torch.float32, device="cpu"):
    """Small integers: exact products, and ties and zeros everywhere. Causal ranges."""
    g = torch.Generator().manual_seed(seed)
    q, weights, keys = (torch.randint(-2, 3, s, generator=g) for s in ((b, t, h, d), (b, t, h), (b, p, d)))
    end = ((torch.arange(t) + 1) // ratio).clamp_max(p)[None].to(device)
    q, weights, keys = q.to(device, dtype), weights.to(device, torch.float32), keys.to(device, dtype)
    return q, weights, keys, torch.zeros_like(end), end


def check(q, weights, keys, start, end, k):
    got = index_topk(q, weights, keys, k=k, start=start, end=end)
    want = oracle(scores_of(q, weights, keys), k, start, end)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    assert torch.equal(got, eager.index_topk(q, weights, keys, k=k, start=start, end=end))


@pytest.mark.parametrize(
    ("b", "t", "h", "d", "p", "k"),
    [
        pytest.param(2, 9, 3, 5, 40, 7, id="blocks"),
        pytest.param(1, 1, 2, 32, 50, 3, id="one-query"),
        pytest.param(1, 4, 1, 4, 33, 1, id="one-pick"),
        pytest.param(1, 4, 2, 4, 7, 16, id="more-picks-than-entries"),
        pytest.param(1, 4, 2, 4, 32, 32, id="as-many-picks-as-entries"),
        pytest.param(1, 4, 2, 4, 33, 32, id="one-entry-more-than-picks"),
    ],
)
def test_equals_a_stable_sort(path, device, b, t, h, d, p, k):
    q, weights, keys, start, end = make(b, t, h, d, p, device=device)
    check(q, weights, keys, start, end + p - int(end.max()), k)
    check(q, weights, keys, *ranges(b, t, p, device), k)


def ranges(b, t, p, device, seed=3):
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(0, p // 2 + 1, (b, t), generator=g)
    return start.to(device), torch.minimum(start + torch.randint(0, p, (b, t), generator=g), torch.tensor(p)).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(device, dtype):
    check(*make(1, 9, 2, 16, 12, ratio=1, dtype=dtype, device=device), 5)


def test_keys_of_another_dtype_are_rounded_to_that_of_the_queries(device):
    q, weights, keys, start, end = make(1, 12, 2, 16, 30, ratio=1, dtype=torch.bfloat16, device=device)
    keys = keys.float() + 2**-12  # lost in bfloat16
    got = index_topk(q, weights.bfloat16(), keys, k=5, start=start, end=end)
    assert torch.equal(got, index_topk(q, weights, keys.bfloat16(), k=5, start=start, end=end))
    assert torch.equal(got, oracle(scores_of(q, weights, keys.round()), 5, start, end))


def test_documents(path, device):
    """Packed sequences: each query sees the entries of its own document that have ended; one start for all rows."""
    q, weights, keys, _, _ = make(2, 20, 2, 4, 20, device=device)
    token = torch.arange(20, device=device)
    start = torch.where(token < 7, 0, torch.where(token < 15, 7, 15))[None]
    end = token[None] + 1
    check(q, weights, keys, start, end.expand(2, -1), 3)


def test_no_queries_and_no_entries(device):
    q, weights, keys, start, end = make(2, 3, 2, 4, 0, device=device)
    assert index_topk(q, weights, keys, k=4, start=start, end=end).shape == (2, 3, 0)
    q, weights, keys, start, end = make(2, 0, 2, 4, 5, device=device)
    assert index_topk(q, weights, keys, k=4, start=start, end=end).shape == (2, 0, 4)


def picked(rows, k, start=None, end=None):
    """The kernel's picks from given scores [t, p]."""
    t, p = rows.shape
    queries = 8
    start = torch.zeros(1, t, dtype=torch.int64) if start is None else start
    end = torch.full((1, t), p) if end is None else end
    start, end = start.to(rows.device), end.to(rows.device)
    tiles = -(-t // queries)
    scratch = torch.full((tiles * queries, -(-p // 16) * 16), math.nan, device=rows.device)
    seen = (torch.arange(p, device=rows.device) >= start[0, :, None]) & (
        torch.arange(p, device=rows.device) < end[0, :, None]
    )
    scratch[:t, :p] = torch.where(seen, rows, math.inf)  # what is hidden must not be looked at
    picks = torch.full((1, t, min(k, p)), 10**6, device=rows.device)
    launch.select(scratch, start, end, picks, 0, tiles, k, queries)
    return picks, oracle(rows[None], k, start, end)


SPECIAL = {
    "random": lambda g: torch.randn(9, 75, generator=g),
    "equal": lambda g: torch.full((1, 75), -3.0),
    "ties": lambda g: torch.randint(-1, 2, (2, 75), generator=g).float(),
    "zeros": lambda g: torch.randint(-1, 2, (2, 75), generator=g) * 0.0,
    "tiny": lambda g: torch.randint(-3, 4, (2, 75), generator=g) * 2.0**-149,
    "huge": lambda g: torch.randn(9, 75, generator=g).exp2().mul(3e38).clamp(-3.4e38, 3.4e38),
    "close": lambda g: 1 + torch.randint(0, 9, (2, 75), generator=g) * 2.0**-23,
    "infinite": lambda g: torch.tensor([-math.inf, math.inf, 0.5, -0.0])[torch.randint(0, 4, (2, 75), generator=g)],
    "minus-infinity": lambda g: torch.full((1, 75), -math.inf),
    "nan": lambda g: torch.tensor([math.nan, -math.nan, -math.inf, -7.0])[torch.randint(0, 4, (2, 75), generator=g)],
    "all-nan": lambda g: torch.full((1, 75), math.nan),
    "few-numbers": lambda g: torch.where(torch.rand(9, 75, generator=g) < 0.05, -1e30, math.nan),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_scores(path, device, kind):
    rows = SPECIAL[kind](torch.Generator().manual_seed(0)).to(device)
    for k, seen in ((11, ()), (9, ranges(1, len(rows), 75, "cpu", seed=1))):
        got, want = picked(rows, k, *seen)
        assert torch.equal(got, want), k


def test_zero_equals_minus_zero(path, device):
    rows = torch.tensor([[-0.0, 0.0] * 20, [0.0, -0.0] * 20], device=device)
    assert picked(rows, 3)[0].tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_a_nan_stays_in_its_rows(device):
    q, weights, keys, start, end = make(1, 24, 2, 4, 24, ratio=1, device=device)
    clean = index_topk(q, weights, keys, k=3, start=start, end=end)
    keys[0, 7], q[0, 20] = math.nan, math.nan
    got = index_topk(q, weights, keys, k=3, start=start, end=end)
    assert torch.equal(got, oracle(scores_of(q, weights, keys), 3, start, end))
    kept = [n for n in range(24) if n != 20 and not (clean[0, n] == 7).any()]
    assert len(kept) > 10 and torch.equal(got[0, kept], clean[0, kept])
    assert got[0, 20].tolist() == [0, 1, 2]


def test_a_query_does_not_depend_on_the_rest(path, device):
    q, weights, keys, start, end = make(2, 14, 2, 4, 20, ratio=1, device=device)
    whole = index_topk(q, weights, keys, k=4, start=start, end=end)
    part = index_topk(q[1:, :9], weights[1:, :9], keys[1:, :9], k=4, start=start[:, :9], end=end[:, :9])
    assert torch.equal(whole[1:, :9], part)
    assert torch.equal(whole, index_topk(q, weights, keys, k=4, start=start, end=end))


def test_strided_inputs(device):
    q, weights, keys, start, end = make(2, 12, 3, 4, 20, ratio=1, device=device)
    want = index_topk(q, weights, keys, k=4, start=start, end=end)
    strided = [x.mT.contiguous().mT for x in (q, weights, keys)]
    assert not any(x.is_contiguous() for x in strided)
    start, end = (torch.stack([x, x + 99], -1)[..., 0].expand(2, -1) for x in (start, end))
    assert torch.equal(index_topk(*strided, k=4, start=start, end=end), want)


def test_chunks_of_queries_change_nothing(device, monkeypatch):
    q, weights, keys, start, end = make(3, 10, 2, 4, 10, ratio=1, device=device)
    want = oracle(scores_of(q, weights, keys), 4, start, end)
    for size in (0, 4 * 2 * 8 * 16, 1 << 30):
        monkeypatch.setattr(launch, "SCRATCH", size)
        assert torch.equal(index_topk(q, weights, keys, k=4, start=start, end=end), want)


def test_the_scratch_is_bounded_at_a_million_tokens(monkeypatch):
    """2^20 queries, 2^18 entries: chunks are laid out, nothing is launched."""
    monkeypatch.undo()
    t, p = 1 << 20, 1 << 18
    seen, rows = [], []
    monkeypatch.setattr(launch, "scores", lambda *a: rows.append(a[5].shape))
    monkeypatch.setattr(launch, "select", lambda *a: seen.append(a[4:6]))
    q = torch.empty(1, 1, 1, 16).expand(1, t, 1, 16)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x)
    end = torch.zeros(1, 1, dtype=torch.int64).expand(1, t)
    launch.index_topk(q, q[..., 0], q[:, :p, 0], 512, end, end)
    assert all(rows * width * 4 <= launch.SCRATCH for rows, width in rows)
    assert sum(count for _, count in seen) * launch.blocks_for(q).queries == t


def test_opcheck_and_compile(monkeypatch, backend, device):
    monkeypatch.undo()  # fake tensors cannot be filled with NaN
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")
    q, weights, keys, start, end = make(1, 3, 2, 4, 6, ratio=1, device=device)
    torch.library.opcheck(kernels._index_topk, (q, weights, keys, 2, start, end + 3))

    def run(x, n):
        return index_topk(x.sin(), weights, keys, k=2, start=start, end=n + 3).float().cos()

    q.requires_grad_()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, end), run(q, end))
