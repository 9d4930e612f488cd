"""The exact linear layer: each engine against the definition, and that its numbers are those of float32.

n rows · d channels in · o channels out
"""

import importlib.util

import pytest
import torch
from oracle import distance, hold
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import exact_linear

f64, f32, bf16, fp16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SINGLE = dict.fromkeys(("out", "dweight"), 2e-06)  # whatever x is kept in


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """In the interpreter a few rows are many, and take several programs."""
    from abyssal.kernels.exact_linear.triton import launch

    if emulated:
        monkeypatch.setattr(launch, "FEW", 2)
        monkeypatch.setattr(launch, "LEAST", 1)
        monkeypatch.setattr(launch, "BLOCK", 64)


@pytest.fixture
def where(engine, device):
    return device if engine == "triton" else "cpu"


def layer(*shape, o, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(s, generator=generator, dtype=f64) for s in (shape, (o, shape[-1])))
    return {"x": x, "weight": weight * 0.1}


SHAPES = [((3, 5, 24), 16), ((1, 24), 16), ((24,), 16), ((7, 13), 5), ((2, 33, 1), 1), ((4, 0, 8), 3), ((70, 8), 0)]


@pytest.mark.parametrize("dtype", [f64, f32, bf16, fp16], ids=str)
@pytest.mark.parametrize("shape, o", SHAPES)
def test_holds_the_definition(engine, where, dtype, shape, o):
    if engine == "triton" and dtype == f64:
        pytest.skip("Triton does not compute float64")
    hold(exact_linear, layer(*shape, o=o), engine, dtype, kept=["weight"], limits=SINGLE, device=where)


@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_a_weight_of_half_precision(engine, where, dtype):
    found = hold(exact_linear, layer(9, 24, o=16), engine, dtype, limits={"out": 2e-6}, device=where)
    assert found["out"].dtype == f32 and found["dweight"].dtype == found["dx"].dtype == dtype


@pytest.mark.parametrize("at", ["x", "weight"])
def test_what_is_not_finite_gives_what_is_not(engine, where, at):
    given = layer(9, 24, o=16)
    given[at][0, 0] = torch.inf
    x, weight = (given[name].to(dtype).to(where).requires_grad_() for name, dtype in (("x", bf16), ("weight", f32)))
    y = exact_linear(x, weight, backend=engine)
    y.sum().backward()
    spoiled = torch.zeros(9, 16, dtype=torch.bool)
    spoiled[0] = spoiled[0] | (at == "x")
    spoiled[:, 0] |= at == "weight"
    assert torch.equal(y.isfinite().cpu(), ~spoiled)
    assert torch.equal(x.grad.isfinite().all(0).cpu(), torch.arange(24) > (0 if at == "weight" else -1))
    assert torch.equal(weight.grad.isfinite().all(0).cpu(), torch.arange(24) > (0 if at == "x" else -1))


def test_is_not_rounded_by_autocast(engine, where):
    given = {name: x.float().to(where) for name, x in layer(9, 24, o=16).items()}
    want = exact_linear(given["x"].bfloat16(), given["weight"], backend="reference")
    with torch.autocast(where, bf16):
        got = exact_linear(given["x"].bfloat16(), given["weight"], backend=engine)
        inner = exact_linear(given["x"], given["weight"], backend=engine)
    assert distance(got, want) < 2e-6 and got.dtype == inner.dtype == f32
    assert distance(inner, exact_linear(given["x"], given["weight"], backend="reference")) < 2e-6


def test_a_weight_in_bfloat16_would_be_seen():
    given = layer(9, 24, o=16)
    x, weight = given["x"].bfloat16(), given["weight"]
    want = exact_linear(x.double(), weight, backend="reference")
    assert distance(exact_linear(x, weight.bfloat16(), backend="eager"), want) > 100 * SINGLE["out"]


def test_dx_is_rounded_once(engine, where):
    """Of one part less of the gradient or of the weight a third of the numbers would be another."""
    given = layer(200, 24, o=96)
    x, weight = given["x"].bfloat16().to(where).requires_grad_(), given["weight"].float()
    dy = torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    exact_linear(x, weight.to(where), backend=engine).backward(dy.to(where))
    want = (dy.double() @ weight.double()).bfloat16()
    assert (x.grad.cpu() == want).double().mean() > 0.99


def test_few_rows_are_as_exact(by_triton, device):
    """Fewer than it pays to split a weight for."""
    given = layer(40, 24, o=16)
    x, weight = given["x"].bfloat16().to(device), given["weight"].float().to(device)
    whole, single = exact_linear(x, weight), torch.cat([exact_linear(row, weight) for row in x.split(1)])
    assert distance(single, whole.cpu()) < 2e-6


