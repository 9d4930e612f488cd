"""The ordered scatter-sum of picked entries against a loop: repeats, none, empty and long lists, chunks, the order."""

from itertools import pairwise

import pytest
import torch

from abyssal.kernels.triton import scatter as triton_scatter
from abyssal.kernels.triton.scatter import entry_lists, scatter_sum


def picks_of(b, t, k, p, device, seed=0):
    return torch.randint(-1, p, (b, t, k), generator=torch.Generator().manual_seed(seed)).to(device)


def loop(rows, picks, p):
    out = torch.zeros(rows.shape[0], p, rows.shape[-1], dtype=torch.float64, device=rows.device)
    for i, t, k in torch.cartesian_prod(*(torch.arange(n) for n in picks.shape)).tolist():
        if 0 <= picks[i, t, k] < p:
            out[i, picks[i, t, k]] += rows[i, t, k].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "t", "k", "p", "d"), [(1, 1, 1, 1, 1), (2, 9, 3, 5, 20), (1, 25, 4, 2, 16), (2, 3, 2, 30, 6)]
)
def test_sums(monkeypatch, device, b, t, k, p, d, dtype):
    monkeypatch.setattr(triton_scatter, "COLUMNS", 16)
    picks = picks_of(b, t, k, p, device)
    rows = torch.randn(b, t, k, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    got, want = scatter_sum(rows, entry_lists(picks, p)), loop(rows, picks, p)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_lists_are_in_the_order_of_tokens_and_slots(device):
    picks = torch.tensor([[[1, 1, -1], [0, 7, 1]], [[-1, -1, -1], [1, 0, 1]]], device=device)
    lists = entry_lists(picks, 2)
    found = [[lists.pairs[i:j].tolist() for i, j in pairwise(row)] for row in lists.offsets.tolist()]
    assert found == [[[3], [0, 1, 5]], [[10], [9, 11]]]


def test_rows_of_no_entry_are_not_read(device):
    picks = torch.tensor([[[0, -1], [-1, 2], [5, 0]]], device=device)
    rows = torch.ones(1, 3, 2, 4, device=device)
    rows[0, 0, 1], rows[0, 1, 0], rows[0, 2, 0] = float("nan"), float("inf"), float("nan")
    assert scatter_sum(rows, entry_lists(picks, 3))[0, :, 0].tolist() == [2.0, 0.0, 1.0]


def test_chunks_are_added_in_order(device):
    """1e8 + 1 - 1e8 is 0 in float32 in this order, and 1 in others."""
    values, picks = (
        torch.tensor([1e8, 1.0, -1e8], device=device),
        torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
    )
    total = torch.zeros(1, 2, 4, device=device)
    for value in values:
        assert scatter_sum(value.expand(1, 1, 1, 4), entry_lists(picks, 2), total) is total
    assert not total.any()


def test_tiles_of_a_list_are_added_in_order(device):
    """One value per tile, so that only the order between tiles counts."""
    rows = torch.zeros(1, 3 * triton_scatter.ROWS, 1, 4, device=device)
    rows[0, :: triton_scatter.ROWS, 0] = torch.tensor([1e8, 1.0, -1e8], device=device)[:, None]
    picks = torch.zeros(rows.shape[:3], dtype=torch.int64, device=device)
    assert not scatter_sum(rows, entry_lists(picks, 1)).any()


@pytest.mark.parametrize(("b", "t", "k", "p"), [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0), (0, 3, 2, 4)])
def test_nothing_to_sum(device, b, t, k, p):
    picks = picks_of(b, t, k, max(p, 1), device) - int(p == 0)
    out = scatter_sum(torch.ones(b, t, k, 8, device=device), entry_lists(picks, p))
    assert out.shape == (b, p, 8) and not out.any()
