"""The experts: their definition against loops in Python, their engines and their numpy step against the definition."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same, hold, outcome, relative_rms
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import moe_experts, moe_permutation, moe_route, swiglu
from abyssal.kernels.moe_experts import eager, reference
from abyssal.kernels.moe_experts.step import moe_experts_step, swiglu_step

FLOATS = {"eager": (torch.float64, torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16)}
KEPT = {"weights"}  # as the router gives them
LEARNED = ("x", "weights", "w13", "w2")
steps = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)


@pytest.fixture
def small_blocks(by_triton, emulated, monkeypatch):
    """Blocks so small that a few tokens need several, where no GPU is; the shipped ones on a GPU."""
    from abyssal.kernels.moe_experts.triton import launch

    def use(rows=16, columns=16, inner=32, tma=False):
        block = launch.Blocks(columns, inner, 4, 2)
        table = launch.Tiles(rows, block, block, block, block, tma=tma, group=3)
        monkeypatch.setattr(launch, "tiles_for", lambda w2: table)

    if emulated:
        use()
    return use


@pytest.fixture
def engine(engine, request, monkeypatch):
    """With blocks that no expert's rows fit in."""
    monkeypatch.setattr(eager, "ROWS", 10)
    if engine == "triton":
        request.getfixturevalue("small_blocks")
    return engine


