"""The router: its definition against plain Python, its engines and its numpy step against the definition."""

import inspect
import math

import numpy as np
import pytest
import torch
from oracle import assert_same, hold

from abyssal.kernels import balance_loss, moe_balance, moe_permutation, moe_route
from abyssal.kernels.moe_route import reference
from abyssal.kernels.moe_route.step import moe_route_step

FLOATS = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
steps = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)


@pytest.fixture
def router(monkeypatch, by_triton):
    """The Triton engine, with spans of the sort so short that a few tokens have several."""
    from abyssal.kernels.moe_route import triton

    monkeypatch.setattr(triton.launch, "SPAN", 3)
    monkeypatch.setattr(triton.launch, "STRIPS", 3)
    monkeypatch.setattr(triton.launch, "_at_once", lambda wide: 2)
    return triton


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def drawing(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def picks(draw, *shape, k):
    """k different experts each."""
    return draw(*shape).topk(k).indices


def case(n, e, k, kind, scale=1.5):
    draw = drawing(n + 2 * e)
    extra = {"biased": {"bias": draw(e)}, "hashed": {"experts": picks(draw, n, e, k=k)}, "plain": {}}[kind]
    return {"logits": 4 * draw(n, e), "top_k": k, "scale": scale, **extra}


SIZES = [(1, 1, 1), (1, 4, 1), (17, 16, 4), (9, 160, 6), (5, 7, 7), (300, 12, 2), (0, 4, 2)]
CASES = {f"{kind}-{n}x{e}k{k}": case(n, e, k, kind) for kind in ("plain", "biased", "hashed") for n, e, k in SIZES}
CASES["a table that repeats an expert"] = case(4, 5, 3, "plain") | {"experts": torch.tensor([[2, 2, 0]] * 4)}
CASES["columns first"] = case(17, 16, 4, "plain") | {"logits": 4 * drawing(0)(16, 17).T}


@pytest.mark.parametrize("name", CASES)
def test_route(engine, name, device):
    for dtype in FLOATS[engine]:
        limits = {"dlogits": {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)}  # all else is never rounded
        limits |= dict.fromkeys(("scores", "weights"), 1e-6)
        got = hold(moe_route, CASES[name], engine, dtype, kept={"bias"}, fixed={"bias"}, limits=limits, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        assert got["scores"].dtype == got["weights"].dtype == wide and got["dlogits"].dtype == dtype


def test_route_without_gradient(engine, device):
    for dtype in FLOATS[engine]:
        given = case(40, 9, 3, "plain")
        given["logits"] = 10 * given["logits"] - 30
        got = hold(
            moe_route, given, engine, dtype, fixed={"logits"}, limits={"scores": 1e-6, "weights": 1e-6}, device=device
        )
        assert "dlogits" not in got


def special_rows():
    """Ties of every kind, whole numbers, what is hidden, NaN, rows of one value."""
    draw = drawing(0)
    few = (draw(40, 33) / 2).round()
    hidden, nan = few.masked_fill(draw(40, 33) > -0.3, -math.inf), few.masked_fill(draw(40, 33) > 0.5, math.nan)
    constant = torch.tensor([0.0, -math.inf, math.nan, math.inf])[:, None].expand(4, 33)
    return torch.cat([few, hidden, nan, constant])


@pytest.mark.parametrize("bias", [None, drawing(1)(33).round(), torch.full((33,), -math.inf)], ids=["", "tied", "-inf"])
@pytest.mark.parametrize("k", [1, 5, 33])
def test_choice_whatever_ties(engine, k, bias, device):
    inputs = {"logits": special_rows(), "top_k": k, "scale": 1.0, "bias": bias}
    hold(moe_route, inputs, engine, torch.float32, fixed={"logits", "bias"}, device=device)


def test_permutation(engine, request, device):
    if engine == "triton":
        request.getfixturevalue("router")
    for n, k, e in ((1, 1, 1), (13, 3, 5), (50, 6, 160), (8, 4, 4), (333, 8, 11), (0, 2, 4)):
        experts, real = picks(drawing(n), n, e, k=k), torch.arange(n) % 3 > 0
        for ids in (experts, (experts // 2).T.contiguous().T):
            for mask in (None, real, torch.zeros_like(real)):
                got = moe_permutation(ids.to(device), e, mask if mask is None else mask.to(device), backend=engine)
                want = moe_permutation(ids, e, mask, backend="reference")
                assert all(a.dtype == b.dtype and torch.equal(a.cpu(), b) for a, b in zip(got, want)), (n, k, e, mask)


def balance_cases():
    draw, real = drawing(0), drawing(1)(4, 11) < 0.5
    real[2] = False
    inputs = {"scores": draw(4, 11, 6).abs(), "experts": picks(draw, 4, 11, 6, k=2)}
    return {
        "whole": inputs,
        "padded, one sequence all of it": inputs | {"real": real},
        "nothing real": inputs | {"real": torch.zeros_like(real)},
        "crowded": inputs | {"experts": torch.zeros(4, 11, 2, dtype=torch.int64)},
        "no tokens": {"scores": torch.zeros(2, 0, 4), "experts": torch.zeros(2, 0, 2, dtype=torch.int64)},
    }


@pytest.mark.parametrize("name", balance_cases())
def test_balance(engine, name, device, request, monkeypatch):
    if engine == "triton":
        monkeypatch.setattr(request.getfixturevalue("router").launch, "SCORES", 16)  # several blocks to a strip
    for dtype in FLOATS[engine][:-2]:
        hold(moe_balance, balance_cases()[name], engine, dtype, device=device)


def test_balance_loss_reaches_the_logits(engine, device):
    """Through the scores alone: the load is counted."""

    def loss(logits, backend):
        routing = moe_route(logits.flatten(0, 1), top_k=2, scale=1.0, backend=backend)
        scores, experts = (x.unflatten(0, logits.shape[:2]) for x in (routing.scores, routing.experts))
        return balance_loss(scores, experts, backend=backend)

    hold(loss, {"logits": drawing(0)(2, 9, 5)}, engine, torch.float32, limits={"dlogits": 5e-6}, device=device)


# the definition itself


def by_hand(row, k, bias, given):
    """One token in Python's floats: experts, weights."""
    s = [math.sqrt(math.log1p(math.exp(z))) for z in row]
    experts = given or sorted(range(len(s)), key=lambda e: (-s[e] - bias[e], e))[:k]
    return s, experts, [1.5 * s[e] / sum(s[i] for i in experts) for e in experts]


def test_a_token_by_hand():
    """The bias steers the selection and never the weights; a table's experts are weighted by their scores, in order."""
    row = [1.0, 2.0, 3.0, 4.0, 3.0]
    for bias, given, experts in (
        ([0.0] * 5, None, [3, 2, 4]),
        ([10.0, 0.0, 0.0, 0.0, 0.0], None, [0, 3, 2]),
        ([0.0] * 5, [1, 4, 0], [1, 4, 0]),
    ):
        extra = {"experts": torch.tensor([given])} if given else {"bias": torch.tensor(bias)}
        got = moe_route(torch.tensor([row]).double(), top_k=3, scale=1.5, backend="reference", **extra)
        scores, chosen, weights = by_hand(row, 3, bias, given)
        assert got.experts.tolist() == [chosen] == [experts]
        assert got.scores[0].tolist() == pytest.approx(scores) and got.weights[0].tolist() == pytest.approx(weights)


def test_score_and_slope_over_the_whole_range(engine, device):
    """Each to its own size, down to where exp z has no float32."""
    z = torch.tensor([-150.0, -104.0, -90.0, -60.0, -40.1, -39.9, -21.0, -1.0, 0.0, 1.0, 19.9, 20.1, 41.0, 1e4])
    want = [math.sqrt(math.log1p(math.exp(v)) if v < 30 else v + math.log1p(math.exp(-v))) for v in z.tolist()]
    slopes = [1 / (1 + math.exp(-v)) / (2 * s) for v, s in zip(z.tolist(), want)]
    for backend in ("reference", engine):
        leaf = z.clone().to(device).requires_grad_()
        scores = moe_route(leaf[None], top_k=1, scale=1.0, backend=backend).scores[0]
        scores.sum().backward()
        assert scores.tolist() == pytest.approx(want, rel=2e-6, abs=0)
        assert leaf.grad.tolist() == pytest.approx(slopes, rel=4e-6, abs=0)


def test_pairs_are_sorted_by_hand():
    ids = torch.tensor([[2, 0], [0, 1], [2, 0]])
    order, counts, inverse = moe_permutation(ids, 4, torch.tensor([True, False, True]), backend="reference")
    assert order.tolist() == [1, 2, 5, 3, 0, 4] and counts.tolist() == [2, 0, 2, 0]
    assert inverse.tolist() == [[4, 0], [1, 3], [5, 2]]


def test_balance_loss_is_one_at_balance_and_follows_the_score():
    scores, even = drawing(0)(1, 4, 8).abs(), torch.arange(8).view(1, 4, 2)
    assert balance_loss(scores, even, backend="reference").item() == pytest.approx(1.0, rel=1e-6)
    first = torch.tensor([1.0] + [0.0] * 7).expand(1, 4, 8).clone().requires_grad_()
    loss = balance_loss(first + 1e-3, torch.zeros(1, 4, 1, dtype=torch.int64), backend="reference")
    loss.backward()
    assert loss.item() == pytest.approx(8 * 1.001 / 1.008, rel=1e-6)
    assert (first.grad[..., 0] > 0).all() and (first.grad[..., 1:] < 0).all()
    assert balance_loss(scores, even, torch.zeros(1, 4, dtype=torch.bool), backend="reference") == 0


# one token in numpy


@steps
@pytest.mark.parametrize(("e", "k"), [(1, 1), (5, 5), (8, 2), (160, 6)])
@pytest.mark.parametrize("shift", [0, 30, -45, -95])
def test_step(e, k, shift, dtype):
    """The scores of -95 are below what float32 holds of exp; at -45 they are those of the asymptote."""
    draw = np.random.default_rng(e)
    logits, bias = ((4 * draw.standard_normal(e) + shift).astype(dtype), draw.standard_normal(e).astype(dtype))
    for options in ({}, {"bias": bias}, {"experts": draw.permutation(e)[:k]}):
        experts, weights = moe_route_step(logits, 1.5, k, **options)
        batched = {name: torch.from_numpy(x if name == "bias" else x[None]) for name, x in options.items()}
        exact = torch.from_numpy(logits[None]).double()
        want = moe_route(exact, top_k=k, scale=1.5, backend="reference", **batched)
        assert weights.dtype == dtype and experts == want.experts[0].tolist()
        assert_same("weights", torch.from_numpy(weights), want.weights[0], 3e-6 if dtype == np.float32 else 1e-13)


@steps
def test_step_of_ties_nan_and_infinities(dtype):
    inf, nan = math.inf, math.nan
    for row in ([1, 2, 1, 2, 1], [0, -inf, -inf, 0], [-inf, -inf, -inf], [1, nan, 0, 2], [nan] * 4):
        with np.errstate(invalid="ignore"):
            experts, weights = moe_route_step(np.array(row, dtype), 2.0, 3)
        want = moe_route(torch.tensor([row], dtype=torch.float64), top_k=3, scale=2.0, backend="reference")
        assert experts == want.experts[0].tolist()
        assert weights.tolist() == pytest.approx(want.weights[0].tolist(), nan_ok=True)


# what every engine promises besides


def test_a_nan_row_stays_alone(engine, device):
    z = drawing(0)(4, 6).to(device)
    clean = moe_route(z, top_k=2, scale=1.0, backend=engine)
    z[1] = math.nan
    dirty = moe_route(z, top_k=2, scale=1.0, backend=engine)
    assert dirty.experts[1].tolist() == [0, 1] and dirty.weights[1].isnan().all()
    assert all(torch.equal(a[[0, 2, 3]], b[[0, 2, 3]]) for a, b in zip(clean, dirty))


def test_a_row_has_the_same_bits_in_any_batch(engine, device):
    z = (drawing(0)(300, 32) * 2).round().to(device)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    first, again, mixed, few = (moe_route(x, top_k=6, scale=1.5, backend=engine) for x in (z, z, z[order], z[:7]))
    for a, b, c, d in zip(first, again, mixed, few):
        assert torch.equal(a, b) and torch.equal(a[order], c) and torch.equal(a[:7], d)


def test_no_gradient_to_the_bias_and_float32_for_half_logits_under_autocast(engine, device):
    z, bias = (
        drawing(0)(3, 8).to(device, torch.bfloat16).requires_grad_(),
        torch.zeros(8, device=device).requires_grad_(),
    )
    with torch.autocast(device, torch.bfloat16):
        routing = moe_route(z, top_k=2, scale=1.0, bias=bias, backend=engine)
        loss = balance_loss(routing.scores[None], routing.experts[None], backend=engine)
        loss.add(routing.weights[:, 0].sum()).backward()
    want = moe_route(z.detach().double(), top_k=2, scale=1.0, backend="reference")
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert_same("weights", routing.weights, want.weights, 1e-6)
    assert bias.grad is None and z.grad.dtype == torch.bfloat16 and z.grad.any()


def test_a_nan_in_padding_does_not_reach_the_loss(engine, device):
    scores, experts = drawing(0)(1, 5, 4).abs().to(device), picks(drawing(1), 1, 5, 4, k=2).to(device)
    real = torch.tensor([[True, True, False, True, True]], device=device)
    want = balance_loss(scores, experts, real, backend=engine)
    scores[0, 2] = math.nan
    assert torch.equal(balance_loss(scores, experts, real, backend=engine), want)


def test_an_unused_result_needs_no_gradient(engine, device):
    x, logits = torch.ones(3, device=device).requires_grad_(), drawing(0)(9, 4).to(device).requires_grad_()
    routing = moe_route(logits, top_k=2, scale=1.0, backend=engine)
    (x.sum() + 0 * routing.experts.sum()).backward()
    assert logits.grad is None
    routing.scores.sum().backward()
    assert logits.grad.all()


def test_refusals_name_the_argument():
    z, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    for message, given in {
        "top_k=5": {"top_k": 5},
        r"bias has shape \(3,\)": {"bias": torch.zeros(3)},
        "bias and experts": {"bias": torch.zeros(4), "experts": ids},
        r"experts is torch\.int32": {"experts": ids.int()},
        "logits has shape": {"logits": z[0]},
    }.items():
        with pytest.raises(ValueError, match=message):
            moe_route(**{"logits": z, "top_k": 2, "scale": 1.0} | given)
    for bad in (-1, 4):
        with pytest.raises(IndexError, match=f"experts contains {bad}: allowed is 0..3"):
            moe_route(z, top_k=2, scale=1.0, experts=torch.full_like(ids, bad))
    with pytest.raises(ValueError, match=r"real is torch\.int64"):
        moe_permutation(ids, 4, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected \\[sequences, tokens, experts\\]"):
        balance_loss(z, ids)


@pytest.mark.parametrize("function", [moe_route, moe_permutation, moe_balance], ids=lambda function: function.__name__)
def test_engines_have_the_signature_of_the_definition(function, router):
    from abyssal.kernels.moe_route import eager

    signatures = [inspect.signature(getattr(module, function.__name__)) for module in (reference, eager, router)]
    public = dict(inspect.signature(function).parameters)
    assert public.pop("backend").default is None
    assert all(dict(signature.parameters) == public for signature in signatures)


# of Triton


def test_unknown_experts_weigh_nan_and_have_no_row(router, device):
    """On a GPU ids are not looked at: that would wait for the device."""
    table = torch.tensor([[0, 1], [2, 5], [3, -1]], device=device)
    weights = router.moe_route(torch.zeros(3, 4, device=device), top_k=2, scale=1.0, experts=table).weights
    assert weights[0].tolist() == [0.5, 0.5] and weights[1:].isnan().all()
    order, counts, inverse = router.moe_permutation(torch.tensor([[0, 2], [7, 1], [-1, 0]], device=device), 3)
    assert order[:4].tolist() == [0, 5, 3, 1] and counts.tolist() == [2, 1, 1]
    assert inverse.tolist() == [[0, 3], [-1, 2], [-1, 1]]


def test_float64_is_refused_by_name(router, device):
    z = torch.zeros(2, 4, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="float64"):
        moe_route(z, top_k=1, scale=1.0)
    assert moe_route(z, top_k=1, scale=1.0, backend="auto")


@pytest.mark.parametrize("op", ["route", "hashed", "permutation", "balance"])
def test_opcheck(real_memory, router, device, op):
    z, ids = drawing(0)(9, 4).to(device).requires_grad_(), torch.arange(18, device=device).view(9, 2) % 4
    if op == "permutation":
        torch.library.opcheck(router._permutation, (ids, 4, torch.arange(9, device=device) > 3))
    elif op == "balance":
        scores, real = z.view(3, 3, 4).detach().abs().requires_grad_(), torch.arange(9, device=device).view(3, 3) > 3
        torch.library.opcheck(router._balance, (scores, ids.view(3, 3, 2), real))
    else:
        bias, given = (None, ids) if op == "hashed" else (torch.randn(4, device=device), None)
        torch.library.opcheck(router._route, (z, bias, given, 2, 1.5))


@pytest.mark.gpu
def test_thousands_of_tokens(real_memory):
    z, bias = torch.randn(5000, 256, device="cuda"), torch.randn(256, device="cuda")
    got = moe_route(z, top_k=6, scale=1.5, bias=bias)
    want = moe_route(z, top_k=6, scale=1.5, bias=bias, backend="reference")
    same = (got.experts == want.experts).all(-1)
    assert same.float().mean() > 0.999  # scores within a rounding of each other
    torch.testing.assert_close(got.weights[same], want.weights[same])
    found = [moe_permutation(got.experts, 256, backend=backend) for backend in ("triton", "reference")]
    assert all(torch.equal(a, b) for a, b in zip(*found))
