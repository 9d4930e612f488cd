"""The indexer's loss: its definition against the joint softmax query by query, its engines against the definition."""

import importlib
import math

import pytest
import torch
from oracle import assert_same, hold, outcome, relative_rms
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import attention, index_loss, index_topk
from abyssal.kernels.index_loss import reference

SCALE = 0.4
STUDENT = ("index_q", "index_weights", "index_keys")
KEPT = ("index_weights", "lse")  # float32 where the rest is of a half precision
FLOATS = {"eager": (torch.float64, torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16)}
both = pytest.mark.parametrize("k", [4, 6, 0], ids=["picks", "most", "all"])  # of 9 or 12 entries


@pytest.fixture
def launch(request, device, monkeypatch):
    """Triton's launches, with blocks so small that all loops go round; the shipped ones on a GPU. Products have sides
    of 16 once compiled.
    """
    pytest.importorskip("triton")
    request.getfixturevalue("by_triton")
    module = importlib.import_module("abyssal.kernels.index_loss.triton.launch")
    if request.getfixturevalue("emulated"):
        side = 4 if device == "cpu" else 16
        small = module.Blocks(max(side, 8), side, 4, 2)
        monkeypatch.setattr(module, "table_for", lambda q, width: module.Table(small, small, small))
        monkeypatch.setattr(module, "next_power", lambda n, least=1: max(1 << (n - 1).bit_length(), min(least, side)))
        for name, value in {"QUERIES": 4, "ROW": 8, "LEAST": 5}.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "SCRATCH", 0)  # chunks of LEAST queries
    return module


# cases ---------------------------------------------------------------------------------------------------------------


def visible_lse(q, compressed, start, end, **_):
    entry = torch.arange(compressed.shape[1])
    hidden = (entry < start[..., None]) | (entry >= end[..., None])
    scores = SCALE * torch.einsum("bthd,bpd->bthp", q, compressed)
    return scores.masked_fill(hidden[:, :, None], -math.inf).logsumexp(-1).clamp_min(-5)


def case(b, t, i, e, h, d, p, k):
    """Picks, where there are some, lie anywhere among the visible entries and the -1."""
    g = torch.Generator().manual_seed(t + p)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    given = {"index_q": draw(b, t, i, e), "index_weights": draw(b, t, i), "index_keys": draw(b, p, e)}
    given |= {"q": draw(b, t, h, d), "compressed": draw(b, p, d), "scale": SCALE, "index": None}
    start = torch.randint(0, p // 2 + 1, (b, t), generator=g)
    end = torch.minimum(start + torch.randint(0, p + 1, (b, t), generator=g), torch.tensor(p))
    if k:
        chance, entry = torch.rand(b, t, p, generator=g), torch.arange(p)
        chance[(entry < start[..., None]) | (entry >= end[..., None])] = -1
        best = chance.topk(min(k, p))
        index = torch.where(best.values < 0.2, -1, best.indices)
        given["index"] = index[..., torch.randperm(index.shape[2], generator=g)]
    given |= {"start": start, "end": end}
    return given | {"lse": visible_lse(**given) + torch.rand(b, t, h, generator=g)}


def queries_that_read_nothing(k):
    given = case(1, 7, 2, 4, 2, 4, 9, k)
    given["lse"][0, 2] = math.inf  # padding
    given["q"][0, 3] = given["lse"][0, 3] = math.nan
    given["end"][0, 2:4] = 9
    given["end"][0, 4] = given["start"][0, 4]
    if k:
        given["index"][0, 3, 0], given["index"][0, 4] = 8, -1
    return given


def nothing_is_seen(k):
    given = case(1, 6, 2, 4, 2, 4, 9, k)
    return given | {"end": given["start"], "index": torch.full_like(given["index"], -1) if k else None}


def large_scores(k):
    given = case(1, 6, 2, 4, 2, 4, 9, k)
    given |= {"q": 60 * given["q"].abs(), "index_weights": 300 * given["index_weights"]}
    given["compressed"][0, 4] = -5  # of which no mass is left
    return given | {"lse": visible_lse(**given)}


def a_shut_relu(k):
    given = case(1, 6, 2, 4, 2, 4, 9, k)
    given["index_keys"][0, ::2] = 0  # hits of exactly 0
    given["index_q"][0, :, 1] = 0
    return given


def one_range_for_all(k):
    given = case(2, 6, 2, 4, 2, 4, 9, 0)
    given |= {"start": given["start"][:1] * 0, "end": given["end"][:1]}
    index = torch.where(torch.arange(k) < given["end"][..., None], torch.arange(k), -1).expand(2, -1, -1)
    return given | {"index": index if k else None}


def strided(k):
    given = case(2, 6, 2, 4, 3, 4, 9, k)
    apart = {n: torch.stack([x, x + 7], -1)[..., 0] for n, x in given.items() if n in ("start", "end", "index") and k}
    return given | apart | {n: given[n].mT.contiguous().mT for n in (*STUDENT, "q", "compressed", "lse")}


SHAPES = {  # b, t, i, e, h, d, p, k
    "blocks": (2, 6, 3, 6, 5, 7, 17, 11),
    "all visible": (2, 6, 3, 6, 5, 7, 17, 0),
    "copied picks": (2, 6, 20, 4, 20, 4, 60, 2),
    "one head": (1, 6, 1, 16, 1, 16, 9, 3),
    "more picks than entries": (1, 6, 2, 4, 2, 4, 3, 8),
    "one query": (1, 1, 2, 4, 2, 4, 9, 4),
    "one entry": (1, 9, 1, 4, 2, 8, 1, 1),
    "measured queries": (1, 67, 1, 4, 1, 4, 6, 3),
}
CASES = {name: case(*shape) for name, shape in SHAPES.items()}
CASES["copied picks"]["index"][:, ::2, 0] = -1
CASES["the first picks are none"] = case(1, 6, 2, 4, 2, 4, 20, 11)
CASES["the first picks are none"]["index"][..., :8] = -1  # a whole block of a row
for make in (queries_that_read_nothing, nothing_is_seen, large_scores, a_shut_relu, one_range_for_all, strided):
    CASES |= {f"{make.__name__.replace('_', ' ')}, {name}": make(k) for name, k in (("picks", 4), ("all", 0))}
for kind, k in ("picks", 4), ("all", 0):
    CASES |= {f"no queries, {kind}": case(2, 0, 2, 4, 2, 4, 5, k), f"no entries, {kind}": case(2, 3, 2, 4, 2, 4, 0, k)}


def on(device, given):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in given.items()}


