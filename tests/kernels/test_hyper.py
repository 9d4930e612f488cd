"""mHC: each engine against the definition, and the definition against loops over Python's numbers and transformers.

Axes: t tokens · n streams (j source, k target) · d width.
"""

import importlib.util
import inspect
import math

import numpy as np
import pytest
import torch
from oracle import distance, hold
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import hyper
from abyssal.kernels.hyper import eager as eager_engine
from abyssal.kernels.hyper import (
    hyper_branch,
    hyper_coefficients,
    hyper_collapse,
    hyper_head_weights,
    hyper_read,
    hyper_recombine,
)
from abyssal.kernels.hyper.step import HyperSite, hyper_head_step, hyper_recombine_step, hyper_step, sinkhorn_step

f64, f32, bf16, fp16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
WEIGHTS = ("fn", "base", "scale")
LEAVES = ("streams", *WEIGHTS, "y")
NEAR = {"pre": 2e-6, "post": 2e-6, "comb": 2e-6}  # float32 of streams of any dtype
GRADIENTS = {f"d{name}": 5e-6 for name in LEAVES}  # of float32
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def engines(*, triton=(f32, bf16), eager=(f64, f32, bf16)):
    """The engines, each with the dtypes given."""
    pairs = [("eager", x, ()) for x in eager] + [("triton", x, needs_triton) for x in triton]
    values = [pytest.param(name, x, marks=marks, id=f"{name}-{str(x)[6:]}") for name, x, marks in pairs]
    return pytest.mark.parametrize("engine, dtype", values, indirect=["engine"])


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """In the interpreter 16 tokens and a few columns make a tile, so that a handful of tokens takes several."""
    from abyssal.kernels.hyper.triton import launch

    if emulated:
        blocks = launch.Blocks(16, 32, 4, 2)
        monkeypatch.setattr(launch, "tiles_for", lambda rows: launch.Tiles(blocks, blocks))
        monkeypatch.setattr(launch, "panel", lambda n, d: (32, 1))
        for name, value in {"SPLIT": 64, "TOKENS": 8, "PROGRAMS": 16, "STEPS": 1, "PARTS": 2}.items():
            monkeypatch.setattr(launch, name, value)


@pytest.fixture
def where(engine, device):
    return device if engine == "triton" else "cpu"


