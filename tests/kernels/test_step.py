"""The ops of one token in numpy, and what the references do without gradient for a few tokens, against the public ops
in float64 as they compute with gradient: that way shares no line with either.
"""

import math

import numpy as np
import pytest
import torch
from oracle import assert_same

from abyssal.kernels import attention, index_topk, moe_experts, moe_route, pool, rms_norm, rope, swiglu, topk
from abyssal.kernels.attention.step import attention_step
from abyssal.kernels.index_topk import step as index_topk_module
from abyssal.kernels.index_topk.step import index_topk_step
from abyssal.kernels.norm_rope import rope_frequencies, rope_rotation
from abyssal.kernels.norm_rope.step import head_norm_step, rms_norm_step, rope_rotation_step, rope_step
from abyssal.kernels.pool.step import pool_step

LIMITS = {np.float32: 3e-6, np.float64: 1e-13}
both = pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: dtype.__name__)


def drawing(dtype, seed=0):
    generator = np.random.default_rng(seed)
    return lambda *shape: generator.standard_normal(shape).astype(dtype)


def exact(*arrays):
    """Float64 tensors that ask for a gradient; integers as they are."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    return [x.double().requires_grad_() if x.is_floating_point() else x for x in tensors]


def check(name, got, want):
    """Against float64, with the tolerance and the dtype of what the step was given."""
    assert_same(name, torch.from_numpy(np.ascontiguousarray(got)), want, LIMITS[got.dtype.type])


# norms and rotations


@both
@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 7), (5, 64)])
def test_norms(heads, width, eps, dtype):
    draw = drawing(dtype)
    x, weight = draw(heads, width) * dtype(0.01), draw(width)
    check("head_norm", head_norm_step(x, eps), rms_norm(*exact(x), None, eps))
    for row in x:
        check("rms_norm", rms_norm_step(row, weight, eps), rms_norm(*exact(row, weight), eps))
    assert not rms_norm_step(x[0] * 0, weight, eps).any() and not head_norm_step(x * 0, eps).any()


@pytest.mark.parametrize("position", [0, 1, 1000, 1_000_003])
def test_rotation_is_that_of_the_public_op(position):
    """Also where float32 angles are coarse: they are to be the same."""
    frequencies = rope_frequencies(16, 10000.0)
    got = rope_rotation_step(position, frequencies.numpy())
    want = rope_rotation(torch.tensor([[position]]), frequencies)[0, 0].numpy()
    assert got.dtype == want.dtype and np.abs(got - want).max() < 2e-7
    twice = rope_rotation_step(position, frequencies.double().numpy())
    assert twice.dtype == np.complex128
    assert np.abs(twice - np.exp(1j * position * frequencies.double().numpy())).max() < 1e-9


@both
@pytest.mark.parametrize("shape, dim", [((8,), 8), ((12,), 4), ((3, 7), 2), ((2, 3, 9), 6)])
def test_rope_turns_in_place_and_back(shape, dim, dtype):
    x = drawing(dtype)(*shape)
    rotation = rope_rotation_step(5, rope_frequencies(dim, 100.0).numpy().astype(dtype))
    turned = x.copy()
    rope_step(turned, rotation)
    angles = torch.from_numpy(rotation.astype(np.complex128))[None, None]
    check("turned", turned, rope(*exact(x[None, None]), angles)[0, 0])
    rope_step(turned, rotation.conj())
    check("turned back", turned, torch.from_numpy(x.astype(np.float64)))


# attention


@both
@pytest.mark.parametrize("sink", [0.0, 40.0, -40.0, 1e4, -1e4, 1e30, -1e30, -math.inf])
@pytest.mark.parametrize("window, entries", [(1, None), (5, 0), (4, 7), (33, 1)])
def test_attention(window, entries, sink, dtype):
    """One part or two, of which the second may be empty."""
    draw = drawing(dtype)
    q, rows = draw(3, 6) * dtype(5), draw(window, 6)
    sinks = draw(3) + dtype(sink)
    picked = None if entries is None else draw(entries, 6)
    got = attention_step(q, [rows] if picked is None else [rows, picked], sinks[:, None], 0.7)
    scored = np.concatenate([rows] if picked is None else [rows, picked]).astype(np.float64)
    scores = np.concatenate([0.7 * q.astype(np.float64) @ scored.T, sinks.astype(np.float64)[:, None]], 1)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    want = (shares / shares.sum(1, keepdims=True))[:, :-1] @ scored
    check("out", got, torch.from_numpy(want))


def test_attention_of_scores_beyond_exp():
    """A head that sees one key alone, and one whose scores are all far below the other's, and equal."""
    q, keys = np.array([[2000, 0, 0], [-2000, -2000, -2000]], np.float32), np.eye(3, dtype=np.float32)
    out = attention_step(q, [keys[:1], keys[1:]], np.full((2, 1), -1e4, np.float32), 1.0)
    assert np.allclose(out, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=0, atol=1e-6)


