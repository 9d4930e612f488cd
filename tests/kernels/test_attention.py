"""Attention: the definition against a loop over queries, both engines and the numpy step against the definition."""

import importlib
import importlib.util
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from oracle import ROUNDING, assert_same, distance, hold, outcome
from torch.utils.checkpoint import checkpoint

from abyssal.kernels.attention import attention
from abyssal.kernels.attention.step import attention_step
from abyssal.kernels.blocks import sharing_pays

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
absent = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
of_eager = pytest.mark.parametrize("engine", ["eager"], indirect=True)
of_triton = pytest.mark.parametrize("engine", [pytest.param("triton", marks=absent)], indirect=True)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def launch(emulated, monkeypatch):
    """Triton's launches; where no GPU is, in blocks so small that a few queries need several."""
    module = importlib.import_module("abyssal.kernels.attention.triton.launch") if HAS_TRITON else None
    if module and emulated:
        use_tiles(module, monkeypatch, keys=16)
        monkeypatch.setattr(module, "CHUNK", 8)
        monkeypatch.setattr(module, "SPLIT", 4)
        monkeypatch.setattr(module, "AT_ONCE", 4)
        monkeypatch.setattr(module, "PROGRAMS", 4)
    return module


def use_tiles(launch, monkeypatch, keys):
    """Steps of 16 keys, tiles of so many."""
    blocks = launch.Blocks(16, 16, 4, 1)
    table = launch.Tiles(blocks, blocks, blocks, launch.Owned(keys, 16, 16, 4, 1))
    monkeypatch.setattr(launch, "tiles_for", lambda q: table)


@pytest.fixture(params=["rows", "counts"])
def form(request, launch, monkeypatch):
    """The two ways in which Triton makes gradients of picked entries."""
    if launch:
        monkeypatch.setattr(launch, "DENSE", {"rows": 0, "counts": 1000}[request.param])
    return request.param


# inputs --------------------------------------------------------------------------------------------------------------


def make(b, t, h, d, p=0, past=0, seed=0, **options):
    """q [b, t, h, d], kv [b, past + t, d], compressed [b, p, d] (None for p = 0), sink [h]."""
    g = torch.Generator().manual_seed(seed)
    q, kv, compressed, sink = (torch.randn(n, generator=g) for n in ((b, t, h, d), (b, past + t, d), (b, p, d), (h,)))
    tensors = {"q": q, "kv": kv, "compressed": compressed if p else None, "sink": sink}
    return tensors | {"window": 6, "scale": 0.3} | options


def picks(b, t, k, p, seed=0):
    """index [b, t, k] with repeats and none (-1) anywhere."""
    return {"index": torch.randint(-1, p, (b, t, k), generator=torch.Generator().manual_seed(seed))}