def site(lead, n, d, std=1.0):
    """Streams of a scale far from one, and comb logits with standard deviation `std`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=f64)

    m = (n + 2) * n
    streams, fn, base, y = 3 * normal(*lead, n, d), normal(m, n * d) / (n * d) ** 0.5, normal(m), normal(*lead, d)
    base[2 * n :] *= 0.7 * std
    return {"streams": streams, "fn": fn, "base": base, "scale": torch.tensor([0.7, 1.3, 0.7 * std]).double(), "y": y}


def saturated():
    """Logits of +-200, in which each row of comb is one number and a rest of eps."""
    given = site((3,), 2, 4)
    base = torch.tensor([200.0, -200, -200, 200, 200, 0, 0, -200])
    return given | {"fn": 0 * given["fn"], "base": base.double(), "scale": torch.ones(3).double()}


def transposed(given):
    return {name: x.mT.contiguous().mT if x.ndim > 1 else x for name, x in given.items()}


def expanded(given):
    """One row of width d as all streams, as an embedding enters the model."""
    return given | {"streams": given["streams"][:, :1].expand_as(given["streams"])}


SMALL = site((5,), 4, 7)
CASES = {
    "one stream": site((5,), 1, 7),
    "two streams, wide": site((3,), 2, 70),
    "three streams": site((2, 9), 3, 24),
    "four streams, several tiles": site((35,), 4, 40),
    "five streams": site((3,), 5, 8) | {"iterations": 3},
    "six streams": site((3,), 6, 8) | {"iterations": 3},
    "seven streams": site((3,), 7, 8) | {"iterations": 3},
    "eight streams": site((2,), 8, 9),
    "one token": site((), 4, 7),
    "no token": site((2, 0), 4, 8),
    "sharp": site((9,), 4, 12, std=4.0),
    "very sharp": site((9,), 4, 12, std=30.0),
    "saturated": saturated(),
    "one round": SMALL | {"iterations": 1},
    "two rounds of large eps": SMALL | {"iterations": 2, "eps": 0.1},
    "small streams": SMALL | {"streams": 1e-3 * SMALL["streams"], "norm_eps": 1e-5, "iterations": 3},
    "not contiguous": transposed(site((2, 5), 4, 7)),
    "expanded": expanded(site((5,), 4, 7)),
}


WAYS = ("branch", "read", "parts")


def sublayer(streams, fn, base, scale, y, *, way="branch", backend=None, **options):
    """Everything at one site: by `hyper_branch`, as models do, by `hyper_read`, or coefficients and collapse apart."""
    weights, options = (fn, base, scale), {"backend": backend, **options}
    if way == "branch":
        collapsed, (pre, post, comb), streams = hyper_branch(streams, *weights, **options)
    elif way == "read":
        collapsed, (pre, post, comb) = hyper_read(streams, *weights, **options)
    else:
        pre, post, comb = hyper_coefficients(streams, *weights, **options)
        collapsed = hyper_collapse(streams, pre, backend=backend)
    mixed = hyper_recombine(y, streams, post, comb, backend=backend)
    return {"pre": pre, "post": post, "comb": comb, "collapsed": collapsed, "mixed": mixed}


def head(streams, fn, base, scale, *, backend=None, **options):
    weights = hyper_head_weights(streams, fn, base, scale, backend=backend, **options)
    return {"weights": weights, "collapsed": hyper_collapse(streams, weights, backend=backend)}


def at_the_head(given):
    n = given["streams"].shape[-2]
    return {"streams": given["streams"], "fn": given["fn"][:n], "base": given["base"][:n], "scale": given["scale"][:1]}


def leaves(given, device="cpu", dtype=f32):
    return [given[name].to(device, dtype if name in ("streams", "y") else f32).requires_grad_() for name in LEAVES]


def gradients(results, arguments):
    """Of results with fixed upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results.values()]
    return torch.autograd.grad(list(results.values()), arguments, upstream)


# the definition -------------------------------------------------------------------------------------------------------


