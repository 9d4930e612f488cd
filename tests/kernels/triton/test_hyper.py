"""mHC in Triton against the float64 oracle, stream by stream, and the eager.

Axes: t tokens · n streams · d width.
"""

import inspect

import pytest
import torch
from hyper_cases import EPS, NAMES, check, gradients, inputs, oracle_sinkhorn, oracle_sublayer, rms_error, sublayer
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import hyper_coefficients, hyper_collapse, hyper_head_weights, hyper_read, hyper_recombine
from abyssal.kernels.hyper import eager, triton
from abyssal.kernels.hyper.triton import launch as triton_launch
from abyssal.kernels.hyper.triton import tiles

PUBLIC = [hyper_coefficients, hyper_collapse, hyper_head_weights, hyper_read, hyper_recombine]


@pytest.fixture(autouse=True)
def small_blocks(emulated, monkeypatch):
    """In the interpreter 16 tokens and a few columns make a tile, so that a handful of tokens takes several."""
    if emulated:
        blocks = tiles.Blocks(16, 32, 4, 2)
        monkeypatch.setattr(triton_launch, "tiles_for", lambda rows: tiles.Tiles(blocks, blocks))
        monkeypatch.setattr(triton_launch, "panel", lambda n, d: (32, 1))
        for name, value in {"SPLIT": 64, "TOKENS": 8, "GROUPS": 2, "STEPS": 1, "PARTS": 2}.items():
            monkeypatch.setattr(triton_launch, name, value)


@pytest.fixture
def make(device):
    """Inputs as leaves on the device; the oracle's own in float64."""

    def leaves(*arguments, **options):
        tensors = inputs(*arguments, **options)
        exact = [x.detach().double().to(device).requires_grad_() for x in tensors]
        return [x.to(device).requires_grad_() for x in tensors], exact

    return leaves


def compare(got, arguments, want, exact, outputs, grads):
    for name in want:
        check(name, got[name], want[name], outputs)
    for name, mine, theirs, argument in zip(NAMES, gradients(got, arguments), gradients(want, exact), arguments):
        assert mine.dtype == argument.dtype
        check(f"gradient of {name}", mine, theirs, grads)


@pytest.mark.parametrize("n, lead, d", [(1, (5,), 7), (2, (3,), 70), (3, (2, 9), 24), (4, (35,), 40), (8, (2,), 9)])
def test_forward_and_every_gradient_follow_the_oracle(make, n, lead, d):
    arguments, exact = make(lead, n, d, torch.float32)
    compare(sublayer(*arguments, at_once=True), arguments, oracle_sublayer(*exact), exact, 2e-6, 5e-6)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_other_numbers_of_streams(make, n):
    arguments, exact = make((3,), n, 8, torch.float32)
    got = sublayer(*arguments, at_once=True, iterations=3)
    compare(got, arguments, oracle_sublayer(*exact, iterations=3), exact, 2e-6, 5e-6)