# the indexer


def index_oracle(q, weights, keys, k):
    scores = (np.maximum(q.astype(np.float64) @ keys.T, 0) * weights[:, None]).sum(0)
    return np.sort(np.argsort(-scores, kind="stable")[:k])


@both
@pytest.mark.parametrize("tile", [None, 1, 5])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 16])
def test_index_topk(heads, tile, dtype, monkeypatch):
    if tile:
        monkeypatch.setattr(index_topk_module, "HITS", tile * heads)
    draw, generator = drawing(dtype), np.random.default_rng(heads)
    q, weights, keys = draw(heads, 5), draw(heads), draw(23, 5)
    whole = [generator.integers(-1, 2, x.shape).astype(dtype) for x in (q, weights, keys)]  # ties and zeros everywhere
    for inputs in ((q, weights, keys), whole):
        for k in (1, 4, 22):
            assert np.array_equal(index_topk_step(*inputs, k), index_oracle(*inputs, k)), k
        assert index_topk_step(*inputs, 23) is None and index_topk_step(*inputs, 99) is None


def test_index_topk_of_many_entries():
    """More than one tile of the size in use, every entry scored."""
    draw = drawing(np.float32)
    q, weights, keys = draw(2, 4), np.abs(draw(2)), draw(1 << 19, 4)
    keys[[7, 20000, (1 << 19) - 1]] = 30 * q.sum(0)
    assert index_topk_step(q, weights, keys, 3).tolist() == [7, 20000, (1 << 19) - 1]


def test_index_topk_prefers_every_number_to_nan():
    q, weights, keys = np.ones((1, 2), np.float32), np.ones(1, np.float32), np.zeros((6, 2), np.float32)
    keys[1:3] = math.nan
    assert index_topk_step(q, weights, keys, 4).tolist() == [0, 3, 4, 5]
    assert index_topk_step(q, weights, keys, 5).tolist() == [0, 1, 3, 4, 5]


# pooling


@both
@pytest.mark.parametrize("scale", [1, 300])
@pytest.mark.parametrize("m", [1, 4, 33])
@pytest.mark.parametrize("windows, overlap", [(1, False), (1, True), (2, True)])
def test_pool(windows, overlap, m, scale, dtype):
    """The last of the windows given; logits up to a thousand."""
    draw, channels = drawing(dtype), 3 * (1 + overlap)
    kv, gate, bias = draw(windows * m, channels), draw(windows * m, channels) * dtype(scale), draw(m, channels)
    exact_kv, exact_gate, exact_bias = exact(kv, gate, bias)
    want = pool(exact_kv[None], exact_gate[None], exact_bias, ratio=m, overlap=overlap)[0, -1]
    check("entry", pool_step(kv, gate, bias, overlap), want)


# top-k