@pytest.fixture
def kernels(small_blocks):
    from abyssal.kernels.moe_experts import triton

    return triton


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def case(n, k, e, d=20, f=12, limit=10.0, experts=None, shared=False):
    """Inputs of the experts; no pre-activation comes near the limit of 10."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    chosen = torch.rand(n, e, generator=generator).topk(k).indices if experts is None else torch.tensor(experts)
    return {
        "x": draw(n, d),
        "experts": chosen.expand(n, k),
        "weights": torch.rand(n, k, generator=generator) + 0.1,
        "w13": draw(e, 2 * f, d) * d**-0.5,
        "w2": draw(e, d, f) * f**-0.5,
        "limit": limit,
        "shared": draw(d, n).T if shared else None,
    }


def whole(n, k, e, d=20, f=12, limit=2.0):
    """Pre-activations that every dtype holds exactly; a third lies beyond the limit, many on it."""
    generator = torch.Generator().manual_seed(1)
    x, w13 = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((n, d), (e, 2 * f, d)))
    return case(n, k, e, d, f, limit) | {"x": x, "w13": w13 / 4}


def on(device, inputs, dtype=None):
    """There, and of that dtype what a model would have of it."""
    there = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    wide = {"experts", "limit", "shared", *KEPT}
    return {name: t.to(dtype) if dtype and name not in wide else t for name, t in there.items()}


CASES = {
    "blocks": case(29, 3, 5, 40, 24, shared=True),
    "no clamp": case(9, 2, 3, 40, 24, limit=None),
    "one expert": case(2, 1, 1),
    "one token": case(1, 4, 16, shared=True),
    "three tokens": case(3, 2, 5, shared=True),
    "all experts": case(6, 5, 5, 18, 7),
    "160 experts": case(4, 6, 160, 16, 8),
    "more rows than one program sums shares of": case(87, 3, 3, 16, 8),
    "one expert takes all": case(50, 1, 4, 16, 8, experts=[2]),
    "the same two": case(37, 2, 5, 16, 8, experts=[1, 3]),
    "an expert twice": case(9, 3, 4, 16, 8, experts=[1, 3, 1]),
    "clamp": whole(60, 2, 4),
    "clamp, odd widths": whole(24, 2, 4, 18, 7, limit=1.0),
    "no tokens": case(0, 2, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_experts(engine, name, device):
    inputs = CASES[name]
    idle = torch.ones(len(inputs["w2"]), dtype=torch.bool).scatter_(0, inputs["experts"].flatten(), False)
    for dtype in FLOATS[engine]:
        got = hold(moe_experts, inputs, engine, dtype, kept=KEPT, device=device)
        assert {got[name].dtype for name in ("out", "dx", "dw13", "dw2")} == {dtype}
        assert got["dweights"].dtype == torch.promote_types(dtype, torch.float32)
        assert not got["dw13"][idle].any() and not got["dw2"][idle].any()
        hold(moe_experts, inputs, engine, dtype, kept=KEPT, fixed={"shared", *LEARNED}, device=device)


def test_float16(engine, device):
    hold(moe_experts, CASES["no clamp"], engine, torch.float16, kept=KEPT, limits={"dweights": 6e-3}, device=device)
    hold(swiglu, SWIGLU["at the limit"], engine, torch.float16, device=device)


def swiglu_case(h, limit=None, weight=None):
    return {"h": h, "limit": limit, "weight": weight}


def edges(*values):
    """Every pair of gate and up, three rows of them, at and around a limit of 2."""
    near = torch.tensor([-2.0, math.nextafter(-2.0, -3.0), -1.0, 0.0, 1.0, 2.0, math.nextafter(2.0, 3.0), *values])
    return torch.cartesian_prod(near, near).T.reshape(1, -1).repeat(3, 1)


DRAW = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2))
SWIGLU = {
    "at the limit": swiglu_case(edges(-9.0, 2.5, 9.0), 2.0),
    "at the limit, weighted": swiglu_case(edges(-9.0, 2.5, 9.0), 2.0, torch.tensor([0.7, -1.5, 0.0])),
    "no limit": swiglu_case(edges(-9.0, 9.0), None, torch.tensor([0.7, -1.5, 0.0])),
    "beyond exp": swiglu_case(edges(-1e4, 1e4), 2.0),
    "many rows": swiglu_case(DRAW(40, 120), 1.0, DRAW(40)),
    "wide rows": swiglu_case(DRAW(3, 2060), 1.0, DRAW(3)),
    "any leading shape, columns first": swiglu_case(DRAW(10, 2, 5).permute(1, 2, 0), 1.0, DRAW(2, 5)),
    "one row": swiglu_case(DRAW(8), 1.0),
    "no rows": swiglu_case(torch.zeros(0, 6), 10.0),
}


@pytest.mark.parametrize("name", SWIGLU)
def test_swiglu(engine, name, device):
    for dtype in FLOATS[engine]:
        got = hold(swiglu, SWIGLU[name], engine, dtype, kept={"weight"}, device=device)
        assert got["out"].dtype == got["dh"].dtype == dtype
        hold(swiglu, SWIGLU[name], engine, dtype, fixed={"h", "weight"}, device=device)


# the definition itself


def test_two_tokens_by_hand():
    inputs = case(2, 2, 3, 3, 2, limit=0.5, shared=True)
    x, experts, weights, w13, w2, shared = (inputs[name].tolist() for name in inputs if name != "limit")
    want = [list(row) for row in shared]
    for n, slot, i in [(n, slot, i) for n in range(2) for slot in range(2) for i in range(2)]:
        e = experts[n][slot]
        g, u = (sum(w * v for w, v in zip(w13[e][row], x[n])) for row in (i, 2 + i))
        g, u = min(g, 0.5), max(min(u, 0.5), -0.5)
        a = g / (1 + math.exp(-g)) * u * weights[n][slot]
        for c in range(3):
            want[n][c] += w2[e][c][i] * a
    got = outcome(moe_experts, inputs, backend="reference", dtype=torch.float64)["out"]
    assert got.tolist() == [pytest.approx(row, rel=1e-6) for row in want]


def test_the_clamp_has_a_slope_on_its_bounds_and_none_outside(engine, device):
    """Gate from above alone, up from both sides. By hand: da/dg = u silu'(g), da/du = silu(g)."""
    gate, up = [2.0, 2.0, 2.5, -9.0, 1.0, 1.0], [2.0, -2.0, 1.0, 1.0, 2.5, -2.5]
    sigmoid = [1 / (1 + math.exp(-min(g, 2.0))) for g in gate]
    dg = [max(min(u, 2.0), -2.0) * s * (1 + g * (1 - s)) if g <= 2 else 0.0 for g, u, s in zip(gate, up, sigmoid)]
    du = [min(g, 2.0) * s if abs(u) <= 2 else 0.0 for g, u, s in zip(gate, up, sigmoid)]
    for backend in ("reference", engine):
        h = torch.tensor([gate + up], device=device).requires_grad_()
        swiglu(h, 2.0, backend=backend).sum().backward()
        assert h.grad[0].tolist() == pytest.approx(dg + du, rel=1e-5, abs=0)