def in_loops(streams, fn, base, scale, y, rounds, eps, norm_eps):
    """One token, number by number."""
    sources = targets = range(len(streams))
    n, flat = len(streams), [x for stream in streams for x in stream]
    r = 1 / math.sqrt(sum(x * x for x in flat) / len(flat) + norm_eps)
    mix = [r * sum(a * b for a, b in zip(row, flat)) for row in fn]
    logits = [x * scale[min(i // n, 2)] + base[i] for i, x in enumerate(mix)]
    pre = [1 / (1 + math.exp(-logits[j])) + eps for j in sources]
    post = [2 / (1 + math.exp(-logits[n + k])) for k in targets]
    comb = [[math.exp(logits[2 * n + n * j + k]) for k in targets] for j in sources]
    comb = [[x / sum(row) + eps for x in row] for row in comb]
    for done in range(rounds):
        if done:
            comb = [[x / (sum(row) + eps) for x in row] for row in comb]
        totals = [sum(comb[j][k] for j in sources) + eps for k in targets]
        comb = [[x / total for x, total in zip(row, totals)] for row in comb]
    collapsed = [sum(pre[j] * streams[j][i] for j in sources) for i in range(len(y))]
    mixed = [[post[k] * x + sum(comb[j][k] * streams[j][i] for j in sources) for i, x in enumerate(y)] for k in targets]
    return {"pre": pre, "post": post, "comb": comb, "collapsed": collapsed, "mixed": mixed}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_definition_in_loops(n):
    given = site((2,), n, 3)
    got = sublayer(**given, iterations=3, eps=0.01, norm_eps=0.1, backend="reference")
    for token in range(2):
        one = {name: x if name in WEIGHTS else x[token] for name, x in given.items()}
        want = in_loops(*(x.tolist() for x in one.values()), 3, 0.01, 0.1)
        for name, x in want.items():
            assert distance(got[name][token], torch.tensor(x, dtype=f64)) < 1e-13, name


def test_transformers_agrees_with_the_definition():
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as peer
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=16, hc_mult=4)
    module, last = peer.DeepseekV4HyperConnection(config), peer.DeepseekV4HyperHead(config)
    given = {name: x.float() for name, x in site((2, 9), 4, 16, std=2.0).items()}
    module.load_state_dict({name: given[name] for name in WEIGHTS})
    got = sublayer(**given, backend="reference")
    for name, want in zip(("post", "comb", "collapsed"), module(given["streams"])):
        assert distance(got[name], want) < 2e-6, name
    final = at_the_head(given)
    last.load_state_dict({f"hc_{name}": final[name] for name in WEIGHTS})
    assert distance(head(**final, backend="reference")["collapsed"], last(given["streams"])) < 2e-6


@pytest.mark.parametrize("std", [0.1, 1.0, 4.0])
def test_columns_of_comb_sum_to_one(std):
    comb = sublayer(**site((200,), 4, 16, std), backend="reference")["comb"]
    assert (comb.sum(-2) - 1).abs().max() < 1e-5 and comb.min() >= 0
    assert std >= 1 or (comb.sum(-1) - 1).abs().max() < 1e-5


def test_one_stream_is_a_scaled_residual():
    given = site((9,), 1, 16)
    got = sublayer(**given, backend="reference")
    assert (got["comb"] - 1).abs().max() < 1e-5
    assert distance(got["mixed"], got["post"][..., None] * given["y"][:, None] + given["streams"]) < 1e-5


# every engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@engines()
def test_values_and_gradients(engine, dtype, case, where):
    limits = {f64: {}, f32: GRADIENTS, bf16: NEAR}[dtype]
    if "sharp" in case and dtype == f32:
        limits = dict.fromkeys([*NEAR, "collapsed", "mixed"], 5e-6) | dict.fromkeys(GRADIENTS, 2e-5)
    got = hold(sublayer, CASES[case], engine, dtype, kept=WEIGHTS, limits=limits, device=where)
    wide = torch.promote_types(dtype, f32)
    assert {got[name].dtype for name in NEAR} == {wide} and {got[x].dtype for x in ("collapsed", "mixed")} == {dtype}


@pytest.mark.parametrize("n", [1, 3, 4])
@engines()
def test_head(engine, dtype, n, where):
    given = at_the_head(site((2, 9), n, 8)) | {"eps": 0.01, "norm_eps": 0.1}
    limits = {f64: {}, f32: GRADIENTS | {"dscale": 5e-5}, bf16: {"weights": 2e-6}}[dtype]
    hold(head, given, engine, dtype, kept=WEIGHTS, limits=limits, device=where)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 3, 4])
@engines(eager=(f64,), triton=(f32,))
def test_sinkhorn_alone(engine, dtype, n, iterations, where):
    """Of logits that are the static part, as the projection is zero."""
    given = site((1,), n, 2) | {"iterations": iterations}
    given |= {"fn": 0 * given["fn"], "base": 2 * given["base"]}
    hold(sublayer, given, engine, dtype, fixed=("streams", "fn", "scale", "y"), limits=GRADIENTS, device=where)


