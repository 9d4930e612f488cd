"""The ops of one token in numpy, and what the references do without gradient for a few tokens, against the public ops
in float64 as they compute with gradient: that way shares no line with either.
"""

import math

import numpy as np
import pytest
import torch
from oracle import assert_same

from abyssal.kernels import moe_experts, moe_route, rms_norm, rope, swiglu
from abyssal.kernels.norm_rope import rope_frequencies, rope_rotation
from abyssal.kernels.norm_rope.step import head_norm_step, rms_norm_step, rope_rotation_step, rope_step

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


"""The ops of one token in numpy, and what the references do without gradient for a few tokens, against the public ops
in float64 as they compute with gradient: that way shares no line with either.
"""


import numpy as np
import pytest

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


SHORT = {name: (op, inputs) for name, (op, *inputs) in of_few_tokens().items()}


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