@pytest.mark.parametrize(
    "x, weight, wanted",
    [
        ((3, 4), (5, 6), r"x: got torch.float32 \[3, 4\], allowed is a float tensor \[..., 6\]"),
        ((), (5, 6), r"x: got torch.float32 \[\]"),
        ((3, 6), (6,), r"weight: got torch.float32 \[6\], allowed is a float tensor \[o, d\]"),
    ],
)
def test_what_does_not_fit_is_named(x, weight, wanted):
    with pytest.raises(ValueError, match=wanted):
        exact_linear(torch.ones(x), torch.ones(weight))


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"weight: got torch.int64"):
        exact_linear(torch.ones(3, 6), torch.ones(5, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: got torch.int64"):
        exact_linear(torch.ones(3, 6, dtype=torch.int64), torch.ones(5, 6))


# what is split --------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(by_triton, device):
    from abyssal.kernels.exact_linear.triton import launch

    return lambda x, beside=False: launch._parts(x.to(device), beside).cpu()


@needs_triton
def test_parts_sum_up_to_every_bit(split):
    bits = torch.randint(1, 1 << 23, (5, 37), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    powers = torch.arange(5, dtype=torch.int32)[:, None] * 50 + 20  # exponents from 2^-107 to 2^93
    x = (bits + (powers << 23)).view(f32)
    parts = split(torch.cat([x, -x]))
    assert torch.equal(parts[0], parts[2]) and torch.equal(parts[0], torch.cat([x, -x]).bfloat16())
    assert torch.equal(parts[[0, 1, 3]].double().sum(0), torch.cat([x, -x]).double())


@needs_triton
def test_parts_lie_below_or_beside_each_other(split):
    x = torch.randn(9, 11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(split(x)[[0, 2, 1, 3]].transpose(0, 1), split(x, beside=True))
    assert torch.equal(split(x.T), split(x.T.contiguous()))


@needs_triton
def test_what_is_not_finite_stays_what_it_is(split):
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3.4028e38, 0.0, -0.0, 1e-40]])
    first, second, again, third = split(x)
    want = x.bfloat16()
    want[0, 3] = torch.finfo(bf16).max
    torch.testing.assert_close(first, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(again.isnan(), first.isnan()) and not second[:, :3].any() and not third[:, :3].any()
    assert torch.equal((first.double() + second.double() + third.double())[:, 3:6], x.double()[:, 3:6])


@needs_triton
def test_many_outputs_few_rows_and_little_work_are_left_to_torch(by_triton, device, monkeypatch):
    from abyssal.kernels.exact_linear.triton import launch

    def fail(*_, **options):
        raise AssertionError

    monkeypatch.setattr(launch, "_parts", fail)
    monkeypatch.setattr(launch, "MOST", 16)
    monkeypatch.setattr(launch, "LEAST", 9 * 8 * 16)
    x, weight = torch.ones(9, 8, dtype=bf16, device=device), torch.ones(17, 8, device=device)
    assert exact_linear(x, weight).unique().tolist() == exact_linear(x[:1], weight[:3]).unique().tolist() == [8.0]
    assert exact_linear(x, weight[:15]).unique().tolist() == [8.0]
    with pytest.raises(AssertionError):
        exact_linear(x, weight[:16])


# the operators --------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(by_triton, device):
    given = layer(2, 6, 24, o=16)
    return given["x"].bfloat16().to(device).requires_grad_(), given["weight"].float().to(device).requires_grad_()


def twice(x, weight):
    return exact_linear(exact_linear(x, weight).bfloat16() * 2, weight.T).sin().sum()


@needs_triton
def test_opcheck(arguments):
    from abyssal.kernels.exact_linear import triton

    torch.library.opcheck(triton._exact_linear, arguments, test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(triton._exact_linear, [x.detach() for x in arguments], test_utils="test_faketensor")


@needs_triton
def test_compiles_without_a_graph_break(arguments):
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(*arguments), arguments) for f in (twice, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_triton
def test_checkpointing_changes_nothing(arguments):
    want = torch.autograd.grad(twice(*arguments), arguments)
    checkpoint(twice, *arguments, use_reentrant=False).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, arguments))


@needs_triton
@pytest.mark.parametrize("of", ["x", "weight"])
def test_only_the_gradient_that_is_asked_for(arguments, of):
    x, weight = arguments
    (x if of == "weight" else weight).requires_grad_(False)
    exact_linear(x, weight).sum().backward()
    found, other = (x, weight) if of == "x" else (weight, x)
    assert found.grad is not None and other.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("n, d, o", [(4096, 4096, 1024), (4100, 512, 24), (100, 70, 7)])
def test_real_sizes(n, d, o):
    hold(exact_linear, layer(n, d, o=o), "triton", bf16, kept=["weight"], limits=SINGLE, device="cuda")