@engines(eager=(bf16, fp16), triton=(bf16, fp16))
def test_halves_are_rounded_once(engine, dtype, where):
    given = {name: x if name in WEIGHTS else x.to(dtype) for name, x in site((40,), 4, 16).items()}
    got = hold(sublayer, given, engine, dtype, kept=WEIGHTS, limits=NEAR, device=where)
    want = sublayer(**{name: x.double() for name, x in given.items()}, backend="reference")
    for name in ("collapsed", "mixed"):
        worst = ((got[name].cpu().double() - want[name]).abs() / want[name].abs().clamp_min(0.05)).max()
        assert worst < 1.01 * torch.finfo(dtype).eps / 2, f"{name}: {worst:.2e} is more than one rounding"


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_changes_nothing_and_gradients_have_the_dtype_of_their_input(engine, where, mixed):
    given = {
        name: x.bfloat16() if mixed and name in ("fn", "y") else x.float() for name, x in site((9,), 4, 16).items()
    }
    arguments = [x.to(where).requires_grad_() for x in given.values()]
    results, grads = [], []
    for enabled in (False, True):
        with torch.autocast(where, bf16, enabled=enabled):
            results.append(sublayer(*arguments, backend=engine))
            grads.append(gradients(results[-1], arguments))
    assert all(x.dtype == f32 and torch.equal(x, results[1][name]) for name, x in results[0].items())
    assert all(torch.equal(a, b) and a.dtype == x.dtype for a, b, x in zip(*grads, arguments))
    exact = [x.detach().cpu().double().requires_grad_() for x in arguments]
    wanted = sublayer(*exact, backend="reference")
    assert all(distance(x.cpu(), wanted[name]) < 2e-6 for name, x in results[0].items())
    for a, b in zip(grads[0], gradients(wanted, exact)):
        assert distance(a.cpu(), b) < (5e-6 if a.dtype == f32 else 4e-3)


def test_all_ways_are_the_same(engine, where):
    arguments = leaves(site((2, 13), 4, 40), where)
    options = {"iterations": 3, "eps": 1e-5, "norm_eps": 1e-3, "backend": engine}
    first, *others = (sublayer(*arguments, way=way, **options) for way in WAYS)
    grads = gradients(first, arguments)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert all(distance(a, b) < 2e-6 for a, b in zip(grads, gradients(other, arguments)))


def test_the_streams_go_on_as_they_are_and_may_be_read_by_others(engine, where):
    streams, *weights, _ = leaves(expanded(site((5,), 4, 24)), where)
    with torch.no_grad():
        assert hyper_branch(streams, *weights, backend=engine)[2].data_ptr() == streams.data_ptr()
    u, _, passing = hyper_branch(streams, *weights, backend=engine)
    assert passing.data_ptr() == streams.data_ptr() and torch.equal(passing, streams)
    for results, plain in (([u, passing.sin()], [u, streams.sin()]), ([passing.sin()], [streams.sin()])):
        got, want = (torch.autograd.grad([x.sum() for x in xs], streams, retain_graph=True) for xs in (results, plain))
        assert distance(*got, *want) < 2e-6


@pytest.mark.parametrize("result", ["pre", "post", "comb", "collapsed", "mixed"])
def test_the_gradient_of_each_result_alone(engine, result, where):
    def alone(**given):
        return {result: sublayer(**given)[result]}

    given = site((5,), 3, 9) | {"iterations": 2}
    hold(alone, given, engine, f32, fixed=() if result == "mixed" else ("y",), limits=GRADIENTS, device=where)


