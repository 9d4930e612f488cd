"""`stable_topk` is the first k of a stable descending sort, whichever way it goes: sorting, thinning, torch's own."""

import pytest
import torch

from abyssal.kernels import topk


def first_of_sorted(values, k):
    """The definition, ascending."""
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values


def sparse_nan(x):
    return x.masked_fill(torch.rand_like(x) < 0.1, torch.nan)


KINDS = {
    "distinct": lambda x: x,
    "few levels": lambda x: (2 * x).round(),
    "many zeros": torch.relu,
    "zero is the most": lambda x: -torch.relu(x),
    "some NaN": sparse_nan,
    "NaN and -inf": lambda x: sparse_nan(x).masked_fill(torch.rand_like(x) < 0.95, -torch.inf),
    "few finite": lambda x: torch.where(torch.arange(x.shape[-1]) < 150, x, -torch.inf),
    "half infinite": lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, torch.inf),
    "equal": torch.zeros_like,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 61, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_rows_are_thinned_out_exactly(kind, k, dtype):
    torch.manual_seed(k)
    values = KINDS[kind](torch.randn(2, 3, 9001, dtype=dtype))
    assert values.shape[-1] >= max(topk.MANY, topk.SPARSE * k)
    assert torch.equal(topk.stable_topk(values, k, ordered=False), first_of_sorted(values, k))


def test_a_guess_that_too_few_reach_is_not_trusted(monkeypatch):
    """The sample holds the largest values: fewer than k reach it."""
    values = torch.randn(9001)
    values[:: topk.STRIDE] += 100
    called = []
    settled = topk._with_ties_settled
    monkeypatch.setattr(topk, "_with_ties_settled", lambda *args: called.append(args) or settled(*args))
    assert torch.equal(topk.stable_topk(values, 200, ordered=False), first_of_sorted(values, 200))
    assert called


def tied_rows(width):
    """Rows in which every kind of tie occurs."""
    generator = torch.Generator().manual_seed(0)
    normal, chance = (draw(40, width, generator=generator) for draw in (torch.randn, torch.rand))
    few = torch.randint(-1, 2, (40, width), generator=generator).float()  # ties at every rank
    signed = torch.where(chance[:20] < 0.5, 0.0, -0.0)
    hidden, nan = (
        normal[:20].masked_fill(chance[:20] < 0.7, -torch.inf),
        few[:20].masked_fill(chance[20:] < 0.3, torch.nan),
    )
    constant = torch.tensor([0.0, -torch.inf, torch.nan, torch.inf]).repeat_interleave(2)[:, None].expand(8, width)
    return torch.cat([normal, few, signed, hidden, nan, constant])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 3), (16, 4), (33, 33), (160, 6), (257, 64)])
def test_ties_in_short_rows_of_any_shape(width, k, ordered):
    rows = tied_rows(width)
    for values in (rows, rows.bfloat16(), rows.double(), rows.view(2, -1, width), rows.T.contiguous().T):
        counted = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        want = counted.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        assert torch.equal(topk.stable_topk(values, k, ordered=ordered), want if ordered else want.sort(-1).values)


def test_no_rows_and_refused_k():
    assert topk.stable_topk(torch.zeros(0, 5), 2).shape == (0, 2)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}"):
            topk.stable_topk(torch.zeros(3, 5), k)