def causal(t, p):
    """start and end [1, t]: from nothing to all entries, the first of them forgotten later."""
    end = ((torch.arange(t) + 1) * p // max(t, 1))[None]
    return {"start": end // 3, "end": end}


def bounds(start, end):
    return {"start": torch.tensor(start), "end": torch.tensor(end)}


def documents(t, b=1):
    """Three documents after 13 past rows: a tile of rows ends at 16."""
    own = 13 + torch.tensor([0] * 4 + [4] * 2 + [6] * 5)[None]
    any_row = torch.randint(0, 28, (1, t), generator=torch.Generator().manual_seed(2))
    return {"window_start": torch.cat([own, any_row][:b])}


def strided():
    """Gaps between channels, no alignment, transposed, each in another way."""
    given = make(1, 5, 3, 16, p=11, window=4, **picks(1, 5, 4, 11), window_start=torch.arange(5)[None] // 2)
    return given | {
        "q": torch.stack([given["q"], torch.full_like(given["q"], math.nan)], -1)[..., 0],
        "kv": torch.cat([given["kv"].new_zeros(1), given["kv"].flatten()])[1:].view(given["kv"].shape),
        "compressed": given["compressed"].mT.contiguous().mT,
        "sink": torch.stack([given["sink"]] * 2, -1)[:, 0],
        "index": given["index"].mT.contiguous().mT,
        "window_start": given["window_start"].repeat_interleave(2, 1)[:, ::2],
    }


def one_query(name):
    """A single query of each of two sequences; where they see alike, eager copies nothing."""
    one, last, each = [[1]], [[5]], [[1], [2]]
    seen = {
        "window": {},
        "range": bounds(one, last),
        "ranges that differ": bounds(each, [[4], [5]]),
        "ends that differ": bounds(one, [[4], [5]]),
        "starts that differ": bounds(each, last),
        "empty range": bounds(last, last),
        "picks": {"index": torch.tensor([[[0, 4, 5]], [[1, 1, 2]]])},
        "picks, some missing": {"index": torch.tensor([[[-1, 4, 5]], [[1, 1, 2]]])},
        "document": bounds(one, last) | {"window_start": torch.tensor([[7]])},
    }
    return {
        f"one query, {name}, window {w}": make(2, 1, 3, 8, p=6 if options else 0, past=8, window=w, **options)
        for name, options in seen.items()
        for w in (3, 20)
    }


def slices():
    """Keys that are slices of the buffers of a cache, of two sequences."""
    given = make(2, 3, 2, 16, p=9, past=4, **bounds([[0, 1, 2]], [[9, 7, 8]]))
    kv, compressed = (torch.cat([x, x, x], 1) for x in (given["kv"], given["compressed"]))
    return given | {"kv": kv[:, 7:14], "compressed": compressed[:, :9]}


def no_entries(inputs):
    return inputs | {"compressed": inputs["compressed"][:, :0]}


CASES = {
    "six heads": make(2, 11, 6, 20, past=12),
    "one head, past rows": make(1, 9, 1, 16, past=12, window=18, seed=1),
    "shorter than the window": make(1, 3, 2, 16, window=9),
    "a query of three groups of heads": make(2, 1, 33, 16, past=7, window=4),
    "itself alone": make(1, 5, 2, 17, window=1),
    "range": make(1, 11, 2, 16, p=35, **causal(11, 35)),
    "range, past rows": make(1, 11, 2, 16, p=35, past=5, **causal(11, 35)),
    "ranges with holes": make(
        2, 5, 2, 16, p=20, **bounds([[0, 3, 9, 20, 17], [5] * 5], [[0, 19, 8, 20, 18], [6, 0, 20, 5, 17]])
    ),
    "picks": make(2, 7, 3, 20, p=19, past=3, **picks(2, 7, 5, 19)),
    "more picks than a tile": make(1, 3, 17, 16, p=20, **picks(1, 3, 37, 20)),
    "picks replace the range": make(1, 5, 2, 16, p=3, **bounds([[0] * 5], [[3] * 5]), **picks(1, 5, 2, 3)),
    "steps of half a tile, range": make(1, 3, 2, 16, p=35, past=37, window=20, **causal(3, 35)),
    "steps of half a tile, picks": make(1, 3, 2, 16, p=35, past=37, window=20, **picks(1, 3, 19, 35)),
    "documents": make(1, 11, 2, 16, past=13, **documents(11)),
    "documents, range": make(
        2,
        11,
        2,
        16,
        p=12,
        past=13,
        **documents(11),
        **bounds([[0] * 4 + [3] * 2 + [4] * 5], [[0, 1, 2, 3, 3, 4, 4, 6, 8, 10, 12]]),
    ),
    "documents, picks": make(2, 11, 2, 16, p=12, past=13, **documents(11, 2), **picks(2, 11, 4, 12)),
    "nothing seen": make(1, 2, 33, 16, p=3, window_start=torch.full((1, 2), 9), index=torch.full((1, 2, 2), -1)),
    "no entries yet, range": no_entries(make(2, 3, 2, 16, p=1, **bounds([[0] * 3], [[0] * 3]))),
    "no entries yet, picks": no_entries(make(2, 3, 2, 16, p=1, index=torch.full((2, 3, 2), -1))),
    "no slots": make(2, 3, 2, 16, p=4, index=torch.zeros(2, 3, 0, dtype=torch.int64)),
    "no queries, range": make(2, 0, 2, 16, p=3, **bounds([[]], [[]])),
    "no queries, picks": make(2, 0, 2, 16, p=3, **picks(2, 0, 2, 3)),
    "strided": strided(),
    "slices of a cache": slices(),
    "few queries, range in many splits": make(2, 2, 17, 20, p=170, past=70, window=70, **bounds([[0, 9]], [[170, 90]])),
    "few queries, picks in many splits": make(2, 3, 2, 16, p=30, past=3, **picks(2, 3, 90, 30)),
    **one_query("all"),
}
LONG = {  # for eager
    "window": make(2, 33, 4, 8, past=4, window=8),
    "range, two sequences": make(2, 40, 2, 16, p=25, past=3, window=16, **causal(40, 25)),
    "picks, shared": make(2, 37, 3, 8, p=9, past=3, window=5, **picks(2, 37, 4, 9)),
    "picks, gathered": make(2, 30, 28, 4, p=60, window=8, **picks(2, 30, 3, 60)),
    "several blocks": make(1, 300, 2, 8, p=75, window=16, **causal(300, 75)),
}


# the definition ------------------------------------------------------------------------------------------------------


def test_the_definition_by_hand():
    """Keys log 1, log 2, log 3 of one channel, q = 1, a sink of 0: each counts as often as it says."""
    q, two, three = torch.ones(1, 2, 1, 1).double(), math.log(2), math.log(3)
    kv, compressed = (torch.tensor(x).double().view(1, -1, 1) for x in ([0.0, two], [three]))
    given = {"window": 2, "scale": 1.0, "index": torch.tensor([[[-1, -1], [0, 0]]]), "backend": "reference"}
    out, lse = attention(q, kv, compressed, torch.zeros(1), **given)
    assert out.flatten().tolist() == pytest.approx([0, (2 * two + 2 * 3 * three) / (1 + 2 + 2 * 3 + 1)])
    assert lse.flatten().tolist() == pytest.approx([two, math.log(10)])


def by_loops(q, kv, compressed, sink, *, window, scale, window_start=None, start=None, end=None, index=None):
    out, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        row = kv.shape[1] - q.shape[1] + t
        first = 0 if window_start is None else int(window_start.expand(len(q), -1)[b, t])
        keys = [kv[b, j] for j in range(max(0, row - window + 1, first), row + 1)]
        if index is not None:
            keys += [compressed[b, j] for j in index[b, t].tolist() if j >= 0]
        elif start is not None:
            keys += [compressed[b, j] for j in range(*(int(x.expand(len(q), -1)[b, t]) for x in (start, end)))]
        keys = torch.stack([*keys, torch.zeros_like(kv[b, 0])])
        logits = scale * q[b, t] @ keys.T
        logits[:, -1] = sink
        out[b, t], lse[b, t] = logits.softmax(-1) @ keys, logits.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("case", CASES)
def test_the_definition_by_loops(case):
    given = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in CASES[case].items()}
    for name, a, b in zip(("out", "lse"), attention(**given, backend="reference"), by_loops(**given)):
        assert_same(name, a, b, 1e-14)


# both engines --------------------------------------------------------------------------------------------------------


def all_runs():
    """Each case by eager in each dtype; by Triton in float32, in half precisions what the interpreter has soon."""
    soon = {"float64": (), "float32": CASES, "float16": ("range", "picks")}
    soon["bfloat16"] = [case for case in CASES if not case.startswith(("documents", "steps", "one query"))]
    for name, dtype in DTYPES.items():
        yield from (pytest.param("eager", dtype, case, id=f"eager-{name}-{case}") for case in CASES | LONG)
        yield from (
            pytest.param("triton", dtype, case, id=f"triton-{name}-{case}", marks=absent) for case in soon[name]
        )


@pytest.mark.parametrize(("engine", "dtype", "case"), list(all_runs()), indirect=["engine"])
def test_as_defined(engine, dtype, case, device, launch, monkeypatch):
    if "half a tile" in case and engine == "triton" and device == "cpu":
        use_tiles(launch, monkeypatch, keys=32)
    inputs = (CASES | LONG)[case]
    before = {name: x.clone() for name, x in inputs.items() if torch.is_tensor(x)}
    got = hold_all(inputs, engine, dtype, device=device)
    assert got["0"].dtype == got["dq"].dtype == dtype and got["1"].dtype == torch.promote_types(dtype, torch.float32)
    if engine == "eager":
        with torch.no_grad():
            hold_all(inputs, engine, dtype)
    if case == "nothing seen":
        assert not any(x.any() for name, x in got.items() if name != "1")
        assert torch.equal(got["1"].cpu(), inputs["sink"].to(got["1"].dtype).expand(1, 2, 33))
    assert all(torch.equal(x, inputs[name]) for name, x in before.items()), "an input was written to"


def hold_all(inputs, engine, dtype, **options):
    """dsink sums over queries what has either sign, and is itself a product that cancels."""
    limits = {"dsink": 10 * ROUNDING[dtype]} if dtype in ROUNDING else {}
    return hold(attention, inputs, engine, dtype, kept=("sink",), limits=limits, **options)


@pytest.mark.parametrize(
    ("t", "dtype"), [(1, torch.float32), (2, torch.float32), (6, torch.float32), (6, torch.bfloat16)]
)
def test_bounds_far_outside(engine, t, dtype, device):
    """Of a document, and of entries: also those that 32 bits would take for others."""
    far, low = 1 << 62, 1 << 32
    seen = bounds([[-3, far, low, 0, -far, low + 2][:t]], [[99, 9, far, 3 - low, low, low + 5][:t]])
    starts = torch.tensor([[-far, low, far, -3, low + 1, 2][:t]])
    hold_all(make(1, t, 2, 16, p=9, past=3, **seen), engine, dtype, device=device)
    hold_all(make(1, t, 2, 16, p=9, past=3, **seen, window_start=starts), engine, dtype, device=device)


@of_triton
@pytest.mark.parametrize("case", [name for name, inputs in CASES.items() if "index" in inputs])
def test_picks_in_both_ways(engine, case, form, device):
    hold_all(CASES[case], engine, torch.float32, device=device)


@of_eager
def test_both_ways_of_looking_at_picks_are_taken(engine):
    assert sharing_pays(9, 4, 3) and not sharing_pays(60, 3, 28)


def results(engine, inputs, dtype=torch.float32, **options):
    """By name: "0" is out, "1" the log-sum-exp, "dq" a gradient."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = outcome(attention, inputs, backend=engine, dtype=dtype, device=device, **options)
    return {name: x.cpu() for name, x in found.items()}


def same(a, b, names=None):
    return all(torch.equal(a[name], b[name]) for name in names or a.keys() | b.keys())


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1e30, 1e30, 1e4, -1e4])
def test_extreme_sinks(engine, value, device):
    """Also where a query sees nothing but the sink; an infinite one is the limit of a large one."""
    first = torch.tensor([0] * 8 + [9])[None]
    inputs = make(1, 9, 2, 16, window=4, scale=1.0, window_start=first) | {"sink": torch.tensor([value, 0.5])}
    want = outcome(attention, inputs, backend="reference", dtype=torch.float64)
    got = results(engine, inputs)
    with torch.no_grad():
        assert same(results(engine, inputs), got, "01")
    assert not got["0"][0, 8].any()
    assert got["1"][0, 8].tolist() == [value if abs(value) < 1e30 else math.copysign(math.inf, value), 0.5]
    got["1"][0, 8] = want["1"][0, 8] = 0
    want["1"][want["1"] > 1e29] = math.inf
    for name, a in got.items():
        assert distance(a.cpu(), want[name]) < 1e-5, name


def test_large_logits(engine, device):
    """Hardly a gradient is left: it is finite."""
    rough = dict.fromkeys(("dq", "dkv", "dcompressed", "dsink"), math.inf)
    inputs = make(1, 9, 2, 16, p=4, window=4, scale=3e3, **picks(1, 9, 3, 4))
    got = hold(attention, inputs, engine, torch.float32, limits=rough, device=device)
    assert got["1"].abs().max() > 1e4 and all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize(("form", "value"), [("rows", math.inf), ("counts", math.nan)], indirect=["form"])
@pytest.mark.parametrize("h", [14, 3])
@pytest.mark.parametrize("entries", ["range", "few picks", "many picks"])
def test_a_broken_key_reaches_only_those_who_see_it(engine, form, entries, h, value):
    """Few picks, far apart, are copied by eager; many close ones are shared. Of three heads Triton has several queries
    in a tile.
    """
    t, query = 19, torch.arange(19)
    picked = {"few picks": torch.tensor([6, 39]), "many picks": 6 + torch.arange(20)}.get(entries)
    seen = {"start": torch.zeros(1, t, dtype=torch.int64), "end": query[None] // 3}
    if picked is not None:
        seen = {"index": picked.repeat(1, t, 1)}
        seen["index"][0, 4, 1] = 5
    inputs = make(1, t, h, 16, p=40, window=4, scale=0.1, **seen)
    clean = results(engine, inputs)
    inputs["kv"][0, 12, 3] = inputs["compressed"][0, 5, 7] = value
    if entries == "few picks":
        inputs["compressed"][0, 9, 2] = value  # between those that are picked
    broken = results(engine, inputs)
    sees = (query // 3 > 5 if picked is None else query == 4) | ((query >= 12) & (query < 16))
    for name in ("0", "1", "dq"):
        assert torch.equal(clean[name][0, ~sees], broken[name][0, ~sees]), name
    finite = broken["0"][0].isfinite()
    assert torch.equal(finite.flatten(1).all(1), ~sees)
    if engine == "triton":
        assert not finite[sees].any() and not broken["1"][0, sees].isfinite().any()
    assert torch.equal(clean["dcompressed"][0, 26:39], broken["dcompressed"][0, 26:39]), "entries that nobody sees"


@of_triton
@halves
@pytest.mark.parametrize("entries", ["none", "range", "picks"])
@pytest.mark.parametrize("d", [32, 20])
def test_wide_heads(engine, launch, monkeypatch, dtype, form, entries, d, device):
    """Of which q and dout lie one above the other in one product, and p and ds are left in memory."""
    monkeypatch.setattr(launch, "NARROW", 16)
    given = {"none": {}, "range": dict(p=21, past=5, **causal(6, 18)), "picks": dict(p=9, **picks(2, 6, 4, 9))}
    hold_all(make(2, 6, 3, d, window=4, **given[entries]), engine, dtype, device=device)


@halves
def test_mixed_dtypes_meet_in_the_wider(engine, dtype, device):
    inputs = make(1, 5, 2, 16, p=4, window=3, **picks(1, 5, 2, 4))
    hold(attention, inputs, engine, dtype, kept=("kv", "compressed"), limits={"dsink": 0.05}, device=device)


def test_the_same_bits_on_each_run_under_autocast_and_without_gradient(engine, form):
    inputs = sparse()
    want = results(engine, inputs)
    assert same(results(engine, inputs), want)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
        assert same(results(engine, inputs), want)
        with torch.no_grad():
            assert same(results(engine, inputs), want, "01")


def learn(device):
    inputs = make(1, 5, 2, 16, p=6, past=2, window=3, **picks(1, 5, 3, 6))
    return [inputs[name].to(device).requires_grad_() for name in ("q", "kv", "compressed", "sink")], inputs["index"].to(
        device
    )


def layer(q, kv, compressed, sink, index, backend=None):
    out, lse = attention(q * 1.1, kv.sin(), compressed.cos(), sink, window=3, scale=0.3, index=index, backend=backend)
    return out.cos().sum() + lse.sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_second_backward(engine, device, reentrant):
    tensors, index = learn(device)
    run = partial(layer, backend=engine)
    want = torch.autograd.grad(run(*tensors, index), tensors)
    checkpoint(run, *tensors, index, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, tensors))
    loss = run(*tensors, index)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(distance(x.grad, 3 * a) < 1e-6 for a, x in zip(want, tensors))


def test_the_log_sum_exp_has_no_gradient(engine, device):
    tensors, index = learn(device)
    run = partial(attention, *tensors, window=3, scale=0.3, index=index, backend=engine)
    with torch.no_grad():
        assert not run()[0].requires_grad
    out, lse = run()
    assert out.requires_grad and not lse.requires_grad


@of_eager
def test_memory_of_scores_is_bounded(engine):
    """No tensor of t x p exists: with it, 2 GiB would be needed."""
    from abyssal.train.run.metrics import peak_memory_gib

    inputs = make(1, 4096, 2, 4, p=8192, past=28672, window=8, scale=0.5)
    end = ((torch.arange(28672, 32768) + 1) // 4)[None]
    before = peak_memory_gib(inputs["q"].device)
    attention(**inputs, start=torch.zeros_like(end), end=end, backend=engine)
    grown = peak_memory_gib(inputs["q"].device) - before
    assert grown < 0.1, f"{grown:.2f} GiB more at the peak"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink": torch.zeros(3)}, "sink"),
        ({"kv": torch.zeros(1, 2, 8)}, "kv"),
        ({"window": 0}, "window=0"),
        ({"compressed": torch.zeros(1, 3, 8)}, "start and end"),
        ({"compressed": torch.zeros(1, 3, 7)}, "compressed"),
        ({"compressed": torch.zeros(1, 3, 8), "index": torch.zeros(1, 3, 2)}, "index"),
        ({"compressed": torch.zeros(1, 3, 8), "index": torch.zeros(1, 4)}, r"index has shape \(1, 4\)"),
        ({"q": torch.zeros(4, 2, 8)}, r"q has shape \(4, 2, 8\): it must be \[batch, queries, heads, head dim\]"),
        ({"window_start": torch.full((1, 7), 2)}, r"window_start has shape \(1, 7\): it must be \[1 or 1, 4\]"),
        ({"start": torch.zeros(4)}, r"start has shape \(4,\)"),
        ({"end": torch.zeros(2, 4)}, r"end has shape \(2, 4\)"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**make(1, 4, 2, 8) | change)


# one token in numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("sink", [0.0, 40.0, -40.0, 1e4, -1e4, 1e30, -1e30, -math.inf])
@pytest.mark.parametrize(("window", "entries"), [(1, None), (5, 0), (4, 7), (33, 1)])
def test_step(window, entries, sink, dtype):
    """One part or two, of which the second may be empty."""
    given = make(1, 1, 3, 6, p=entries or 0, past=window - 1, window=window, scale=3.5)
    given["sink"] += sink
    parts = [given["kv"]] + ([] if entries is None else [given["compressed"] if entries else torch.zeros(1, 0, 6)])
    q, sinks, *keys = (x[0].numpy().astype(dtype) for x in (given["q"][0], given["sink"][None, :, None], *parts))
    got = attention_step(q, keys, sinks, 3.5)
    exact = {name: x.double() if torch.is_tensor(x) else x for name, x in given.items()}
    want, _ = attention(**exact, **(bounds([[0]], [[entries]]) if entries else {}), backend="reference")
    assert got.dtype == dtype
    assert_same("out", torch.from_numpy(got), want[0, 0], {np.float32: 3e-6, np.float64: 1e-13}[dtype])


def test_step_of_scores_beyond_exp():
    """A head that sees one key alone, and one whose scores are all far below the other's, and equal."""
    q, keys = np.array([[2000, 0, 0], [-2000, -2000, -2000]], np.float32), np.eye(3, dtype=np.float32)
    out = attention_step(q, [keys[:1], keys[1:]], np.full((2, 1), -1e4, np.float32), 1.0)
    assert np.allclose(out, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=0, atol=1e-6)


# Triton: order of sums, chunks, what is asked for --------------------------------------------------------------------


def sparse(t=6):
    return make(2, t, 3, 16, p=21, past=5, **picks(2, t, 4, 21))


def prefix(inputs, t):
    """The first sequence's first queries; kv has 5 past rows."""
    first = {name: inputs[name][:1, :t] for name in ("q", "index")}
    return inputs | first | {"kv": inputs["kv"][:1, : t + 5], "compressed": inputs["compressed"][:1]}


@of_triton
def test_a_query_has_the_same_bits_in_any_batch(engine, form, device):
    inputs = sparse()
    dout = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(9)).to(device)

    def run(inputs, dout):
        leaves = {n: x.to(device).requires_grad_() for n, x in inputs.items() if n in ("q", "kv", "compressed", "sink")}
        given = inputs | leaves | {"index": inputs["index"].to(device)}
        out, lse = attention(**given, backend=engine)
        return out, lse, *torch.autograd.grad(out, [leaves[n] for n in ("q", "kv", "compressed")], dout)

    full = run(inputs, dout)
    for a, b in zip(full[:3], run(prefix(inputs, 5), dout[:1, :5])):
        assert torch.equal(a[:1, :5], b)
    flipped = {n: x.flip(0) if torch.is_tensor(x) and x.ndim > 1 else x for n, x in inputs.items()}
    for a, b in zip(full, run(flipped, dout.flip(0))):
        assert torch.equal(a.flip(0), b)


def decoded(entries, capacity=0):
    """A query of two sequences that see 70 entries, of a cache that has room for so many more, and NaN there."""
    given = make(2, 1, 3, 16, p=70, past=5, **bounds([[2]], [[70]]))
    rest = torch.full((2, capacity, 16), math.nan)
    seen = picks(2, 1, 9, 70) if entries == "picks" else {}
    return given | {"compressed": torch.cat([given["compressed"], rest], 1)} | seen


@of_triton
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_a_decoded_query_has_the_same_bits_in_any_batch_and_cache(engine, entries):
    want = results(engine, decoded(entries))
    for capacity in (1, 200):
        assert same(results(engine, decoded(entries, capacity)), want, "01")
    second = {n: x[1:] if torch.is_tensor(x) and len(x) == 2 else x for n, x in decoded(entries).items()}
    assert all(torch.equal(results(engine, second)[name], want[name][1:]) for name in "01")


@of_triton
def test_before_the_first_entry_as_with_room_for_some(engine):
    given = decoded("range") | bounds([[0]], [[0]]) | {"window": 3}
    assert same(results(engine, given), results(engine, no_entries(given)), "01")


@of_triton
def test_splits_cover_all_keys(engine, launch):
    assert {launch.decode.first_key.fn(split + 1, 5) - launch.decode.first_key.fn(split, 5) for split in range(24)} == {
        5,
        10,
    }
    for n in [*range(4000), 1 << 18]:
        splits = launch.splits_of(n)
        first, last = (launch.decode.first_key.fn(split, launch.SPLIT) for split in (splits - 1, splits))
        assert first < n <= last or n == splits == 0
    assert launch.splits_of(launch.SPLIT << 11) == 72


@of_triton
def test_keys_that_lie_in_rows_are_not_copied(engine):
    from abyssal.kernels.triton.launch import in_rows

    x = torch.zeros(2, 6, 4)
    for rows in (x, x[:, 1:4], x[:1, 2:], x[:1].expand(2, 6, 4)):
        assert in_rows(rows) is rows
    for other in (x[:, ::2], x[..., :2], x.mT, x.transpose(0, 1)):
        assert in_rows(other).is_contiguous()


@of_triton
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_chunks_of_queries(engine, device, launch, monkeypatch, form, entries):
    inputs = sparse() if entries == "picks" else make(2, 6, 3, 16, p=21, past=5, **causal(6, 18))
    monkeypatch.setattr(launch, "BUDGET", 1)
    monkeypatch.setattr(launch, "CHUNK", 4)
    calls, queries = [], launch._queries
    monkeypatch.setattr(launch, "_queries", lambda *a, **k: calls.append(a[3:5]) or queries(*a, **k))
    hold_all(inputs, engine, torch.float32, device=device)
    assert calls == [(0, 4), (4, 2)]


@of_triton
@pytest.mark.parametrize(
    ("shape", "k", "p"),
    [((1, 4096, 64, 512), 512, 1024), ((1, 65536, 64, 512), 512, 16384), ((3, 5000, 6, 40), 7, 900)],
)
def test_chunks_keep_to_the_budget(engine, launch, shape, k, p):
    b, t, h, d = shape
    q, kv = (torch.empty(n, dtype=torch.bfloat16, device="meta") for n in (shape, (b, t, d)))
    index, compressed = torch.empty(b, t, k, device="meta"), torch.empty(b, p, d, device="meta")
    inputs = launch.Inputs(q, kv, compressed, q[0, 0, :, 0], launch.Mask(128, picks=index), 1.0, "lists")
    chunks = launch._chunks(inputs)
    assert [first for first, _ in chunks] == [0, *itertools.accumulate(n for _, n in chunks)][:-1]
    assert sum(n for _, n in chunks) == t and all(n % launch.CHUNK == 0 for _, n in chunks[:-1])
    assert b * chunks[0][1] * (2 * 2 * h * sum(launch._slots(inputs)) + 2 * k * d) <= launch.BUDGET


@pytest.fixture
def by_keys(launch, monkeypatch):
    """What makes gradients of keys, call by call."""
    calls = []
    for name in ("window", "range", "picks"):
        run = getattr(launch, f"_of_{name}")
        monkeypatch.setattr(launch, f"_of_{name}", lambda *a, name=name, run=run: calls.append(name) or run(*a))
    return calls


@of_triton
@pytest.mark.parametrize("needed", ["q", "kv", "compressed", "sink"])
def test_each_gradient_alone(engine, form, by_keys, needed):
    inputs = sparse(t=7)
    everything = results(engine, inputs)
    by_keys.clear()
    alone = results(engine, inputs, fixed={"q", "kv", "compressed", "sink"} - {needed})
    assert alone.keys() == {"0", "1", f"d{needed}"} and same(alone, everything, alone)
    ours = {"kv": ["window"], "compressed": ["picks" if form == "rows" else "range"]}
    assert by_keys == ours.get(needed, [])


@of_triton
def test_atomics_change_nothing_but_the_order(engine, by_keys, monkeypatch):
    want = results(engine, sparse())
    by_keys.clear()
    monkeypatch.setenv("ABYSSAL_ATOMICS", "1")
    got = results(engine, sparse())
    assert by_keys == ["window", "picks"] and all(distance(got[n], want[n]) < 1e-6 for n in want)
    monkeypatch.setenv("ABYSSAL_ATOMICS", "yes")
    with pytest.raises(ValueError, match="ABYSSAL_ATOMICS='yes'"):
        results(engine, sparse())


# Triton as torch sees it ---------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(engine, monkeypatch):
    """Fake tensors cannot be filled with NaN, and real sizes would fill gigabytes."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)


@of_triton
@pytest.mark.parametrize("entries", ["none", "range", "picks"])
def test_opcheck(engine, real_memory, device, entries):
    from abyssal.kernels.attention.triton import _attention

    (q, kv, compressed, sink), index = learn(device)
    zero = index[..., 0] * 0
    seen = {"none": (None, None, None), "range": (zero, zero + 4, None), "picks": (None, None, index)}[entries]
    compressed = None if entries == "none" else compressed
    torch.library.opcheck(_attention, (q, kv, compressed, sink, zero, *seen, 3, 0.3))


@of_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(engine, real_memory, device, dynamic):
    tensors, index = learn(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*tensors, index), tensors) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@of_triton
def test_backward_keeps_inputs_output_and_log_sum_exp(engine, device):
    tensors, index = learn(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out, lse = attention(*tensors, window=3, scale=0.3, index=index)
    assert sorted(kept) == sorted(x.shape for x in (*tensors, out, lse, index))


# on a CUDA device, at real widths ------------------------------------------------------------------------------------


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("real_memory")(of_triton(test)))


def real(entries, t=600, h=64, d=512, p=300, k=64):
    seen = {"window": {}, "range": causal(t, p), "picks": picks(1, t, k, p)}[entries]
    p = 0 if entries == "window" else p
    return make(1, t, h, d, p=p, past=40, window=128, scale=512**-0.5, **seen)


@on_gpu
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
@pytest.mark.parametrize("entries", ["window", "range", "picks"])
@pytest.mark.parametrize(("h", "d"), [(64, 512), (128, 512), (4, 64), (6, 40)])
def test_real_widths_as_defined(engine, dtype, entries, h, d):
    hold_all(real(entries, t=200, h=h, d=d), engine, dtype, device="cuda")


@on_gpu
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
@pytest.mark.parametrize("entries", ["range", "picks"])
@pytest.mark.parametrize(("h", "d"), [(64, 512), (4, 64), (6, 40)])
def test_a_decoded_token_at_real_widths(engine, dtype, entries, h, d):
    hold_all(real(entries, t=1, h=h, d=d, p=5000, k=512), engine, dtype, device="cuda")


@on_gpu
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_the_same_bits_at_real_widths(engine, form, entries):
    inputs = real(entries)
    full, again = (results(engine, inputs, torch.bfloat16) for _ in range(2))
    assert same(full, again)
    few = {n: x[:, :100] if n in ("q", "start", "end", "index") else x for n, x in inputs.items()}
    part = results(engine, few | {"kv": inputs["kv"][:, :140]}, torch.bfloat16, fixed=("q", "kv", "compressed", "sink"))
    assert all(torch.equal(full[name][:, :100], part[name]) for name in "01")


@on_gpu
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_chunks_and_atomics_change_only_the_order(engine, launch, monkeypatch, entries):
    inputs = real(entries)
    want = results(engine, inputs, torch.bfloat16)
    monkeypatch.setattr(launch, "BUDGET", 1 << 22)
    for atomics in ("0", "1"):
        monkeypatch.setenv("ABYSSAL_ATOMICS", atomics)
        got = results(engine, inputs, torch.bfloat16)
        assert all((got[n].double() - x.double()).norm() < 1e-3 * x.double().norm() for n, x in want.items())


def leaves_at_real_widths(entries, **sizes):
    inputs = real(entries, **sizes)
    given = {n: x.cuda() if torch.is_tensor(x) else x for n, x in inputs.items()}
    tensors = {n: given[n].bfloat16().requires_grad_() for n in ("q", "kv", "compressed", "sink")}
    return given | tensors, list(tensors.values())


@on_gpu
def test_a_cuda_graph_replays_other_picks(engine):
    given, leaves = leaves_at_real_widths("picks")

    def run():
        out, _ = attention(**given)
        return out, *torch.autograd.grad(out.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        given["index"].copy_(picks(*given["index"].shape, 300, seed)["index"])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@on_gpu
def test_nothing_waits_for_the_device(engine, form):
    given, _ = leaves_at_real_widths("picks")
    dout = torch.randn_like(given["q"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(**given)[0].backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_memory_stays_within_the_formula(engine, launch, monkeypatch):
    monkeypatch.setattr(launch, "BUDGET", 1 << 26)
    given, leaves = leaves_at_real_widths("picks", t=2048, p=2048)
    before = torch.cuda.memory_allocated()
    out, lse = attention(**given)
    assert torch.cuda.memory_allocated() - before <= out.nbytes + lse.nbytes + 10_000
    dout = torch.randn_like(out)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out.backward(dout)
    sums = 3 * sum(x.numel() * 4 for x in leaves[1:3])  # in float32, a chunk's parts of them, and the results
    peak = torch.cuda.max_memory_allocated() - held
    assert peak <= 2 * launch.BUDGET + leaves[0].nbytes + 3 * sums + 50_000_000