@pytest.mark.parametrize("wanted", LEAVES)
def test_each_gradient_alone(engine, wanted, where):
    given = site((5,), 2, 9) | {"iterations": 2}
    fixed = [name for name in LEAVES if name != wanted]
    got = hold(sublayer, given, engine, f32, fixed=fixed, limits=GRADIENTS, device=where)
    assert [name for name in got if name.startswith("d")] == [f"d{wanted}"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_token(engine, where, value):
    arguments = leaves(site((9,), 3, 16), where)
    found = []
    for spoilt in (False, True):
        if spoilt:
            arguments[0].data[4, 2, 7] = value
        results = sublayer(*arguments, iterations=2, backend=engine)
        grads = gradients(results, arguments)
        found.append([*results.values(), grads[0], grads[4]])
    others = torch.arange(9) != 4
    for before, after in zip(*found):
        assert torch.equal(before[others], after[others]) and after[4].isnan().any()


def assert_same_bits(arguments, batches, **options):
    """Of every result and gradient when run again, and of each token's in other batches."""
    streams, *weights, y = arguments

    def run(rows):
        x, output = (x.detach()[rows].requires_grad_() for x in (streams, y))
        results = sublayer(x, *weights, output, **options)
        grads = torch.autograd.grad([x.float().square().sum() for x in results.values()], (x, output, *weights))
        return [*results.values(), *grads[:2]], grads[2:]

    (tokens, constants), (again, others) = run(slice(None)), run(slice(None))
    assert all(torch.equal(a, b) for a, b in zip([*tokens, *constants], [*again, *others]))
    for rows in batches:
        assert all(torch.equal(a[rows], b) for a, b in zip(tokens, run(rows)[0]))


def test_the_same_bits_on_each_run_and_in_any_batch(engine, where):
    batches = (slice(0, 1), torch.arange(18, 0, -3)) if engine == "triton" else ()
    assert_same_bits(leaves(site((19,), 2, 24), where), batches, iterations=2, backend=engine)


def test_memory_kept_is_the_streams_and_a_few_numbers_per_token(engine, where):
    n, tokens = 4, 100
    arguments = leaves(site((tokens,), n, 64), where)
    saved = {}

    def count(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        sublayer(*arguments, backend=engine)
    numbers = n * (n + 2) + 1 + (n + n + n * n)  # mix and r; pre, post and comb
    assert sum(saved.values()) - sum(x.nbytes for x in arguments) <= 4 * tokens * numbers


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("triton", marks=needs_triton)])
def test_the_public_signature(name):
    for function in (hyper_coefficients, hyper_collapse, hyper_read, hyper_recombine, hyper_head_weights):
        public, own = (
            inspect.signature(x).parameters
            for x in (function, getattr(importlib.import_module(f"{hyper.__name__}.{name}"), function.__name__))
        )
        want = {k: (v.kind, v.default) for k, v in public.items() if k != "backend"}
        assert {k: (v.kind, v.default) for k, v in own.items()} == want