# one token in numpy


@steps
@pytest.mark.parametrize("limit", [None, 10.0, 0.5])
@pytest.mark.parametrize("chosen", [[0], [2, 0], [3, 1, 3, 2]], ids=len)
def test_step(chosen, limit, dtype):
    """Pre-activations of several units, so that 0.5 is reached on all sides; an expert may come twice."""
    inputs = case(1, len(chosen), 4, 7, 3, limit, experts=chosen)
    x, _, weights, w13, w2 = (t.numpy().astype(dtype) for name, t in inputs.items() if name not in ("limit", "shared"))
    got = moe_experts_step(3 * x[0], chosen, weights[0], 3 * w13, w2, limit)
    wide = inputs | {"x": 3 * torch.from_numpy(x), "w13": 3 * torch.from_numpy(w13)}
    want = outcome(moe_experts, wide, backend="reference", dtype=torch.float64)["out"][0]
    assert got.dtype == dtype
    assert_same("out", torch.from_numpy(got), want, 3e-6 if dtype == np.float32 else 1e-13)


@steps
@pytest.mark.parametrize("limit", [None, 1.0])
def test_swiglu_step(limit, dtype):
    """Of a row, and of rows; at the limit, beyond it, and where exp overflows."""
    sides = np.array([-1000, -95, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 95], dtype)
    h = np.concatenate([x.flatten() for x in np.meshgrid(sides, sides)])
    for shaped in (h.copy(), h.reshape(5, -1).copy()):
        with np.errstate(over="ignore"):
            got = swiglu_step(shaped, limit)
        want = swiglu(torch.from_numpy(shaped).double(), limit, backend="reference")
        assert_same("swiglu", torch.from_numpy(got), want, 3e-6 if dtype == np.float32 else 1e-13)
        assert np.array_equal(shaped.flatten(), h)


# what every engine promises besides


def run(engine, inputs, dout=None, **options):
    """Output and gradients at fresh leaves."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in LEARNED}
    out = moe_experts(**inputs | leaves, backend=engine, **options)
    out.backward(torch.ones_like(out) if dout is None else dout)
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def same(got, want, names=None, rows=slice(None), of=slice(None)):
    for name in names or want:
        assert torch.equal(got[name][rows], want[name][of]), name


BY_TOKEN, BY_EXPERT = ("out", "dx", "dweights"), ("dw13", "dw2")


def test_the_weight_multiplies_before_w2(engine, device):
    """In bf16 the order shows: the result is the emulation of one order, and not that of the other."""
    inputs = on(device, case(24, 2, 4, 32, 16), torch.bfloat16)
    got = moe_experts(**inputs, backend=engine).float()
    x, w13, w2 = (inputs[name].float() for name in ("x", "w13", "w2"))
    g, u = torch.einsum("nd,nkfd->nkf", x, w13[inputs["experts"]]).bfloat16().float().chunk(2, -1)

    def emulate(first, then):
        a = (F.silu(g) * u * first).bfloat16().float()
        y = torch.einsum("nkf,nkdf->nkd", a, w2[inputs["experts"]]).bfloat16().float()
        return (y * then).sum(1).bfloat16().float()

    weight = inputs["weights"][..., None]
    assert (got - emulate(weight, 1)).norm() < 0.2 * (got - emulate(1, weight)).norm()


@pytest.mark.parametrize("n", [1, 5])
def test_the_sum_with_the_shared_expert_is_rounded_once(engine, device, n):
    """2^-8 + 2^-17 is more than half of bfloat16's step at 1; rounded on its own, it would be half, and lost."""
    inputs = {
        "x": torch.ones(n, 1),
        "experts": torch.tensor([[0, 1]]).expand(n, 2),
        "weights": torch.tensor([[2**-8, 2**-17]]).expand(n, 2) / 20,
        "w13": torch.tensor([[20.0], [1.0]]).expand(2, 2, 1),
        "w2": torch.ones(2, 1, 1),
        "limit": None,
        "shared": torch.ones(n, 1).bfloat16(),
    }
    assert (moe_experts(**on(device, inputs, torch.bfloat16), backend=engine) == 1 + 2**-7).all()


