"""`index_topk` against a stable sort of scores computed entry by entry."""

import math

import pytest
import torch

from abyssal.kernels.index_topk import index_topk


def scores_of(q, weights, keys):
    hits = torch.einsum("bthd,bpd->bthp", q.double(), keys.double()).relu()
    return torch.einsum("bthp,bth->btp", hits, weights.double())


def oracle(scores, k, start, end):
    b, t, p = scores.shape
    picks = torch.full((b, t, min(k, p)), -1)
    for row in range(b):
        for query in range(t):
            first, last = int(start.expand(b, -1)[row, query]), int(end.expand(b, -1)[row, query])
            visible = scores[row, query, first:last]
            best = visible.sort(descending=True, stable=True).indices[:k].sort().values + first
            picks[row, query, : len(best)] = best
    return picks


def make(b, t, h, d, p, ratio=4, seed=0, integers=False):
    g = torch.Generator().manual_seed(seed)
    draw = (
        (lambda *s: torch.randint(-2, 3, s, generator=g).float())
        if integers
        else (lambda *s: torch.randn(s, generator=g))
    )
    end = ((torch.arange(t) + 1) // ratio).clamp_max(p)[None]
    return draw(b, t, h, d), draw(b, t, h), draw(b, p, d), torch.zeros_like(end), end


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("t, k", [(1, 4), (3, 4), (40, 3), (333, 7), (333, 500)])
def test_equals_a_stable_sort(heads, t, k):
    """Small integers: exact products, and ties and zeros everywhere."""
    q, w, keys, start, end = make(2, t, heads, 4, t // 4, integers=True)
    assert torch.equal(index_topk(q, w, keys, k=k, start=start, end=end), oracle(scores_of(q, w, keys), k, start, end))


def test_ranges_per_query_and_row():
    q, w, keys, _, _ = make(3, 60, 2, 8, 30, integers=True)
    g = torch.Generator().manual_seed(3)
    start = torch.randint(0, 15, (3, 60), generator=g)
    end = start + torch.randint(0, 16, (3, 60), generator=g)
    assert torch.equal(index_topk(q, w, keys, k=5, start=start, end=end), oracle(scores_of(q, w, keys), 5, start, end))


def test_all_scores_equal_gives_the_lowest_entries():
    q, w, keys, start, end = make(1, 80, 2, 4, 20)
    picks = index_topk(q * 0, w, keys, k=3, start=start, end=end)
    assert picks[0, 79].tolist() == [0, 1, 2]


def test_nan_is_not_picked_before_a_number_and_stays_in_its_row():
    q, w, keys, start, end = make(1, 80, 2, 4, 20)
    clean = index_topk(q, w, keys, k=3, start=start, end=end)
    keys[0, 11] = math.nan
    picks = index_topk(q, w, keys, k=3, start=start, end=end)
    assert not (picks == 11).any()
    unaffected = ~(clean == 11).any(-1)
    assert torch.equal(picks[unaffected], clean[unaffected])


def test_real_scores_agree_with_float64():
    q, w, keys, start, end = make(1, 600, 16, 32, 150)
    picks = index_topk(q, w, keys, k=16, start=start, end=end)
    assert torch.equal(picks, oracle(scores_of(q, w, keys), 16, start, end))


def test_prefix_does_not_depend_on_what_follows():
    q, w, keys, start, end = make(1, 400, 1, 8, 100)
    whole = index_topk(q, w, keys, k=9, start=start, end=end)
    part = index_topk(q[:, :123], w[:, :123], keys[:, :30], k=9, start=start[:, :123], end=end[:, :123])
    assert torch.equal(whole[:, :123], part)


def test_no_entries_and_zero_queries():
    q, w, keys, start, end = make(2, 3, 2, 4, 0)
    assert index_topk(q, w, keys, k=4, start=start, end=end).shape == (2, 3, 0)
    q, w, keys, start, end = make(2, 0, 2, 4, 5)
    assert index_topk(q, w, keys, k=4, start=start, end=end).shape == (2, 0, 4)


@pytest.mark.parametrize("change, message", [({"k": 0}, "k=0"), ({"weights": torch.zeros(1, 8, 3)}, "weights")])
def test_bad_input(change, message):
    q, w, keys, start, end = make(1, 8, 2, 4, 2)
    with pytest.raises(ValueError, match=message):
        index_topk(**{"q": q, "weights": w, "keys": keys, "k": 2, "start": start, "end": end, **change})
