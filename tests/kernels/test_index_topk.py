"""The indexer's choice: its definition against Python's own sort, engines and the numpy step against the definition."""

import importlib
import math

import numpy as np
import pytest
import torch
from oracle import hold, relative_rms

from abyssal.kernels import index_topk
from abyssal.kernels.index_topk import eager
from abyssal.kernels.index_topk import step as step_module
from abyssal.kernels.index_topk.step import index_topk_step

FLOATS = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


@pytest.fixture
def launch(request, monkeypatch):
    """Triton's launches, with blocks so small that all loops go round; the shipped ones on a GPU."""
    pytest.importorskip("triton")
    request.getfixturevalue("by_triton")
    module = importlib.import_module("abyssal.kernels.index_topk.triton.launch")
    if request.getfixturevalue("emulated"):
        monkeypatch.setattr(module, "blocks_for", lambda q: module.Blocks(1 if q.shape[1] <= 4 else 8, 32, 4, 2))
        monkeypatch.setattr(module, "STREAMED", 32)
        monkeypatch.setattr(module, "HELD", (32, 64, 256))
        monkeypatch.setattr(module, "GROUPED", 32)
    monkeypatch.setattr(module, "SCRATCH", 4 * 3 * 8 * 48)  # a few tiles
    return module


# cases ---------------------------------------------------------------------------------------------------------------