def test_autocast_casts_like_a_linear_layer(engine, device):
    inputs = on(device, case(30, 2, 4, 16, 8))
    half = {name: inputs[name].bfloat16() for name in ("x", "w13", "w2")}
    want = moe_experts(**inputs | half, backend=engine)
    with torch.autocast(device, torch.bfloat16):
        got = run(engine, inputs)
        twice = moe_experts(**on("cpu", inputs, torch.float64), backend="eager")
        defined = moe_experts(**inputs, backend="reference")
    assert torch.equal(got.pop("out"), want) and all(t.dtype == torch.float32 and t.any() for t in got.values())
    assert twice.dtype == torch.float64 and defined.dtype == want.dtype == torch.bfloat16
    assert relative_rms(defined, want) < 1e-2


def test_strided_inputs_and_an_expanded_gradient(engine, device):
    inputs = on(device, case(20, 2, 4, 16, 8))
    x, weights = inputs["x"], inputs["weights"]
    strided = inputs | {
        "x": torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
        "experts": inputs["experts"].T.contiguous().T,
        "weights": torch.cat([torch.full_like(weights[:1], math.nan), weights])[1:].T.contiguous().T,
        "w13": inputs["w13"].mT.contiguous().mT,
        "w2": inputs["w2"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    assert not any(strided[name].is_contiguous() for name in ("experts", *LEARNED))
    got, want = run(engine, strided, torch.ones((), device=device).expand(20, 16)), run(engine, inputs)
    for name in want:
        assert_same(name, got[name], want[name], 0 if engine == "triton" else 2e-6)


@pytest.mark.parametrize("needed", LEARNED)
def test_each_gradient_alone(engine, device, needed):
    inputs = on(device, case(9, 2, 4, 16, 8))
    leaf = inputs[needed].clone().requires_grad_()
    moe_experts(**inputs | {needed: leaf}, backend=engine).sum().backward()
    assert torch.equal(leaf.grad, run(engine, inputs)[f"d{needed}"])


def test_a_nan_token_stays_alone(engine, device):
    inputs = on(device, case(40, 2, 8, 16, 8))
    clean = run(engine, inputs)
    inputs["x"][7] = math.nan
    dirty, others = run(engine, inputs), [n for n in range(40) if n != 7]
    same(dirty, clean, BY_TOKEN, others, others)
    assert all(dirty[name][7].isnan().all() for name in BY_TOKEN)
    elsewhere = [e for e in range(8) if e not in inputs["experts"][7]]
    same(dirty, clean, BY_EXPERT, elsewhere, elsewhere)


def test_nan_weights_of_other_experts_stay_out(engine, device):
    """The widths fit no block: what lies behind an expert's last row must not be read as its own."""
    inputs = on(device, case(9, 2, 5, 18, 7))
    inputs["experts"] = inputs["experts"] // 2 * 2  # 0, 2, 4
    clean = run(engine, inputs)
    inputs["w13"][1::2], inputs["w2"][1::2] = math.nan, math.nan
    same(run(engine, inputs), clean)


def test_swiglu_keeps_nan(engine, device):
    h = torch.tensor([[math.nan, 1.0], [1.0, math.nan], [1.0, 1.0]], device=device).requires_grad_()
    out = swiglu(h, 2.0, backend=engine)
    out.sum().backward()
    assert out[:, 0].isnan().tolist() == h.grad.isnan().any(1).tolist() == [True, True, False]


def test_a_token_has_the_same_bits_in_any_batch(engine, device):
    """Whole numbers keep the sums exact in any order, so that on a CPU the matrix library has no say."""
    inputs = on(device, whole(40, 2, 3, 16, 8))
    generator = torch.Generator().manual_seed(0)
    if device == "cpu":
        inputs["w2"], inputs["weights"] = (inputs["w2"] * 2).round(), (inputs["weights"] * 4).round() / 4
        inputs["w13"] = torch.where(inputs["w13"] > 0, 0.0, 1.0) * 40  # silu is 0 or its argument
        inputs["limit"] = None
    dout = torch.randint(-2, 3, (40, 16), generator=generator).to(inputs["x"])
    order = torch.randperm(40, generator=generator).to(device)
    full, again = run(engine, inputs, dout), run(engine, inputs, dout)
    same(again, full)
    for rows in (order, slice(7)):
        part = {name: inputs[name][rows] for name in ("x", "experts", "weights")}
        same(run(engine, inputs | part, dout[rows]), full, BY_TOKEN, of=rows)


def test_backward_keeps_inputs_pre_activations_and_routing(engine, device):
    inputs, kept = on(device, case(16, 4, 8, 16, 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        moe_experts(**inputs | {name: inputs[name].requires_grad_() for name in LEARNED}, backend=engine)
    routing = []  # of eager's no tensors
    if engine == "triton":  # order, inverse, tiles, offsets
        from abyssal.kernels.moe_experts.triton import launch

        routing = [(64,), (16, 4), (64 // launch.tiles_for(inputs["w2"]).rows + 8, 2), (9,)]
    assert sorted(kept) == sorted([*(inputs[name].shape for name in LEARNED), (64, 16), *routing])


def layer(x, logits, w13, w2, table=None, engine="triton"):
    routing = moe_route(logits * 1.1, top_k=2, scale=1.5, experts=table, backend=engine)
    chosen, weights = routing.experts, routing.weights
    out = moe_experts(x.sin(), chosen, weights, w13, w2, limit=1.0, shared=x.cos(), backend=engine)
    counts = moe_permutation(chosen, len(w13), backend=engine).counts
    return out.cos().sum() + (routing.scores * counts).sum() + swiglu(out, 1.0, backend=engine).sum()


@pytest.fixture
def layer_inputs(device):
    inputs, logits = case(9, 2, 4, 16, 8), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    return [t.to(device).requires_grad_() for t in (inputs["x"], logits, inputs["w13"], inputs["w2"])]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_and_backward_twice_adds_up(engine, layer_inputs, reentrant):
    want = torch.autograd.grad(layer(*layer_inputs, engine=engine), layer_inputs)
    checkpoint(layer, *layer_inputs, None, engine, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(want, layer_inputs))
    layer(*layer_inputs, engine=engine).backward()
    assert all(torch.equal(2 * a, t.grad) for a, t in zip(want, layer_inputs))


def test_refusals_name_the_argument():
    inputs = case(5, 2, 4)
    x, experts, weights, w13, w2 = (inputs[name] for name in ("x", "experts", "weights", "w13", "w2"))
    with pytest.raises(IndexError, match=r"experts contains 4: allowed is 0\.\.3"):
        moe_experts(**inputs | {"experts": torch.full_like(experts, 4)})
    for message, bad in {
        "x has shape": {"x": x[0]},
        "experts is": {"experts": experts.int()},
        "weights has shape": {"weights": weights[:, :1]},
        "w13 has shape": {"w13": w13[..., 1:]},
        "w2 has shape": {"w2": w2[..., 1:]},
        "they must agree": {"x": x.bfloat16()},
        r"shared has shape \(3, 20\): expected \(5, 20\)": {"shared": torch.zeros(3, 20)},
    }.items():
        with pytest.raises(ValueError, match=message):
            moe_experts(**inputs | bad)
    with pytest.raises(ValueError, match=r"h has shape \(2, 3\)"):
        swiglu(torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\): expected \(2,\)"):
        swiglu(torch.zeros(2, 4), 1.0, torch.zeros(3))


@pytest.mark.parametrize("function", [moe_experts, swiglu], ids=lambda function: function.__name__)
def test_engines_have_the_signature_of_the_definition(function, kernels):
    signatures = [inspect.signature(getattr(module, function.__name__)) for module in (reference, eager, kernels)]
    public = dict(inspect.signature(function).parameters)
    assert public.pop("backend").default is None
    assert all(dict(signature.parameters) == public for signature in signatures)


# of eager


def test_blocks_hold_every_row_once_and_are_small(monkeypatch):
    monkeypatch.setattr(eager, "ROWS", 10)
    counts = [3, 0, 4, 5, 31, 0, 1, 10, 2]
    blocks = list(eager._blocks(counts))
    assert [b.rows.start for b in blocks] == [0, *(b.rows.stop for b in blocks[:-1])] and blocks[-1].rows.stop == 56
    assert all(sum(b.sizes) == b.rows.stop - b.rows.start <= 10 for b in blocks)
    seen = [0] * len(counts)
    for expert, size in ((e, n) for b in blocks for e, n in zip(b.experts, b.sizes)):
        seen[expert] += size
    assert seen == counts and list(eager._blocks([0, 0])) == []


@pytest.mark.parametrize("rows", [1, 5, 1024])
def test_blocks_of_any_size_agree(rows, monkeypatch):
    monkeypatch.setattr(eager, "ROWS", rows)
    for dtype in (torch.float64, torch.bfloat16):
        hold(moe_experts, CASES["blocks"], "eager", dtype, kept=KEPT)


# of Triton


def test_tiles_that_hold_several_blocks_of_rows_and_columns(small_blocks, device, emulated):
    if emulated:
        small_blocks(rows=128, columns=64)
    hold(moe_experts, case(87, 3, 3, 16, 40), "triton", torch.float32, kept=KEPT, device=device)


def test_tiles_cover_every_row_once(kernels, device):
    for counts in ([3, 0, 17, 16, 0], [0, 0, 0], [40], [1] * 33):
        plan = kernels.launch.schedule(torch.tensor(counts, device=device), sum(counts), 16)
        rows = []
        for expert, first in plan.tiles.tolist():
            if expert >= 0:
                end = int(plan.offsets[expert + 1])
                assert sum(counts[:expert]) <= first < end == sum(counts[: expert + 1])
                rows += range(first, min(first + 16, end))
        assert rows == list(range(sum(counts))) and plan.offsets.tolist()[0] == 0


@pytest.mark.parametrize("shape", [(40, 24), (18, 7)], ids=["aligned", "not-aligned"])
def test_descriptors_change_nothing(small_blocks, device, emulated, shape):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need Hopper")
    inputs, found = on(device, case(20, 2, 4, *shape), torch.bfloat16), []
    for tma in (False, True):
        small_blocks(tma=tma, columns=16 if emulated else 32)
        found.append(run("triton", inputs))
    same(*found)


def test_slots_are_summed_in_order_and_in_float32(kernels, device):
    """1e8 + 1 - 1e8 is 0 in float32 in this order, and 1 in others; eight times 2^-9 is lost in bfloat16."""
    rows = torch.tensor([1.0, 1e8, -1e8], device=device)[:, None].expand(3, 8).contiguous()
    inverse = torch.tensor([[1, 0, 2], [1, 2, 0], [2, 1, 0]], device=device)
    assert kernels.launch.combine(rows, inverse)[:, 0].tolist() == [0.0, 1.0, 1.0]
    rows = torch.tensor([1.0, *[2**-9] * 8], device=device).bfloat16()[:, None].expand(9, 8).contiguous()
    assert kernels.launch.combine(rows, torch.arange(9, device=device)[None])[0, 0] == 1 + 2**-6


def test_an_unknown_expert_gives_nan(kernels, device):
    inputs = on(device, case(9, 2, 4, 16, 8))
    clean = kernels.moe_experts(**inputs)
    inputs["experts"] = inputs["experts"].clone()
    inputs["experts"][2, 1], inputs["experts"][5, 0] = 4, -1
    out, known = kernels.moe_experts(**inputs), [n for n in range(9) if n not in (2, 5)]
    assert out[[2, 5]].isnan().all() and torch.equal(out[known], clean[known])


def test_without_gradients_no_pre_activations(kernels, device, monkeypatch):
    kept, forward = [], kernels.launch.forward
    monkeypatch.setattr(kernels.launch, "forward", lambda *a, **o: kept.append(o["keep"]) or forward(*a, **o))
    inputs = on(device, case(5, 2, 4, 16, 8))
    moe_experts(**inputs)
    inputs["x"].requires_grad_()
    with torch.no_grad():
        moe_experts(**inputs)
    moe_experts(**inputs)
    assert kept == [False, False, True]


@pytest.mark.parametrize("op", ["experts", "shared", "swiglu"])
def test_opcheck(real_memory, kernels, layer_inputs, device, op):
    (x, _, w13, w2), ids = layer_inputs, torch.arange(18, device=device).view(9, 2) % 4
    if op == "swiglu":
        torch.library.opcheck(kernels._swiglu, (torch.randn(6, 8, device=device).requires_grad_(), None, None))
        return
    limit, shared = (None, torch.randn_like(x).requires_grad_()) if op == "shared" else (1.0, None)
    weights = torch.rand(9, 2, device=device).requires_grad_()
    operands = (x, weights, w13, w2, *moe_permutation(ids, 4), limit, True, shared)
    torch.library.opcheck(kernels._experts, operands)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("hashed", [False, True])
def test_compiles_without_a_graph_break(real_memory, small_blocks, layer_inputs, device, dynamic, hashed):
    table = torch.arange(18, device=device).view(9, 2) % 4 if hashed else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*layer_inputs, table), layer_inputs) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


# of Triton on a GPU, at sizes with many full tiles

SIZES = {"n": 2000, "k": 8, "e": 64, "d": 1024, "f": 512}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("limit", [1.0, None])
def test_real_sizes(real_memory, dtype, limit):
    """Within twice of what eager is away from the definition, which near the limit is another side of it."""
    inputs = on("cuda", case(**SIZES, limit=limit), dtype)
    dout = torch.randn_like(inputs["x"])
    exact = on("cuda", inputs, torch.float64) | {"weights": inputs["weights"].double()}
    got, plain = (run(engine, inputs, dout) for engine in ("triton", "eager"))
    for name, want in run("reference", exact, dout.double()).items():
        a, b = relative_rms(got[name], want), relative_rms(plain[name], want)
        assert a <= 2 * b + 1e-6, f"{name}: {a:.2e}, eager {b:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_on_each_run_and_in_any_batch(real_memory, dtype):
    inputs = on("cuda", case(**SIZES, limit=1.0), dtype)
    dout = torch.randn_like(inputs["x"])
    full = run("triton", inputs, dout)
    same(run("triton", inputs, dout), full)
    for rows in (torch.randperm(2000, device="cuda"), slice(37)):
        part = {name: inputs[name][rows] for name in ("x", "experts", "weights")}
        same(run("triton", inputs | part, dout[rows]), full, BY_TOKEN, of=rows)


@pytest.mark.gpu
def test_a_cuda_graph_replays_other_routings(real_memory):
    inputs, logits = on("cuda", case(**SIZES, limit=1.0), torch.bfloat16), torch.randn(2000, 64, device="cuda")

    def routed():
        routing = moe_route(logits, top_k=8, scale=1.5)
        return moe_experts(**inputs | {"experts": routing.experts, "weights": routing.weights})

    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()):
            routed()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = routed()
        for crowded in (False, True):
            logits.copy_(torch.randn_like(logits))
            if crowded:
                logits[:, 8:] -= 50
            graph.replay()
            assert torch.equal(out, routed())


@pytest.mark.gpu
def test_nothing_waits_for_the_device(real_memory):
    inputs, logits = on("cuda", case(**SIZES)), torch.randn(2000, 64, device="cuda", requires_grad=True)
    leaves = {name: inputs[name].requires_grad_() for name in ("x", "w13", "w2")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = moe_route(logits, top_k=8, scale=1.5)
        moe_experts(**inputs | leaves | {"experts": routing.experts, "weights": routing.weights}).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_kept_for_the_backward_pass_is_the_formula(real_memory):
    inputs = on("cuda", case(**SIZES), torch.bfloat16)
    leaves = {name: inputs[name].requires_grad_() for name in LEARNED}
    n, k, f = (SIZES[key] for key in "nkf")
    before = torch.cuda.memory_allocated()
    out = moe_experts(**inputs | leaves)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    assert kept <= 4 * n * k * f + 16 * n * k + 100_000  # h, order and inverse; x and the weights are the caller's