@pytest.mark.parametrize("std", [4.0, 30.0])
def test_sharp_logits(make, std):
    arguments, exact = make((9,), 4, 12, torch.float32, std=std)
    compare(sublayer(*arguments, at_once=True), arguments, oracle_sublayer(*exact), exact, 5e-6, 2e-5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_options_reach_the_arithmetic(make, iterations):
    arguments, exact = make((5,), 4, 7, torch.float32)
    for x in (arguments[0], exact[0]):
        x.data *= 1e-3
    options = {"iterations": iterations, "norm_eps": 1e-5}
    compare(
        sublayer(*arguments, at_once=True, **options), arguments, oracle_sublayer(*exact, **options), exact, 2e-6, 5e-6
    )
    assert hyper_coefficients(*arguments[:4], eps=0.5).pre.min() > 0.5
    got, want = (hyper_coefficients(*arguments[:4], eps=0.1, backend=x) for x in ("triton", "eager"))
    check("comb", got.comb, want.comb, 1e-6)


def test_apart_and_at_once_are_the_same(make):
    arguments, _ = make((5,), 4, 40, torch.float32)
    apart, at_once = (sublayer(*arguments, at_once=x, iterations=2) for x in (False, True))
    assert all(torch.equal(apart[name], at_once[name]) for name in apart)
    for name, a, b in zip(NAMES, gradients(apart, arguments), gradients(at_once, arguments)):
        check(name, a, b, 1e-6)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_head_weights(make, n):
    (streams, *_), (exact, *_) = make((2, 9), n, 8, torch.float32)
    torch.manual_seed(0)
    constants = [torch.randn(shape, dtype=torch.float64) for shape in ((n, n * 8), (n,), (1,))]
    mine = [streams, *(x.float().to(streams.device).requires_grad_() for x in constants)]
    theirs = [exact, *(x.to(streams.device).requires_grad_() for x in constants)]
    flat = exact.flatten(-2)
    mix = torch.einsum("bti,mi->btm", flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt(), theirs[1])
    want = {"weights": torch.sigmoid(mix * theirs[3] + theirs[2]) + EPS}
    got = {"weights": hyper_head_weights(*mine)}
    check("weights", got["weights"], want["weights"], 1e-6)
    for name, a, b in zip(NAMES, gradients(got, mine), gradients(want, theirs)):
        check(f"gradient of {name}", a, b, 5e-6 if name != "scale" else 5e-5)  # one number: what cancels stays in it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_streams_are_rounded_once(make, dtype):
    arguments, exact = make((9,), 4, 16, dtype)
    assert [x.dtype for x in arguments] == [dtype, *3 * [torch.float32], dtype]
    got, want = sublayer(*arguments, at_once=True), oracle_sublayer(*exact)
    plain = sublayer_by("eager", arguments)
    step = torch.finfo(dtype).eps / 2
    for name in want:
        half = name in ("collapsed", "mixed")
        assert got[name].dtype == (dtype if half else torch.float32)
        worst = ((got[name].double() - want[name]).abs() / want[name].abs().clamp_min(0.05)).max()
        assert worst < (1.01 * step if half else 2e-6), f"{name}: {worst:.2e}"
    wanted = gradients(want, exact)
    for name, a, b, c in zip(NAMES, gradients(got, arguments), gradients(plain, arguments), wanted):
        assert rms_error(a, c) <= 2 * rms_error(b, c) + 1e-6, name


def sublayer_by(backend, arguments):
    streams, fn, base, scale, y = arguments
    u, (pre, post, comb) = hyper_read(streams, fn, base, scale, backend=backend)
    mixed = hyper_recombine(y, streams, post, comb, backend=backend)
    return {"pre": pre, "post": post, "comb": comb, "collapsed": u, "mixed": mixed}


def test_mixed_dtypes_as_the_reference(make, device):
    streams, fn, base, scale, y = make((5,), 4, 16, torch.float32)[0]
    arguments = [x.detach().requires_grad_() for x in (streams, fn.bfloat16(), base, scale, y.bfloat16())]
    with torch.autocast(device, torch.bfloat16):
        got, want = (sublayer_by(backend, arguments) for backend in ("triton", "eager"))
        grads = [gradients(x, arguments) for x in (got, want)]
    for name in want:
        assert got[name].dtype == want[name].dtype
        check(name, got[name], want[name], 1e-6)
    for name, a, b in zip(NAMES, *grads):
        assert a.dtype == b.dtype
        check(f"gradient of {name}", a, b, 4e-3)


def test_zero_tokens(make):
    arguments, _ = make((2, 0), 4, 8, torch.float32)
    results = sublayer(*arguments, at_once=True)
    assert results["comb"].shape == (2, 0, 4, 4) and results["mixed"].shape == (2, 0, 4, 8)
    for argument, grad in zip(arguments, gradients(results, arguments)):
        assert grad.shape == argument.shape and not grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stays_in_its_token(make, value):
    arguments, _ = make((9,), 3, 16, torch.float32)
    want = sublayer(*arguments, at_once=True, iterations=2)
    wanted = gradients(want, arguments)
    arguments[0].data[4, 2, 7] = value
    got = sublayer(*arguments, at_once=True, iterations=2)
    grads = gradients(got, arguments)
    others = torch.arange(9) != 4
    pairs = [*((k, got[k], want[k]) for k in want), *((i, grads[i], wanted[i]) for i in (0, 4))]
    for name, mine, theirs in pairs:
        assert torch.equal(mine[others], theirs[others]) and mine[4].isnan().any(), name


def test_saturated_logits_have_finite_gradients(device):
    torch.manual_seed(0)
    streams = torch.randn(3, 2, 4, device=device)
    fn = torch.zeros(8, 8, device=device)
    base = torch.tensor([200.0, -200, -200, 200, 200, 0, 0, -200], device=device).requires_grad_()
    out = hyper_coefficients(streams, fn, base, torch.ones(3, device=device))
    check("comb", out.comb, oracle_sinkhorn(base[4:].double().view(2, 2), 20, "").expand(3, 2, 2), 1e-6)
    (grad,) = torch.autograd.grad(out.comb[:, 0, 0].sum() + out.pre.sum() + out.post.sum(), base)
    assert all(torch.isfinite(x).all() for x in (*out, grad))


def test_streams_need_not_be_contiguous(make):
    (wide, fn, base, scale, y), _ = make((2, 5), 4, 14, torch.float32)
    fn = fn[:, : 4 * 7].detach().requires_grad_()
    arguments = [wide.mT[..., ::2, :].mT, fn, base, scale, y[..., ::2]]
    straight = [x.contiguous() for x in arguments]
    got, want = (sublayer(*x, at_once=True, iterations=2) for x in (arguments, straight))
    assert all(torch.equal(got[name], want[name]) for name in want)
    leaves = [wide, fn, base, scale, y]
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, leaves), gradients(want, leaves)))


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(make, wanted):
    arguments, _ = make((5,), 2, 9, torch.float32)
    whole = sublayer(*arguments, at_once=True, iterations=2)
    want = gradients({k: whole[k] for k in whole if k == "mixed" or wanted < 4}, arguments)[wanted]
    for i, x in enumerate(arguments):
        x.requires_grad_(i == wanted)
    got = sublayer(*arguments, at_once=True, iterations=2)
    got = {k: got[k] for k in got if k == "mixed" or wanted < 4}
    assert torch.equal(gradients(got, [arguments[wanted]])[0], want)


