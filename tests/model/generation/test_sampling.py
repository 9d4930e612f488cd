"""Temperature, filters and draws against a plain float64 computation, one token at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

from abyssal.model.generation.sampling import Draws, Sampling, pick


def oracle(logits, temperature, top_k, top_p, min_p):
    """Lists of floats; each filter looks at what the one before left."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[ranked[0]]
    if temperature == 0:
        return [float(i == ranked[0]) for i in range(len(logits))]
    p = {i: math.exp((logits[i] - best) / temperature) for i in ranked}
    if top_k:
        p = {i: p[i] for i in ranked[:top_k]}
    whole, before, kept = sum(p.values()), 0.0, []
    for i in p:
        if before < top_p * whole:
            kept.append(i)
        before += p[i]
    p = {i: p[i] for i in kept if p[i] >= min_p}
    return [p.get(i, 0.0) / sum(p.values()) for i in range(len(logits))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k, top_p, min_p", [
    (0, 1.0, 0.0), (5, 1.0, 0.0), (1, 1.0, 0.0), (99, 1.0, 0.0), (0, 0.7, 0.0), (0, 1e-9, 0.0), (0, 1.0, 0.2),
    (12, 0.8, 0.0), (12, 0.8, 0.15), (3, 0.5, 0.9),
])  # fmt: skip
def test_probabilities(dtype, temperature, top_k, top_p, min_p):
    logits = 2 * torch.randn(6, 23, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[1] = logits[1].round()  # ties
    logits[2] = 0.0
    logits[3, 4:] = -math.inf
    logits[4] *= 1000
    got = Sampling(temperature, top_k, top_p, min_p).probabilities(logits)
    want = torch.tensor([oracle(row, temperature, top_k, top_p, min_p) for row in logits.tolist()], dtype=torch.float64)
    assert got.dtype == dtype
    ties = 2 if top_p < 1 else None  # 23 equal shares: whether the last one reaches top_p is a matter of rounding
    rows = [r for r in range(6) if r != ties]
    assert torch.equal(got[rows] > 0, want[rows] > 0), "the wrong tokens are kept"
    assert (got[rows] - want[rows]).abs().max() < 1e-6


def test_the_filters_order_shows():
    """Of 0.4, 0.3, 0.2, 0.1, top_k=2 leaves 4/7 and 3/7: top_p=0.5 is then reached by the first alone."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert Sampling(top_k=2, top_p=0.5).probabilities(logits).tolist() == [[1, 0, 0, 0]]
    assert (Sampling(top_p=0.5).probabilities(logits) > 0).tolist() == [[True, True, False, False]]


def test_the_coldest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0 - 1e-6]])
    for temperature in (0, 1e-30, 5e-324):
        assert Sampling(temperature).probabilities(logits).tolist() == [[0, 1, 0, 0]]


EXTREMES = {
    "temperature": (0, 5e-324, 1e-38, 1.0, 1e4, 3.4e38, 3.5e38, 1e300, 10**400),
    "top_k": (0, 1, 10**30), "top_p": (5e-324, 1e-46, 1e-8, 0.5, 1 - 2**-53, 1.0),
    "min_p": (0.0, 5e-324, 1e-46, 0.5, 1 - 2**-53),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", EXTREMES["temperature"], ids=lambda value: str(value)[:9])
def test_every_setting_that_is_taken_gives_a_distribution(dtype, temperature):
    """Whatever the logits: a token that is masked has no share, and neither -inf nor a large number makes NaN."""
    limit = torch.finfo(dtype).max
    logits = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1] *= 1e30
    logits[2], logits[2, 5] = -limit, limit
    logits[3] = limit
    logits[4:, ::2] = -torch.inf
    logits[5] *= 1e30
    logits[6], logits[6, 7] = -torch.inf, -limit
    u = torch.tensor([2.0**-53, 0.3, 1.0], dtype=torch.float64)
    others = itertools.product(*(EXTREMES[name] for name in ("top_k", "top_p", "min_p")))
    for top_k, top_p, min_p in others:
        sampling = Sampling(temperature, top_k, top_p, min_p)
        p = sampling.probabilities(logits)
        assert p.isfinite().all() and (p >= 0).all(), sampling
        assert ((p.double().sum(-1) - 1).abs() < 33 * torch.finfo(dtype).eps).all(), sampling
        assert (p[logits == -torch.inf] == 0).all(), sampling
        drawn = sampling.draw(logits.repeat(3, 1), u.repeat_interleave(7))
        assert p.repeat(3, 1).gather(1, drawn[:, None]).gt(0).all(), sampling
        best = logits == logits.amax(-1, keepdim=True)
        if temperature > 1:
            continue  # shares that round to the same
        assert (p * best).amax(-1).equal(p.amax(-1)), "the best token has the largest share"
        if temperature < 1e-37 or top_p < 1e-7:
            assert (p[~best] == 0).all(), "the coldest and the narrowest are greedy"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(value):
    logits = torch.zeros(2, 5)
    logits[1, 2] = value
    for temperature in (0, 1):
        with pytest.raises(ValueError, match=str(value)):
            Sampling(temperature).probabilities(logits)


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": math.inf}, "temperature=inf"),
    ({"temperature": math.nan}, "temperature=nan"), ({"top_k": math.inf}, "top_k=inf"),
    ({"top_k": math.nan}, "top_k=nan"), ({"top_k": 3.0}, "top_k=3.0"),
    ({"top_p": math.nan}, "top_p=nan"), ({"top_p": math.inf}, "top_p=inf"), ({"min_p": math.nan}, "min_p=nan"),
    ({"min_p": -math.inf}, "min_p=-inf"), ({"top_k": -1}, "top_k=-1"), ({"top_k": 2.5}, "top_k=2.5"),
    ({"top_p": 0}, "top_p=0"), ({"top_p": 1.1}, "top_p=1.1"), ({"min_p": 1}, "min_p=1"),
])  # fmt: skip
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_whole_numbers_of_numpy_are_such():
    assert Sampling(top_k=np.int64(5)).top_k == 5


def test_pick_is_exact_at_the_borders():
    """Powers of two have no rounding: u reaches token i in (sum before i, sum with i]; a zero is never picked."""
    p = torch.tensor([0, 0.25, 0, 0.5, 0.25, 0], dtype=torch.float64)
    u = torch.tensor([2.0**-53, 0.25, 0.25 + 2.0**-50, 0.75, 0.75 + 2.0**-50, 1.0], dtype=torch.float64)
    assert pick(p.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4]
    assert pick(8 * p.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4], "rows need not sum to one"


def test_pick_draws_the_distribution():
    """Equally spaced numbers: each token's count is its probability to within one."""
    p = torch.rand(1, 40, generator=torch.Generator().manual_seed(1)).square()
    n = 20_000
    u = (torch.arange(n, dtype=torch.float64) + 1) / n
    counts = pick(p.expand(n, 40), u).bincount(minlength=40)
    assert (counts - n * p[0] / p.sum()).abs().max() <= 1.01


def test_draws_belong_to_seed_and_row():
    three, one = Draws(7, 3), Draws(7, 1)
    table = torch.stack([three.uniform([0, 1, 2]) for _ in range(4)])
    assert torch.equal(torch.cat([one.uniform([0]) for _ in range(4)]), table[:, 0])
    alone = Draws(7, 3)
    assert torch.equal(alone.uniform([2, 2, 2, 2]), table[:, 2]), "a row's numbers depend on the others"
    assert len(table.unique()) == 12 and not torch.equal(Draws(8, 1).uniform([0]), Draws(7, 1).uniform([0]))
    assert not torch.equal(Draws(None, 1).uniform([0]), Draws(None, 1).uniform([0]))


def test_draws_leave_zero_out():
    draws = Draws(0, 1)
    draws.rows[0].random = lambda: 0.0
    assert draws.uniform([0]).tolist() == [1.0]


def test_draws_are_uniform():
    numbers = Draws(0, 1).uniform([0] * 20_000)
    assert numbers.dtype == torch.float64 and numbers.min() > 0 and numbers.max() <= 1
    counts = (numbers * 20).ceil().long().bincount(minlength=21)[1:]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