# the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True], ids=["", "captured"])
@pytest.mark.parametrize("k", [3, 50, 0], ids=["some", "every entry", "all"])
def test_the_definition_query_by_query(k, captured):
    """From the joint softmax over window, entries and sink. A key that captures a head takes it out of the teacher."""
    (b, t, h, d, i, e, p), window, g = (2, 40, 3, 8, 2, 4, 10), 6, torch.Generator().manual_seed(0)
    shapes = (b, t, i, e), (b, t, i), (b, p, e), (b, t, h, d), (b, t, d), (b, p, d), (h,)
    iq, iw, ik, q, kv, c, sink = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    if captured:
        kv[0, -1] = 30 * q[0, -1, 0]
    seen = {"start": torch.zeros(1, t, dtype=torch.int64), "end": ((torch.arange(t) + 1) * p // t)[None]}
    index = index_topk(iq, iw, ik, k=k, **seen) if k else None
    attended = {"index": index} if k else seen
    _, lse = attention(q, kv, c, sink, window=window, scale=SCALE, **attended, backend="reference")
    student = [x.requires_grad_() for x in (iq, iw, ik)]
    got = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen, backend="reference")
    losses, shares = [], []
    for row in range(b):
        for own in range(3, t):  # the first to see an entry
            last = int(seen["end"][0, own])
            entries = [n for n in index[row, own].tolist() if n >= 0] if k else list(range(last))
            near = kv[row, max(0, own - window + 1) : own + 1]
            scores = SCALE * q[row, own] @ torch.cat([near, c[row, entries]]).T
            mass = torch.cat([scores, sink[:, None]], 1).softmax(-1)[:, len(near) : -1].sum(0)
            teacher = mass / mass.sum()
            picked = (iw[row, own, :, None] * (iq[row, own] @ ik[row, entries].T).relu()).sum(0)
            losses.append((teacher * (teacher.log() - picked.log_softmax(-1))).sum())
            if own % 2:  # 20 of 40: at most 32 are measured
                visible = (SCALE * q[row, own] @ c[row, :last].T - lse[row, own, :, None]).exp().sum()
                shares.append(mass.sum() / visible)
    want = sum(losses) / len(losses), sum(shares) / len(shares)
    for name, a, x in zip(("loss", "share"), got, want):
        assert_same(name, a, x, 1e-10)
    grads = (torch.autograd.grad(3 * x, student) for x in (got[0], want[0]))
    for name, a, x in zip(STUDENT, *grads):
        assert_same(f"d{name}", a, x, 1e-10)


def test_the_share_is_measured_on_evenly_spaced_queries():
    for t, count in ((0, 0), (1, 1), (32, 32), (33, 17), (64, 32), (1000, 32), (1 << 20, 32)):
        queries = range(t)[reference.measured_queries(t)]
        assert len(queries) == count and (not t or queries[-1] == t - 1)


# engines -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(engine, name, device):
    """In half precision the scalars and the weights' gradients are not rounded; Triton's products of the others are."""
    for dtype in FLOATS[engine]:
        unrounded = dict.fromkeys(("0", "1", "dindex_weights"), 1e-10 if dtype == torch.float64 else 1e-5)
        got = hold(index_loss, CASES[name], engine, dtype, kept=KEPT, limits=unrounded, device=device)
        assert got["0"].dtype == got["1"].dtype == torch.promote_types(dtype, torch.float32)
        assert all(got[f"d{leaf}"].dtype == (dtype if leaf not in KEPT else got["0"].dtype) for leaf in STUDENT)


@pytest.mark.parametrize("shape", [(2, 2, 4, 3, 8, 75, 40), (1, 8, 4, 8, 4, 300, 20), (1, 3, 4, 2, 8, 75, 0)], ids=str)
@pytest.mark.parametrize("measured", [1, 32, 600])
def test_several_blocks_of_the_eager_engine(shape, measured, monkeypatch):
    """Shared entries, copied picks, all entries; blocks without a measured query."""
    monkeypatch.setattr(reference, "MEASURED", measured)
    hold(index_loss, case(shape[0], 300, *shape[1:]), "eager", torch.float64)


@both
def test_only_what_is_asked_for(engine, k, device):
    """Nothing flows into the teacher, nor from the share."""
    given = on(device, case(1, 6, 2, 4, 2, 4, 9, k))
    leaves = {name: given[name].requires_grad_() for name in STUDENT}
    loss, share = index_loss(**given, backend=engine)
    want = torch.autograd.grad(loss, list(leaves.values()))
    teacher = {name: given[name].clone().requires_grad_() for name in ("q", "compressed", "lse")}
    for n, name in enumerate(STUDENT):
        some = {x: leaf.detach().requires_grad_(x == name) for x, leaf in leaves.items()}
        again, constant = index_loss(**given | some | teacher, backend=engine)
        grads = torch.autograd.grad(again, [some[name], *teacher.values()], allow_unused=True)
        assert torch.equal(grads[0], want[n]) and grads[1:] == (None, None, None) and not constant.requires_grad
    with torch.no_grad():
        assert all(map(torch.equal, index_loss(**given, backend=engine), (loss, share)))


def test_backward_twice_and_checkpointing(engine, device):
    given = on(device, case(1, 6, 2, 4, 2, 4, 9, 4))
    leaves = [given[name].requires_grad_() for name in STUDENT]

    def run(*leaves):
        loss, share = index_loss(**given | dict(zip(STUDENT, leaves)), backend=engine)
        return 3 * loss + share

    loss = run(*leaves)
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    for reentrant in (False, True):
        for x in leaves:
            x.grad = None
        checkpoint(run, *leaves, use_reentrant=reentrant).backward()
        assert all(torch.equal(x.grad, g) for x, g in zip(leaves, once))


TENSORS = ("index_q", "index_weights", "index_keys", "q", "compressed", "lse", "start", "end", "index")


def test_bad_input():
    """Each without its batch; where the last size is given by others, with one less."""
    given = case(1, 6, 2, 4, 2, 4, 9, 4)
    bad = [(name, given[name][0]) for name in TENSORS]
    bad += [(name, given[name][..., 1:]) for name in TENSORS if name not in ("index_q", "q", "index")]
    for name, x in bad:
        with pytest.raises(ValueError, match=rf"^{name} has shape \({str(tuple(x.shape))[1:-1]}\): it must be \["):
            index_loss(**given | {name: x})


# Triton --------------------------------------------------------------------------------------------------------------


def results(given, device, dtype=torch.float32):
    """Loss, share and gradients by Triton."""
    return outcome(index_loss, given, backend="triton", dtype=dtype, kept=KEPT, device=device)


def test_float16(launch, device):
    for k in (6, 0):
        hold(index_loss, case(1, 6, 2, 8, 4, 8, 12, k), "triton", torch.float16, kept=KEPT, device=device)


def test_keys_of_another_dtype_are_rounded(launch, device):
    """As under autocast: bfloat16 queries, float32 keys and entries. Gradients come back in each one's dtype."""
    given, near = case(1, 6, 2, 8, 2, 8, 12, 5), 1 + 2**-12  # lost in bfloat16
    rounded = {name: given[name].bfloat16().float() * near for name in ("index_keys", "compressed")}
    want = results(given, device, torch.bfloat16)
    mixed = {"op": index_loss, "backend": "triton", "dtype": torch.bfloat16, "device": device}
    got = outcome(inputs=given | rounded, kept=(*KEPT, *rounded), **mixed)
    assert got["dindex_keys"].dtype == torch.float32
    assert all(torch.equal(got[name].to(x.dtype), x) for name, x in want.items())


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_with_those_who_look_at_it(launch, device, k, value):
    """An index key with such a channel spoils the loss, and gradients of the queries that compare it, no others."""
    given, entry = case(1, 7, 2, 4, 2, 4, 9, k), 6
    given["start"][0, 2], given["end"][0, 2] = entry, entry + 1  # and compares no other
    if k:
        given["index"][0, 2] = torch.tensor([entry] + [-1] * (k - 1))
    clean = results(given, device)
    looks = (given["index"] == entry).any(-1) if k else (given["start"] <= entry) & (given["end"] > entry)
    assert 0 < looks.sum() < looks.numel()
    given["index_keys"][0, entry, 1] = value
    got, looks = results(given, device), looks.to(device)
    assert got["0"].isnan() and torch.equal(got["dindex_q"].isnan().flatten(2).any(-1), looks)
    assert all(torch.equal(got[name][~looks], clean[name][~looks]) for name in ("dindex_q", "dindex_weights"))


@both
def test_weights_that_are_not_finite_behind_a_shut_relu(launch, device, k):
    """Of a query that reads nothing, whose hits are all negative, they reach no gradient of a key."""
    given = case(1, 3, 2, 4, 2, 4, 6, k)
    given["index_keys"].abs_()
    given["index_q"][0, 1], given["index_weights"][0, 1], given["lse"][0, 1] = -1.0, math.nan, math.inf
    got = results(given, device)
    assert got["0"].isfinite() and got["dindex_keys"].isfinite().all() and got["dindex_q"].isfinite().all()


@both
def test_chunks_and_spans_change_only_the_rounding(launch, device, monkeypatch, k):
    given = case(2, 6, 2, 4, 2, 4, 12, k)
    want, again = (results(given, device) for _ in range(2))
    assert all(torch.equal(again[name], x) for name, x in want.items()), "run to run"
    monkeypatch.setattr(launch, "SCRATCH", 1 << 28)
    monkeypatch.setattr(launch, "PROGRAMS", 18)  # three spans
    got = hold(index_loss, given, "triton", torch.float32, device=device)
    assert all(torch.equal(got[name], want[name]) for name in ("dindex_q", "dindex_weights"))


def gradients(launch, given, wanted):
    """As the launches leave them, of the sum over queries."""
    student = launch.Student(*(given[name] for name in STUDENT))
    teacher = launch.Teacher(given["q"], given["lse"], given["compressed"])
    compared = launch.Compared(given["index"], given["start"], given["end"])
    return launch.index_loss(student, teacher, compared, scale=SCALE, wanted=wanted).gradients


@both
def test_a_query_does_not_depend_on_the_rest(launch, device, k):
    """Gradients of a prefix, up to the number of queries, which scales them."""
    given = on(device, case(2, 7, 2, 4, 2, 4, 9, k))
    some = slice(1, 2), slice(0, 6)
    part = {name: x[some] if torch.is_tensor(x) else x for name, x in given.items()}
    part |= {name: given[name][1:] for name in ("index_keys", "compressed")}
    whole, few = (gradients(launch, x, wanted=True) for x in (given, part))
    assert torch.equal(whole.q[some], few.q) and torch.equal(whole.weights[some], few.weights)


def test_nothing_is_kept_without_gradients(launch, device):
    kept = gradients(launch, on(device, case(1, 6, 2, 4, 2, 4, 9, 4)), wanted=False)
    assert [x.numel() for x in kept] == [0, 0, 0]


@both
def test_opcheck(shipped, device, k):
    given = on(device, case(1, 3, 2, 16, 2, 16, 6, k))
    leaves = [given[name].requires_grad_() for name in STUDENT]
    rest = [given[name] for name in ("q", "compressed", "lse", "scale", "start", "end", "index")]
    operator = importlib.import_module("abyssal.kernels.index_loss.triton")._index_loss
    torch.library.opcheck(operator, (*leaves, *rest, True))


@both
def test_compiles_without_a_graph_break(shipped, device, k):
    given = on(device, case(1, 3, 2, 16, 2, 16, 6, k))
    leaves = [given.pop(name).requires_grad_() for name in STUDENT]

    def run(*leaves):
        loss, share = index_loss(*(x.sin() for x in leaves), **given)
        return loss.exp() + share

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled))
    assert all(map(torch.equal, want, got))