@pytest.mark.parametrize("result", ["pre", "post", "comb", "collapsed"])
def test_the_gradient_of_each_result_alone(make, result):
    arguments, exact = make((5,), 3, 9, torch.float32)
    got, want = sublayer(*arguments, at_once=True, iterations=2), oracle_sublayer(*exact, iterations=2)
    grads = (gradients({result: x[result]}, y[:4]) for x, y in ((got, arguments), (want, exact)))
    for name, a, b in zip(NAMES, *grads):
        check(f"gradient of {name}", a, b, 5e-6)


def test_the_same_bits_on_each_run_and_in_any_batch(make):
    arguments, _ = make((19,), 2, 24, torch.float32)
    y = arguments[4]

    def run(rows):
        streams, output = (x.detach()[rows].requires_grad_() for x in (arguments[0], y))
        results = sublayer(streams, *arguments[1:4], output, at_once=True, iterations=2)
        sum(x.square().sum() for x in results.values()).backward()
        return [*results.values(), streams.grad, output.grad]

    everything, again = run(slice(None)), run(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(everything, again))
    for rows in (slice(0, 1), torch.arange(18, 0, -3)):
        assert all(torch.equal(a[rows], b) for a, b in zip(everything, run(rows)))


@pytest.mark.parametrize("count", [1, 16, 37])
def test_partial_sums_are_added_up(device, count):
    parts = torch.randn(count, 3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    check("sum", triton_launch._sum_parts(parts), parts.double().sum(0), 1e-6)
    assert triton_launch._sum_parts(parts, torch.bfloat16).dtype == torch.bfloat16


def test_three_products_of_tf32_keep_the_accuracy_of_float32():
    """What `precision` of the tables rests on; the interpreter multiplies in float32."""

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        u, fn = (3 * torch.randn(64, 4096)).to(dtype).float(), torch.randn(24, 4096).T / 64
        (u_high, u_low), (f_high, f_low) = ((tf32(x), tf32(x - tf32(x))) for x in (u, fn))
        exact = u.double() @ fn.double()
        emulated = rms_error(u_low @ f_high + u_high @ f_low + u_high @ f_high, exact)
        assert emulated <= 1.2 * rms_error(u @ fn, exact) and 100 * emulated < rms_error(tf32(u) @ tf32(fn), exact)


@pytest.mark.parametrize("function", PUBLIC)
def test_the_twin_has_the_references_signature(function):
    mine, theirs = (inspect.signature(getattr(x, function.__name__)).parameters for x in (triton, eager))
    assert {k: (v.kind, v.default) for k, v in mine.items()} == {k: (v.kind, v.default) for k, v in theirs.items()}


# the operators as torch sees them -------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def block(streams, fn, base, scale, y):
    u, (pre, post, comb) = hyper_read(streams * 1.1, fn, base, scale, iterations=3)
    mixed = hyper_recombine(y + u.sin(), streams, post, comb)
    weights = hyper_head_weights(mixed, fn[:2], base[:2], scale[:1])
    return (
        hyper_collapse(mixed, weights).cos().sum() + hyper_coefficients(mixed, fn, base, scale).comb.sum() + pre.sum()
    )


@pytest.mark.parametrize("op", ["read", "head", "collapse", "recombine"])
def test_opcheck(real_memory, make, op):
    streams, fn, base, scale, y = make((3,), 2, 8, torch.float32)[0]
    pre, post, comb = (x.detach().requires_grad_() for x in hyper_coefficients(streams, fn, base, scale))
    if op == "read":
        torch.library.opcheck(triton._read, (streams, fn, base, scale, 2, 1e-6, 1e-6, True))
    elif op == "head":
        torch.library.opcheck(triton._read, (streams, fn[:2], base[:2], scale[:1], 0, 1e-6, 1e-6, False))
    elif op == "collapse":
        torch.library.opcheck(triton._collapse, (streams, pre))
    else:
        torch.library.opcheck(triton._recombine, (y, streams, post, comb))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, make, dynamic):
    arguments, _ = make((3,), 2, 8, torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*arguments), arguments) for f in (block, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(make, reentrant):
    arguments, _ = make((5,), 2, 8, torch.float32)
    want = torch.autograd.grad(block(*arguments), arguments)
    checkpoint(block, *arguments, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, arguments))


def test_backward_twice_adds_up(make):
    arguments, _ = make((5,), 2, 8, torch.float32)
    loss = block(*arguments)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in arguments]
    loss.backward()
    assert all(torch.equal(2 * a, x.grad) for a, x in zip(once, arguments))


def test_memory_kept_is_the_streams_and_a_few_numbers_per_token(make):
    arguments, _ = make((30,), 4, 8, torch.float32)
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        hyper_read(*arguments[:4])
    assert sum(saved.values()) - sum(x.nbytes for x in arguments[:4]) <= 30 * 4 * (4 + 24 + 1)