def ranges(kind, b, t, p):
    """start and end, [b|1, t]; documents: each query sees the entries of its own that have ended."""
    token, g = torch.arange(t), torch.Generator().manual_seed(t + p)
    ended = ((token + 1) * p // max(t, 1))[None]
    if kind == "any":
        start = torch.randint(0, p // 2 + 1, (b, t), generator=g)
        return start, (start + torch.randint(0, p + 1, (b, t), generator=g)).clamp_max(p)
    if kind == "documents":
        return torch.where(token < t // 3, 0, t // 3 * p // max(t, 1))[None], ended.expand(b, -1)
    return {"causal": (0 * ended, ended), "all": (0 * ended, 0 * ended + p), "none": (ended, ended)}[kind]


def case(b, t, h, d, p, k, kind="causal", whole=True):
    """Small whole numbers, for exact products in every dtype, ties and zeros everywhere; or normal ones."""
    g = torch.Generator().manual_seed(b + t + p)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=g).float() if whole else torch.randn(shape, generator=g)

    start, end = ranges(kind, b, t, p)
    return {"q": draw(b, t, h, d), "weights": draw(b, t, h), "keys": draw(b, p, d), "k": k, "start": start, "end": end}


SHAPES = {  # b, t, h, d, p, k
    "blocks": (2, 9, 3, 5, 40, 7),
    "one head": (1, 14, 1, 4, 7, 3),
    "five heads": (2, 9, 5, 4, 9, 3),
    "one query": (2, 1, 2, 32, 50, 3),
    "one pick": (1, 4, 1, 4, 33, 1),
    "more picks than entries": (1, 4, 2, 4, 7, 16),
    "as many picks as entries": (1, 4, 2, 4, 32, 32),
    "one entry more than picks": (1, 4, 2, 4, 33, 32),
    "no entries": (2, 3, 2, 4, 0, 4),
    "no queries": (2, 0, 2, 4, 5, 4),
}
KINDS = ("causal", "any", "documents", "all", "none")
CASES = {f"{name}, {kind}": case(*shape, kind) for name, shape in SHAPES.items() for kind in KINDS[:2]}
CASES |= {f"blocks, {kind}": case(*SHAPES["blocks"], kind) for kind in KINDS[2:]}
CASES |= {
    f"one query, {heads} heads, {k} of {first} to {last}": case(2, 1, heads, 4, 13, k)
    | {"start": torch.tensor([[first]]), "end": torch.tensor([[last]])}
    for heads in (1, 3)
    for k in (2, 6, 9, 40)
    for first, last in ((0, 13), (4, 10), (5, 5))
}
CASES["real scores"] = case(1, 20, 16, 32, 15, 6, whole=False)
CASES["strided"] = given = case(2, 12, 3, 4, 20, 4)
given |= {name: given[name].mT.contiguous().mT for name in ("q", "weights", "keys")}
given |= {name: torch.stack([given[name], given[name] + 99], -1)[..., 0].expand(2, -1) for name in ("start", "end")}
CASES["NaN"] = case(1, 24, 2, 4, 24, 3)
CASES["NaN"]["keys"][0, 7] = CASES["NaN"]["q"][0, 20] = math.nan


def on(device, given):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in given.items()}


def of_scores(rows, k, start, end):
    """Inputs of one query per row whose scores are these [r, p]: ReLU(x) - ReLU(-x)."""
    signs = torch.tensor([1.0, -1.0], dtype=rows.dtype, device=rows.device).expand(len(rows), 1, 2)
    ends = {"start": start.view(-1, 1), "end": end.view(-1, 1)}
    return {"q": signs[..., None], "weights": signs, "keys": rows[..., None], "k": k, **ends}


SPECIAL = {
    "random": lambda g: torch.randn(9, 75, generator=g),
    "equal": lambda g: torch.full((2, 75), -3.0),
    "ties": lambda g: torch.randint(-1, 2, (2, 75), generator=g).float(),
    "zeros": lambda g: torch.randint(-1, 2, (2, 75), generator=g) * 0.0,
    "tiny": lambda g: torch.randint(-3, 4, (2, 75), generator=g) * 2.0**-149,
    "huge": lambda g: torch.randn(9, 75, generator=g).exp2().mul(3e38).clamp(-3.4e38, 3.4e38),
    "close": lambda g: 1 + torch.randint(0, 9, (2, 75), generator=g) * 2.0**-23,
    "infinite": lambda g: torch.tensor([-math.inf, math.inf, 0.5, -0.0])[torch.randint(0, 4, (2, 75), generator=g)],
    "minus infinity": lambda g: torch.full((2, 75), -math.inf),
    "NaN": lambda g: torch.tensor([math.nan, -math.nan, -math.inf, -7.0])[torch.randint(0, 4, (2, 75), generator=g)],
    "NaN alone": lambda g: torch.full((2, 75), math.nan),
    "few numbers": lambda g: torch.where(torch.rand(9, 75, generator=g) < 0.05, -1e30, math.nan),
}


def special(kind):
    """Scores, how many to pick, and ranges: everything, then some."""
    rows = SPECIAL[kind](torch.Generator().manual_seed(0))
    for k, seen in (11, "all"), (9, "any"):
        yield rows, k, *(x[0] for x in ranges(seen, 1, len(rows), 75))


# the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_in_loops(kind):
    """Python's sort is stable."""
    given = case(2, 6, 2, 3, 9, 4, kind)
    picks = index_topk(**given, backend="reference")
    for b in range(2):
        q, weights, keys = (given[name][b].tolist() for name in ("q", "weights", "keys"))
        for t in range(6):
            first, last = (int(given[name].expand(2, -1)[b, t]) for name in ("start", "end"))
            score = {
                s: sum(w * max(0, sum(x * y for x, y in zip(head, keys[s]))) for w, head in zip(weights[t], q[t]))
                for s in range(first, last)
            }
            best = sorted(sorted(score, key=lambda s: -score[s])[:4])
            assert picks[b, t].tolist() == best + [-1] * (4 - len(best))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_every_visible_score_ranks_above_what_is_hidden(backend):
    """Ties to the lowest; NaN and -inf behind the numbers, but before a hidden entry and before -1."""
    given = {
        "q": torch.ones(1, 2, 1, 1),
        "weights": torch.ones(1, 2, 1),
        "keys": torch.tensor([1.0, 2, 2, math.nan, math.nan, 2]).view(1, 6, 1),
        "start": torch.tensor([[0, 3]]),
        "end": torch.tensor([[6, 6]]),
    }
    for k, want in (1, [[1], [5]]), (2, [[1, 2], [3, 5]]), (4, [[0, 1, 2, 5], [3, 4, 5, -1]]):
        assert index_topk(**given, k=k, backend=backend)[0].tolist() == want


# engines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_picks(engine, name, device):
    for dtype in FLOATS[engine]:
        got = hold(index_topk, CASES[name], engine, dtype, device=device)["out"]
        assert got.dtype == torch.int64


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_scores(engine, kind, device):
    for scores in special(kind):
        hold(index_topk, of_scores(*scores), engine, torch.float32, device=device)


@pytest.mark.parametrize("heads, k", [(1, 7), (2, 500), (5, 7)])
def test_several_blocks_of_the_eager_engine(heads, k):
    hold(index_topk, case(2, 333, heads, 4, 83, k), "eager", torch.float32)
    hold(index_topk, case(1, 600, 16, 32, 150, 16, whole=False), "eager", torch.float32)
    hold(index_topk, case(2, 333, heads, 4, 83, k, "documents", whole=False), "eager", torch.float64)


def test_a_query_does_not_depend_on_the_rest(engine, device):
    t, few = {"eager": (400, 123), "triton": (14, 9)}[engine]
    given = on(device, case(2, t, 1, 8, t // 2, 4))
    whole = index_topk(**given, backend=engine)
    part = {name: given[name][1:, :few] for name in ("q", "weights")} | {"keys": given["keys"][1:, : few // 2], "k": 4}
    part |= {name: given[name][:, :few] for name in ("start", "end")}
    assert torch.equal(whole[1:, :few], index_topk(**part, backend=engine))
    assert torch.equal(whole, index_topk(**given, backend=engine))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k=0"),
        ({"weights": torch.zeros(1, 8, 3)}, "weights has shape"),
        ({"keys": torch.zeros(1, 2, 5)}, "keys has shape"),
        ({"q": torch.zeros(8, 2, 4)}, "q has shape"),
        ({"start": torch.zeros(1, 9)}, r"start has shape \(1, 9\): it must be \[1 or 1, 8\]"),
        ({"end": torch.zeros(8)}, "end has shape"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        index_topk(**case(1, 8, 2, 4, 2, 2) | change)


# Triton --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_stream_through(launch, kind, device, monkeypatch):
    monkeypatch.setattr(launch, "HELD", ())
    hold(index_topk, CASES[f"blocks, {kind}"], "triton", torch.float32, device=device)


def selected(launch, rows, k, start, end):
    """The kernel's picks from given scores [t, p]; what is hidden is infinite, and must not be looked at."""
    (t, p), queries = rows.shape, 8
    tiles, entry = -(-t // queries), torch.arange(p, device=rows.device)
    hidden = (entry < start[:, None]) | (entry >= end[:, None])
    scratch = rows.new_full((tiles * queries, -(-p // 16) * 16), math.nan)
    scratch[:t, :p] = rows.masked_fill(hidden, math.inf)
    picks = start.new_full((1, t, min(k, p)), 10**6)
    launch.select(scratch, start[None], end[None], picks, launch.Chunk(0, tiles, queries), k)
    return picks[0]


@pytest.mark.parametrize("held", [(64, 1 << 14), (128,), ()], ids=["held", "grouped", "streamed"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_scores_as_they_lie_in_memory(launch, kind, held, device, monkeypatch):
    monkeypatch.setattr(launch, "HELD", held)
    for rows, k, start, end in special(kind):
        want = index_topk(**of_scores(rows, k, start, end), backend="reference")[:, 0]
        assert torch.equal(selected(launch, rows.to(device), k, start.to(device), end.to(device)).cpu(), want)


def test_zero_equals_minus_zero(launch, device):
    rows = torch.tensor([[-0.0, 0.0] * 20, [0.0, -0.0] * 20], device=device)
    seen = torch.tensor([[0, 0], [40, 40]], device=device)
    assert selected(launch, rows, 3, *seen).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_keys_of_another_dtype_are_rounded_to_that_of_the_queries(launch, device):
    given = on(device, case(1, 12, 2, 16, 30, 5))
    want = index_topk(**given)
    halves = {name: given[name].bfloat16() for name in ("q", "weights")}
    near = given["keys"] * (1 + 2**-12)  # lost in bfloat16
    for keys in (near, near.bfloat16()):
        assert torch.equal(index_topk(**given | halves | {"keys": keys}), want)


@pytest.mark.parametrize("room", [0, 1, 200])
def test_keys_of_a_cache_are_read_where_they_lie(launch, device, room, monkeypatch):
    """The first of a buffer that has room for more, and NaN there."""
    given = case(2, 9, 3, 4, 40, 7, "any")
    buffer = torch.cat([given["keys"], torch.full((2, 300, 4), math.nan)], 1)
    hold(index_topk, given | {"keys": buffer[:, : 40 + room]}, "triton", torch.float32, device=device)


def test_chunks_of_queries_change_nothing(launch, device, monkeypatch):
    for size in (0, 4 * 2 * 8 * 16, 1 << 30):
        monkeypatch.setattr(launch, "SCRATCH", size)
        hold(index_topk, case(3, 10, 2, 4, 10, 4), "triton", torch.float32, device=device)


def test_the_scratch_is_bounded_at_a_million_tokens(shipped, monkeypatch):
    """2^20 queries, 2^18 entries: chunks are laid out, nothing is launched."""
    t, p, rows, chunks = 1 << 20, 1 << 18, [], []
    monkeypatch.setattr(shipped, "scores", lambda x, out, chunk, k: rows.append(out.shape))
    monkeypatch.setattr(shipped, "select", lambda *arguments: chunks.append(arguments[4]))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x)
    q = torch.empty(1, 1, 1, 16).expand(1, t, 1, 16)
    end = torch.zeros(1, 1, dtype=torch.int64).expand(1, t)
    shipped.index_topk(q, q[..., 0], q[:, :p, 0], 512, end, end)
    assert all(rows * width * 4 <= shipped.SCRATCH for rows, width in rows)
    assert sum(chunk.tiles for chunk in chunks) * shipped.blocks_for(q).queries == t


def test_opcheck_and_compile(shipped, device):
    given = on(device, case(1, 3, 2, 4, 6, 2))
    q, weights, keys, k, start, end = given.values()
    operator = importlib.import_module("abyssal.kernels.index_topk.triton")._index_topk
    torch.library.opcheck(operator, (q, weights, keys, k, start, end))

    def run(x, n):
        return index_topk(x.sin(), weights, keys, k=2, start=start, end=n).float().cos()

    q.requires_grad_()
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q, end), run(q, end))


# one token in numpy --------------------------------------------------------------------------------------------------


def of_step(q, weights, keys, k):
    """The definition's picks of all keys."""
    q, weights, keys = (torch.from_numpy(x)[None] for x in (q[None], weights[None], keys))
    start = torch.zeros(1, 1, dtype=torch.int64)
    picks = index_topk(q, weights, keys, k=k, start=start, end=start + keys.shape[1], backend="reference")
    return picks[0, 0].numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("tile", [None, 1, 5])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 16])
def test_step(heads, tile, dtype, monkeypatch):
    if tile:
        monkeypatch.setattr(step_module, "HITS", tile * heads)
    generator, shapes = np.random.default_rng(heads), ((heads, 5), (heads,), (23, 5))
    real = [generator.standard_normal(shape).astype(dtype) for shape in shapes]
    whole = [generator.integers(-1, 2, shape).astype(dtype) for shape in shapes]  # ties and zeros everywhere
    for given in (real, whole):
        for k in (1, 4, 22):
            assert np.array_equal(index_topk_step(*given, k), of_step(*given, k)), k
        assert index_topk_step(*given, 23) is None and index_topk_step(*given, 99) is None


def test_step_of_many_entries():
    """More than one tile of the size in use, every entry scored."""
    draw = np.random.default_rng(0).standard_normal
    q, weights, keys = (x.astype(np.float32) for x in (draw((2, 4)), np.abs(draw(2)), draw((1 << 19, 4))))
    keys[[7, 20000, (1 << 19) - 1]] = 30 * q.sum(0)
    assert index_topk_step(q, weights, keys, 3).tolist() == [7, 20000, (1 << 19) - 1]


def test_step_prefers_every_number_to_nan():
    q, weights, keys = np.ones((1, 2), np.float32), np.ones(1, np.float32), np.zeros((6, 2), np.float32)
    keys[1:3] = math.nan
    for k, want in (4, [0, 3, 4, 5]), (5, [0, 1, 3, 4, 5]):
        assert index_topk_step(q, weights, keys, k).tolist() == of_step(q, weights, keys, k).tolist() == want


# at sizes with many full tiles ---------------------------------------------------------------------------------------


def packed(b, t, h, d, p, dtype=torch.bfloat16):
    """q, weights, keys, and the ranges of two packed documents."""
    g = torch.Generator("cuda").manual_seed(0)
    q, weights, keys = (
        torch.randn(shape, generator=g, device="cuda") for shape in ((b, t, h, d), (b, t, h), (b, p, d))
    )
    start, end = (x[:1].cuda() for x in ranges("documents", 1, t, p))
    return [q.to(dtype), weights * (d * h) ** -0.5, keys.to(dtype)], {"start": start, "end": end.maximum(start)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "shape", "k"),
    [
        pytest.param(torch.bfloat16, (1, 2000, 64, 128, 4000), 512, id="bf16"),
        pytest.param(torch.float16, (2, 700, 64, 128, 1500), 512, id="fp16"),
        pytest.param(torch.float32, (1, 300, 64, 128, 900), 100, id="fp32"),
        pytest.param(torch.bfloat16, (1, 300, 2, 32, 9000), 1024, id="toy"),
        pytest.param(torch.bfloat16, (1, 140, 4, 128, 70000), 1024, id="streamed"),
    ],
)
def test_picks_are_those_of_the_scores(shipped, dtype, shape, k):
    """The kernel's scores are as near to float64 as eager's, and its picks those that the definition takes of them."""
    given, seen = packed(*shape, dtype)
    (b, t), p, queries = shape[:2], shape[4], shipped.blocks_for(given[0]).queries
    start, end = (x.expand(b, t).contiguous() for x in seen.values())
    tiles = b * -(-t // queries)
    scores = torch.zeros(tiles * queries, -(-p // 16) * 16, device="cuda")
    shipped.scores(shipped.Inputs(*given, start, end), scores, shipped.Chunk(0, tiles, queries), 0)
    scores = scores.view(b, -1, scores.shape[1])[:, :t, :p]
    entry = torch.arange(p, device="cuda")
    visible = (entry >= start[..., None]) & (entry < end[..., None])
    exact, plain = (eager.index_scores(*(x.to(dtype) for x in given)) for dtype in (torch.float64, dtype))
    assert relative_rms(scores[visible], exact[visible]) <= 2 * relative_rms(plain[visible], exact[visible]) + 1e-6
    want = index_topk(**of_scores(scores.flatten(0, 1), k, start, end), backend="reference")
    assert torch.equal(index_topk(*given, k=k, **seen), want.view(b, t, -1))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [16384, 1 << 18])
def test_picks_of_many_ties(shipped, p):
    rows = torch.randint(-3, 4, (64, p), device="cuda").float()
    rows[:8] = 0
    rows[8:16] = torch.randn(8, p, device="cuda")
    start = torch.randint(0, p // 4, (64,), device="cuda")
    end = torch.randint(p // 2, p + 1, (64,), device="cuda")
    for k in (1, 512, 1000):
        want = index_topk(**of_scores(rows, k, start, end), backend="reference")[:, 0]
        assert torch.equal(selected(shipped, rows, k, start, end), want)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(shipped):
    """2^31 channels of queries: the last ones pick what they pick alone."""
    t, h, d, p = (1 << 18) + 200, 64, 128, 300
    (few, weights, keys), _ = packed(1, 100, h, d, p)
    q = torch.zeros(1, t, h, d, dtype=torch.bfloat16, device="cuda")
    wide = torch.zeros(1, t, h, device="cuda")
    q[:, -100:], wide[:, -100:] = few, weights
    start = torch.zeros(1, t, dtype=torch.int64, device="cuda")
    want = index_topk(few, weights, keys, k=64, start=start[:, -100:], end=start[:, -100:] + p)
    assert torch.equal(index_topk(q, wide, keys, k=64, start=start, end=start + p)[:, -100:], want)
    assert want.diff(dim=-1).min() > 0 and not torch.equal(want[0, 0], want[0, 1])


@pytest.mark.gpu
def test_the_same_bits_on_each_run_and_for_a_prefix(shipped):
    (q, weights, keys), seen = packed(2, 700, 64, 128, 400)
    whole, again = (index_topk(q, weights, keys, k=8, **seen) for _ in range(2))
    assert torch.equal(whole, again)
    for few in (690, 37):
        some, early = (slice(1, 2), slice(0, few)), {name: x[:, :few] for name, x in seen.items()}
        assert torch.equal(whole[some], index_topk(q[some], weights[some], keys[1:], k=8, **early))


@pytest.mark.gpu
def test_a_cuda_graph_and_nothing_that_waits(shipped):
    given, seen = packed(1, 500, 64, 128, 300)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        index_topk(*given, k=64, **seen)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index_topk(*given, k=64, **seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = index_topk(*given, k=64, **seen)
    for _ in range(2):
        for x in given:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(picks, index_topk(*given, k=64, **seen))


@pytest.mark.gpu
def test_memory_is_bounded(shipped):
    """Scores of 32,768 queries and 8,192 entries are a gigabyte: a quarter of it is the scratch."""
    given, seen = packed(1, 32768, 4, 128, 8192)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    picks = index_topk(*given, k=64, **seen)
    assert torch.cuda.max_memory_allocated() - before <= shipped.SCRATCH + picks.nbytes + (8 << 20)