# at sizes with many full tiles ---------------------------------------------------------------------------------------


def packed(t, h, d, i, e, p, dtype=torch.bfloat16, k=100):
    """Two packed documents of each sequence, the teacher's log-sum-exp a bit above that of the entries."""
    g = torch.Generator().manual_seed(0)
    token, half = torch.arange(t), t // 3
    start = torch.where(token < half, 0, half * p // t)[None]
    seen = {"start": start, "end": ((token + 1) * p // t)[None].maximum(start)}
    shapes = {"index_q": (t, i, e), "index_keys": (p, e), "q": (t, h, d), "compressed": (p, d)}
    given = {name: torch.randn(1, *shape, generator=g) for name, shape in shapes.items()}
    given["index_weights"] = torch.randn(1, t, i, generator=g) * (e * i) ** -0.5
    given = {name: x.cuda().to(torch.float32 if name == "index_weights" else dtype) for name, x in given.items()}
    given |= {name: x.cuda() for name, x in seen.items()}
    given["lse"] = torch.full((1, t, h), math.log(p) + 1.0, device="cuda")
    student = [given[name] for name in STUDENT]
    index = index_topk(*student, k=k, start=given["start"], end=given["end"]) if k else None
    return given | {"scale": d**-0.5, "index": index}


@pytest.mark.gpu
@pytest.mark.parametrize("k", [100, 0], ids=["picks", "all"])
@pytest.mark.parametrize(
    ("dtype", "h", "d", "i", "e"),
    [(torch.bfloat16, 64, 512, 64, 128), (torch.float16, 128, 512, 64, 128), (torch.float32, 4, 64, 4, 32)],
    ids=["bf16", "fp16-128-heads", "fp32-toy"],
)
def test_real_sizes(shipped, dtype, h, d, i, e, k):
    """As near to float64 as eager is, within a factor, and what rounding its products adds."""
    given = packed(700, h, d, i, e, 400, dtype, k)
    options = {"op": index_loss, "inputs": given, "kept": KEPT, "device": "cuda"}
    got, plain = (outcome(backend=engine, dtype=dtype, **options) for engine in ("triton", "eager"))
    for name, want in outcome(backend="reference", dtype=torch.float64, **options).items():
        floor = 5e-6 if dtype == torch.float32 else 3e-3 if name.startswith("d") else 1e-4
        error, allowed = (relative_rms(x[name], want) for x in (got, plain))
        assert error <= 2 * allowed + floor, f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("k", [100, 0], ids=["picks", "all"])
def test_the_same_bits_in_a_cuda_graph_and_nothing_that_waits(shipped, k):
    given = packed(500, 64, 512, 64, 128, 300, k=k)
    leaves = [given[name].requires_grad_() for name in STUDENT]

    def run():
        loss, share = index_loss(**given)
        return loss, share, *torch.autograd.grad(loss, leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want, again = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, want, again))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(2):
        for x in (*leaves, given["q"]):
            x.data.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, out, run()))


@pytest.mark.gpu
def test_memory_is_bounded(shipped):
    """Between forward and backward lie the gradients alone."""
    given = packed(32768, 2, 64, 4, 128, 8192, k=64)
    q, weights, keys = (given[name].requires_grad_() for name in STUDENT)
    before = torch.cuda.memory_allocated()
    loss, _ = index_loss(**given)
    assert torch.cuda.memory_allocated() - before <= q.nbytes + weights.nbytes + 2 * keys.nbytes + (1 << 20)
    loss.backward()
