"""`stable_topk` is the first k of a stable descending sort, whichever way it goes: sorting, thinning, torch's own."""

import math

import pytest
import torch

from abyssal.kernels import topk


def first_of_sorted(values, k):
    """The definition: NaN counts as -inf, -0.0 equals 0.0."""
    values = torch.where(values.isnan(), -math.inf, values.double()) + 0.0
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("k", [1, 3, 10, 12])
def test_short_rows_of_special_values(k, ordered, dtype, monkeypatch):
    """By numpy, where values are few, by torch, and as a device sorts them."""
    special = torch.tensor([-math.inf, -1, -0.0, 0, 1, 1, torch.finfo(dtype).max, math.inf, math.nan], dtype=dtype)
    values = special[torch.randint(0, 9, (3, 50, 24), generator=torch.Generator().manual_seed(k))]
    want = first_of_sorted(values, k)
    for most in (0, 10**6, None):
        monkeypatch.setattr(topk, "SMALL", most)
        got = (topk.stable_topk if most is not None else topk._first_of_all)(values, k, ordered=ordered)
        assert got.dtype == torch.int64 and torch.equal(got, want if ordered else want.sort(-1).values)


def sampled(x):
    return torch.arange(x.shape[-1]) % topk.STRIDE == 0


def sparse_nan(x):
    return x.masked_fill(torch.rand_like(x) < 0.1, torch.nan)


LONG = {  # of normal numbers: a guess from every 61st is good, or misleads
    "distinct": lambda x: x,
    "rising": lambda x: x.sort(-1).values,
    "few levels": lambda x: (2 * x).round(),
    "many zeros": torch.relu,
    "zero is the most": lambda x: -torch.relu(x),
    "equal": torch.zeros_like,
    "zero but for the last": lambda x: torch.where(torch.arange(x.shape[-1]) > x.shape[-1] - 3, 1, 0 * x),
    "a few above many equal ones": lambda x: torch.where(x > 2.5, x, 1),
    "sample far too high": lambda x: x + 9 * sampled(x),
    "sample far too low": lambda x: x - 9 * sampled(x),
    "few finite": lambda x: torch.where(torch.arange(x.shape[-1]) < 150, x, -math.inf),
    "hidden but for a few": lambda x: torch.where(x > 2.5, x, -math.inf),
    "half infinite": lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, math.inf),
    "infinite": lambda x: torch.where(x > 1, math.inf, x),
    "some NaN": sparse_nan,
    "NaN and -inf": lambda x: sparse_nan(x).masked_fill(torch.rand_like(x) < 0.95, -math.inf),
    "NaN but for a few": lambda x: torch.where(x > 2.5, -math.inf, math.nan),
    "NaN in the sample": lambda x: x.masked_fill(sampled(x), math.nan),
    "NaN": lambda x: math.nan * x,
}


def long_rows(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return LONG[kind](torch.randn(2, 2, 9001, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("k", [1, 2, 17, 61, 200, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_long_rows_are_thinned_out_exactly(kind, k, dtype):
    """The last row is an easy one."""
    values = long_rows(kind, dtype)
    values[-1, -1] = long_rows("distinct", dtype)[0, 0].flip(0)
    assert values.shape[-1] >= max(topk.MANY, topk.SPARSE * k)
    assert torch.equal(topk.stable_topk(values, k, ordered=False), first_of_sorted(values, k).sort(-1).values)


def test_a_guess_is_trusted_only_where_k_values_reach_it(monkeypatch):
    """Guards the test above: half of its rows and more go by the guess, not those whose sample misleads."""
    settled, original = [], topk._with_ties_settled
    monkeypatch.setattr(topk, "_with_ties_settled", lambda *given: settled.append(kind) or original(*given))
    for kind in LONG:
        topk.stable_topk(long_rows(kind)[0, 0], 200, ordered=False)
    assert "sample far too high" in settled and len(settled) < len(LONG) / 2


@pytest.mark.parametrize("k", [0, 6])
def test_k_beyond_the_candidates(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        topk.stable_topk(torch.zeros(2, 5), k)