def test_errors_name_the_argument():
    streams, fn, base, scale, y = site((3,), 4, 8).values()
    pre, post, comb = hyper_coefficients(streams, fn, base, scale)
    wrong = {
        "streams": lambda: hyper_coefficients(streams.long(), fn, base, scale),
        "fn": lambda: hyper_coefficients(streams, fn[:-1], base, scale),
        "base": lambda: hyper_coefficients(streams, fn, base[:-1], scale),
        "scale": lambda: hyper_coefficients(streams, fn, base, scale[:1]),
        "iterations=0": lambda: hyper_coefficients(streams, fn, base, scale, iterations=0),
        "eps=0": lambda: hyper_coefficients(streams, fn, base, scale, eps=0),
        "pre": lambda: hyper_collapse(streams, pre[:2]),
        "output": lambda: hyper_recombine(y[:, :4], streams, post, comb),
        "post": lambda: hyper_recombine(y, streams, post[:, :3], comb),
        "comb": lambda: hyper_recombine(y, streams, post, comb[:, :3]),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()


# eager ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f64, f32, bf16], ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (2, 2), (5,)], ids=str)
def test_without_gradient(lead, dtype):
    """Few tokens take another way then."""
    given = {name: x.to(dtype) for name, x in site(lead, 4, 6).items()}
    before = {name: x.clone() for name, x in given.items()}
    options = {"iterations": 3, "eps": 0.1, "norm_eps": 0.03}
    limits = NEAR | {"weights": 2e-6} if dtype == bf16 else {}
    for way in WAYS:
        hold(sublayer, given | options | {"way": way}, "eager", dtype, fixed=LEAVES, limits=limits)
    hold(head, at_the_head(given), "eager", dtype, fixed=LEAVES, limits=limits)
    assert all(torch.equal(x, given[name]) for name, x in before.items()), "an input was written to"


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_blocks_of_tokens_change_nothing(dtype, monkeypatch):
    monkeypatch.setattr(eager_engine, "_BLOCK_VALUES", 5 * 4 * 16)
    monkeypatch.setattr(eager_engine, "_BLOCK_TOKENS", 11)
    hold(sublayer, site((2, 37), 4, 16), "eager", dtype, kept=WEIGHTS, limits=GRADIENTS if dtype == f32 else NEAR)


# numpy ----------------------------------------------------------------------------------------------------------------

STEP = {np.float32: 3e-6, np.float64: 1e-13}
both = pytest.mark.parametrize("dtype", STEP, ids=lambda dtype: dtype.__name__)


def step_site(given, dtype, **options):
    weights = (given[name].numpy().astype(dtype) for name in WEIGHTS)
    return given["streams"].numpy().astype(dtype), HyperSite(*weights, **options)


def rounded(given, dtype):
    return {name: torch.from_numpy(x.numpy().astype(dtype)).double() for name, x in given.items()}


@both
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("rounds", [1, 2, 3, 20])
@pytest.mark.parametrize("n, d", [(1, 5), (2, 3), (3, 8), (4, 16), (7, 5)])
def test_step(n, d, rounds, eps, dtype):
    given = site((), n, d)
    want = sublayer(**rounded(given, dtype), iterations=rounds, eps=eps, norm_eps=0.03, backend="reference")
    streams, where = step_site(given, dtype, eps=eps, norm_eps=0.03, iterations=rounds)
    collapsed, post, comb = hyper_step(streams, where)
    mixed = hyper_recombine_step(given["y"].numpy().astype(dtype), streams, post, comb)
    for name, x in {"collapsed": collapsed, "post": post, "comb": comb, "mixed": mixed}.items():
        assert x.dtype == dtype and distance(torch.from_numpy(x), want[name]) < STEP[dtype], name


@both
@pytest.mark.parametrize("n", [1, 3, 4])
def test_head_step(n, dtype):
    given = at_the_head(site((), n, 9))
    want = head(**rounded(given, dtype), eps=0.1, norm_eps=0.03, backend="reference")["collapsed"]
    got = hyper_head_step(*step_site(given, dtype, eps=0.1, norm_eps=0.03))
    assert got.dtype == dtype and distance(torch.from_numpy(got), want) < STEP[dtype]


@pytest.mark.parametrize("logit", [0.0, 60.0, -80.0])
def test_sinkhorn_step_of_saturated_logits(logit):
    """Entries down to eps alone, and far more rounds than needed: the iterates stay finite and agree."""
    logits = torch.full((4, 4), logit, dtype=f64)
    logits[[0, 1, 2], [1, 2, 2]] += 50
    given = saturated() | site((), 4, 1) | {"fn": torch.zeros(24, 4, dtype=f64), "scale": torch.ones(3).double()}
    given["base"] = torch.cat([torch.zeros(8), logits.flatten()])
    want = sublayer(**given, iterations=60, backend="reference")["comb"]
    for dtype, limit in STEP.items():
        first = (logits.softmax(1) + 1e-6).numpy().astype(dtype)
        kept = first.copy()
        assert distance(torch.from_numpy(sinkhorn_step(first, 60, 1e-6)), want) < limit
        assert np.array_equal(first, kept)


def test_large_logits_do_not_overflow_in_a_step():
    given = site((), 3, 4)
    streams, where = step_site(
        given | {"base": 200 * given["base"]}, np.float32, eps=1e-6, norm_eps=0.03, iterations=20
    )
    with np.errstate(over="ignore"):
        assert all(np.isfinite(x).all() for x in hyper_step(streams, where))


# Triton ---------------------------------------------------------------------------------------------------------------


class Additions(TorchDispatchMode):
    """Of two tensors as large as the streams."""

    count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        found = call(*args, **kwargs or {})
        self.count += "aten::add" in call.name() and found.numel() == 5 * 4 * 24
        return found


@needs_triton
@pytest.mark.parametrize("way, count", [("branch", 0), ("read", 1)])
def test_gradients_of_the_streams_are_added_while_they_are_written(by_triton, device, way, count):
    arguments = leaves(site((5,), 4, 24), device)
    mixed = sublayer(*arguments, way=way)["mixed"]
    with Additions() as found:
        torch.autograd.grad(mixed.sum(), arguments)
    assert found.count == count


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and poisoned memory would fill gigabytes of a GPU."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def block(streams, fn, base, scale, y):
    u, (pre, post, comb), passing = hyper_branch(streams * 1.1, fn, base, scale, iterations=3)
    mixed = hyper_recombine(y + u.sin(), passing, post, comb)
    out = hyper_collapse(mixed, hyper_head_weights(mixed, fn[:2], base[:2], scale[:1]))
    return out.cos().sum() + hyper_coefficients(mixed, fn, base, scale).comb.sum() + pre.sum()


@needs_triton
@pytest.mark.parametrize("op", ["read", "head", "collapse", "recombine"])
def test_opcheck(real_memory, device, op):
    from abyssal.kernels.hyper import triton

    streams, fn, base, scale, y = leaves(site((3,), 2, 8), device)
    pre, post, comb = (x.detach().requires_grad_() for x in hyper_coefficients(streams, fn, base, scale))
    operator, arguments = {
        "read": (triton._read, (streams, fn, base, scale, 2, 1e-6, 1e-6, True)),
        "head": (triton._read, (streams, fn[:2], base[:2], scale[:1], 0, 1e-6, 1e-6, False)),
        "collapse": (triton._collapse, (streams, pre)),
        "recombine": (triton._recombine, (y, streams, post, comb)),
    }[op]
    torch.library.opcheck(operator, arguments)


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, device, dynamic):
    arguments = leaves(site((3,), 2, 8), device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*arguments), arguments) for f in (block, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_triton
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing_and_backward_twice_adds_up(by_triton, device, reentrant):
    arguments = leaves(site((5,), 2, 8), device)
    want = torch.autograd.grad(block(*arguments), arguments)
    loss = checkpoint(block, *arguments, use_reentrant=reentrant)
    loss.backward(retain_graph=not reentrant)
    assert all(torch.equal(a, x.grad) for a, x in zip(want, arguments))
    (block(*arguments) if reentrant else loss).backward()
    assert all(torch.equal(2 * a, x.grad) for a, x in zip(want, arguments))


@needs_triton
def test_what_autograd_takes_for_the_passing_streams_is_one_zero(by_triton, device):
    from abyssal.kernels.hyper import triton

    streams, *weights, _ = leaves(site((35,), 2, 8), device, bf16)
    link = triton._read(streams, *weights, 2, 1e-6, 1e-6, True)[-1]
    assert link.shape == streams.shape and link.eq(0).all() and link.untyped_storage().nbytes() == streams.itemsize


@needs_triton
@pytest.mark.parametrize("shape", [(27,), (3, 50)])
@pytest.mark.parametrize("count", [1, 16, 37, 100])
def test_partial_sums_are_added_up(by_triton, device, count, shape):
    from abyssal.kernels.hyper.triton import launch

    parts = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    assert distance(launch._sum_parts(parts), parts.double().sum(0)) < 1e-6
    assert launch._sum_parts(parts, bf16).dtype == bf16


@needs_triton
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_squares_are_added_neighbour_by_neighbour(by_triton, device, shift):
    """Wherever the streams begin: compiled for another alignment, registers hold other columns."""
    from abyssal.kernels.hyper.triton import kernels

    t, w = 20, 64
    u = 10 * torch.randn(shift + t * w, generator=torch.Generator().manual_seed(0)).to(device, bf16)
    fn, partial = torch.zeros(2, w, device=device), torch.empty(1, t, 3, device=device)
    blocks = {"SPLIT": w, "BT": 32, "BK": w, "M": 16, "PRECISION": "tf32x3"}
    kernels.project[1, 1](u[shift:], fn, partial, t, w, 2, **blocks)
    squares = u[shift:].view(t, w).float().square()
    while squares.shape[1] > 1:
        squares = squares[:, ::2] + squares[:, 1::2]
    assert torch.equal(partial[0, :, 2:], squares) and partial[..., :2].eq(0).all()


def test_three_parts_of_bfloat16_are_a_float32():
    torch.manual_seed(0)
    values, total = torch.randn(10**6).exp(), 0
    for _ in range(3):
        total = total + (values - total).bfloat16().float()
    assert torch.equal(total, values)


def test_three_products_of_tf32_keep_the_accuracy_of_float32():
    """What `precision` of the tables rests on; the interpreter multiplies in float32."""

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(f32)

    def error(x):
        return (x.double() - exact).norm() / exact.norm()

    torch.manual_seed(0)
    for dtype in (f32, bf16):
        u, fn = (3 * torch.randn(64, 4096)).to(dtype).float(), torch.randn(24, 4096).T / 64
        (u_high, u_low), (f_high, f_low) = ((tf32(x), tf32(x - tf32(x))) for x in (u, fn))
        exact = u.double() @ fn.double()
        emulated = error(u_low @ f_high + u_high @ f_low + u_high @ f_high)
        assert emulated <= 1.2 * error(u @ fn) and 100 * emulated < error(tf32(u) @ tf32(fn))


# on a GPU, at sizes with many full tiles ------------------------------------------------------------------------------

TOKENS, N, D = 2000, 4, 1024


@pytest.mark.gpu
@pytest.mark.parametrize("n, d, std", [(1, 64, 1), (3, 250, 1), (4, 1024, 1), (4, 4096, 1), (8, 512, 1), (4, 1024, 30)])
@pytest.mark.parametrize("dtype", [bf16, fp16, f32], ids=str)
def test_real_sizes(real_memory, dtype, n, d, std):
    names = [*NEAR, *GRADIENTS, "collapsed", "mixed"] if dtype == f32 else NEAR
    limits = dict.fromkeys(names, 5e-5 if std > 1 else 5e-6)
    hold(sublayer, site((700,), n, d, std), "triton", dtype, kept=WEIGHTS, limits=limits, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
def test_real_sizes_give_the_same_bits_on_each_run_and_in_any_batch(real_memory, dtype):
    batches = slice(0, 1), slice(0, 37), torch.randperm(TOKENS, device="cuda")
    assert_same_bits(leaves(site((TOKENS,), N, D), "cuda", dtype), batches)


@pytest.mark.gpu
def test_a_cuda_graph_replays_other_streams(real_memory):
    arguments = [x.detach() for x in leaves(site((TOKENS,), N, D), "cuda", bf16)]
    with torch.cuda.stream(torch.cuda.Stream()):
        sublayer(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sublayer(*arguments)
    for _ in range(2):
        arguments[0].copy_(torch.randn_like(arguments[0]))
        graph.replay()
        assert all(torch.equal(out[name], x) for name, x in sublayer(*arguments).items())


@pytest.mark.gpu
def test_nothing_waits_for_the_device(real_memory):
    arguments = leaves(site((TOKENS,), N, D), "cuda", bf16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = sublayer(*arguments)
        weights = hyper_head_weights(results["mixed"], arguments[1][:N], arguments[2][:N], arguments[3][:1])
        (hyper_collapse(results["mixed"], weights).sum() + results["collapsed"].sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_values_than_an_int32_counts(real_memory):
    tokens = 2**31 // (4 * 4096) + 64
    tail, *weights, _ = (x.detach() for x in leaves(site((64,), 4, 4096), "cuda", bf16))
    streams = torch.zeros(tokens, 4, 4096, dtype=bf16, device="cuda")
    streams[-64:] = tail
    y = torch.ones(tokens, 4096, dtype=bf16, device="cuda")
    with torch.no_grad():
        whole, end = sublayer(streams, *weights, y), sublayer(tail, *weights, y[-64:])
    assert all(torch.equal(whole[name][-64:], x) for name, x in end.items())


@pytest.mark.gpu
def test_memory_kept_for_the_backward_pass_is_the_formula(real_memory):
    arguments = leaves(site((TOKENS,), N, D), "cuda", bf16)
    before = torch.cuda.memory_allocated()
    results = sublayer(*arguments)
    kept = torch.cuda.memory_allocated() - before - sum(x.nbytes for x in results.values())
    assert kept <= TOKENS * 4 * (N * (N + 2) + 1) + 100_000  # mix and r; the streams are the caller's