def first_of_sorted(values, k):
    """The definition."""
    counted = torch.where(values.isnan(), -math.inf, values.double()) + 0.0
    return torch.sort(counted, dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("k", [1, 3, 10, 12])
def test_both_ways_to_the_top_k_are_one(k, ordered, dtype, monkeypatch):
    """Ties, infinities, zeros of both signs, NaN: exactly the same indices."""
    generator = np.random.default_rng(k)
    special = np.array([-math.inf, -1, -0.0, 0, 1, 1, math.inf, math.nan])
    values = torch.from_numpy(special[generator.integers(0, len(special), (3, 50, 12))]).to(dtype)
    want = first_of_sorted(values, k)
    for most in (0, 10**6):
        monkeypatch.setattr(topk, "SMALL", most)
        got = topk.stable_topk(values, k, ordered=ordered)
        assert got.dtype == torch.int64 and torch.equal(got, want if ordered else want.sort(-1).values)


def long_rows():
    """9,000 values, of which a guess from every 61st is good, or misleads."""
    normal, every = np.random.default_rng(0).standard_normal(9000), np.arange(9000) % 61 == 0
    return {
        "normal": normal,
        "rising": np.sort(normal),
        "sample far too high": np.where(every, 9 + normal, normal),
        "sample far too low": np.where(every, -9 + normal, normal),
        "equal": 0 * normal,
        "whole numbers": normal.round(),
        "zero but for the last": np.where(np.arange(9000) > 8997, 1, 0 * normal),
        "a few above many equal ones": np.where(normal > 2.5, normal, 1),
        "hidden but for a few": np.where(normal > 2.5, normal, -math.inf),
        "infinite": np.where(normal > 1, math.inf, normal),
        "nan but for a few": np.where(normal > 2.5, -math.inf, math.nan),
        "nan in the sample": np.where(every, math.nan, normal),
        "nan": math.nan * normal,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", long_rows())
def test_top_k_of_long_rows(name, dtype):
    """Thinned out by a guess, where it holds; the other row is an easy one."""
    values = torch.from_numpy(np.stack((long_rows()[name], long_rows()["normal"][::-1]))).to(dtype)[:, None]
    for k in (1, 2, 17, 500):
        assert torch.equal(topk.stable_topk(values, k, ordered=False), first_of_sorted(values, k).sort(-1).values), k


def test_long_rows_are_thinned_out(monkeypatch):
    """Guards the test above: it takes that way, and few of its rows are settled without a guess."""
    settled, original = [], topk._with_ties_settled
    monkeypatch.setattr(topk, "_with_ties_settled", lambda *arguments: settled.append(1) or original(*arguments))
    for row in long_rows().values():
        topk.stable_topk(torch.from_numpy(row), 17, ordered=False)
    assert 1 <= len(settled) <= 6


# the references without gradient


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_few_tokens():
    """Name to (op, float inputs): all outputs are compared."""
    experts = torch.tensor([[1, 0], [4, 2], [3, 3]])
    turn = torch.polar(torch.ones(2, 3, 2), torch.arange(12.0).view(2, 3, 2))
    return {
        "rms_norm": (lambda x, w: rms_norm(x, w, 0.1), normal(2, 3, 8), normal(8, seed=1)),
        "rms_norm without weight": (lambda x: rms_norm(x, None, 0.1), normal(2, 3, 8)),
        "rope": (lambda x: rope(x, turn), normal(2, 3, 5, 8)),
        "rope of odd width": (lambda x: rope(x, turn), normal(2, 3, 7)),
        "rope back": (lambda x: rope(x, turn, inverse=True), normal(2, 3, 4)),
        "swiglu": (lambda h, w: swiglu(h, 0.5, w), 2 * normal(3, 8), normal(3, seed=1)),
        "swiglu without limit": (lambda h: swiglu(h, None), 2 * normal(2, 3, 8)),
        "moe_experts": (
            lambda x, w, w13, w2: moe_experts(x, experts, w, w13, w2, limit=0.5),
            *(normal(3, 7), normal(3, 2, seed=1), normal(5, 6, 7, seed=2), normal(5, 7, 3, seed=3)),
        ),
        "moe_route": (lambda z: moe_route(z, top_k=3, scale=1.5)[::2], normal(4, 9) * 30 - 30),
    }


def attentions():
    """One query per row."""
    q, kv, compressed, sink = normal(2, 1, 3, 8), normal(2, 9, 8, seed=1), normal(2, 6, 8, seed=2), normal(3, seed=3)
    rows = torch.tensor([[1], [2]])
    one, last = torch.tensor([[1]]), torch.tensor([[5]])
    entries = {
        "window": {},
        "range": {"start": one, "end": last},
        "ranges that differ": {"start": rows, "end": rows + 3},
        "one start, ends that differ": {"start": one, "end": rows + 3},
        "starts that differ, one end": {"start": rows, "end": last},
        "empty range": {"start": last, "end": last},
        "picks": {"index": torch.tensor([[[0, 4, 5]], [[1, 1, 2]]])},
        "picks, some missing": {"index": torch.tensor([[[-1, 4, 5]], [[1, 1, 2]]])},
        "document": {"start": one, "end": last, "window_start": torch.tensor([[7]])},
    }
    for name, options in entries.items():
        for window in (3, 20):
            given = (q, kv, compressed if options else None, sink)
            yield f"attention, {name}, window {window}", attended(window, options), given
    none = {"start": one * 0, "end": one * 0}
    yield "attention, no entries yet", attended(4, none), (q, kv, compressed[:, :0], sink)
    for size in (1e4, -1e4, 1e30, math.inf, -math.inf):
        yield f"attention, sink {size}", attended(4, entries["range"]), (q, kv, compressed, sink + size)
    yield "attention, large scores", attended(4, {}), (q * 1e4, kv, None, sink)


def attended(window, options):
    return lambda q, kv, compressed, sink: attention(q, kv, compressed, sink, window=window, scale=0.6, **options)


SHORT = {name: (op, inputs) for name, (op, *inputs) in of_few_tokens().items()}
SHORT |= {name: (op, inputs) for name, op, inputs in attentions()}


def outputs(op, tensors):
    found = op(*tensors)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def tracked(tensors, dtype=None):
    return [x if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHORT)
def test_without_gradient_the_same(name, dtype):
    op, inputs = SHORT[name]
    given = [x if x is None else x.to(dtype) for x in inputs]
    before = [x if x is None else x.clone() for x in given]
    found, want = outputs(op, given), outputs(op, tracked(inputs, torch.float64))
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    assert len(found) == len(want)
    for a, b in zip(found, want):
        assert a.dtype == dtype and not a.requires_grad
        torch.testing.assert_close(a, b.detach().to(dtype), **near)
    assert all(x is None or torch.equal(x, then) for x, then in zip(given, before)), "an input was written to"


@pytest.mark.parametrize("name", SHORT)
def test_bfloat16_without_gradient_the_same(name):
    """Everything in bfloat16, rounded in the same places."""
    op, inputs = SHORT[name]
    given = [x if x is None else x.bfloat16() for x in inputs]
    found, want = outputs(op, given), outputs(op, tracked(given))
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("k", [2, 6, 9, 40])
@pytest.mark.parametrize("first, last", [(0, 13), (4, 10), (5, 5)])
def test_one_query_picks_as_one_of_many(heads, k, first, last):
    """Whole numbers: ties. The first of two queries has the range, the second sees nothing."""
    generator = torch.Generator().manual_seed(heads)
    shapes = (2, 2, heads, 4), (2, 2, heads), (2, 13, 4)
    q, weights, keys = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    start, end = torch.tensor([[first, 0]]), torch.tensor([[last, 0]])
    want = index_topk(q, weights, keys, k=k, start=start, end=end)[:, :1]
    got = index_topk(q[:, :1], weights[:, :1], keys, k=k, start=start[:, :1], end=end[:, :1])
    assert torch.equal(got, want)
