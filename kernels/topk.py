"""Top-k with a defined order: equal values go to the lowest index, on every machine and at every split.

`torch.topk` leaves the choice among equal values open, which changes what a model computes as soon as scores tie:
ReLU index scores are often exactly zero. Here the selection is a function of the values alone, at the price of
`torch.topk` plus a second look at the rows in which a tie matters.

r rows (all leading axes) · e candidates · k picked
"""

import numpy as np
import torch
from torch import Tensor

SMALL = 1024  # values
SORTED = 4096  # values of a row up to which a device sorts them all: asking for ties would make the host wait
MANY, SPARSE = 1 << 13, 16  # values of a row, and values per pick, from which rows are thinned out first
STRIDE = 61  # every that many values are looked at for a guess


@torch.no_grad()
def stable_topk(values: Tensor, k: int, *, ordered: bool = True) -> Tensor:
    """Indices of the `k` largest values of each row, ties to the lowest index.

    The same as the first `k` of a stable descending sort in which NaN counts as -inf and -0.0 equals 0.0.

    Args:
        values: `[..., e]`, any float dtype.
        k: how many to pick, `1 <= k <= e`.
        ordered: True gives descending values (equal ones by ascending index), False gives ascending indices.

    Returns:
        int64 `[..., k]`; no gradient.

    Raises:
        ValueError: `k` is not in `1..e`.
    """
    if not 1 <= k <= values.shape[-1]:
        raise ValueError(f"k={k}: allowed is 1..{values.shape[-1]}, the number of candidates")
    if values.numel() <= SMALL and _is_numpy(values):
        return _first_of_sorted(values, k, ordered)
    if not ordered and values.shape[-1] >= max(MANY, SPARSE * k) and _is_numpy(values):
        rows = values.detach().reshape(-1, values.shape[-1])
        return torch.stack([_of_one_row(row, k) for row in rows]).view(*values.shape[:-1], k)
    if torch.compiler.is_compiling() or (values.device.type != "cpu" and values.shape[-1] <= SORTED):
        return _first_of_all(values, k, ordered)
    return _with_ties_settled(values, k, ordered)


def _first_of_all(values: Tensor, k: int, ordered: bool) -> Tensor:
    """The definition itself, on a device and in compiled code. A sum with 0.0 makes it of -0.0."""
    falling = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    index = falling.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return index if ordered else index.sort(-1).values


def _with_ties_settled(values: Tensor, k: int, ordered: bool) -> Tensor:
    """`torch.topk`, and a second look at the rows in which a tie matters."""
    top, index = values.topk(k, sorted=ordered)
    redo = torch.count_nonzero(values >= top.amin(-1, keepdim=True), dim=-1) != k  # also where NaN is among the top
    if ordered:
        redo |= (top[..., 1:] == top[..., :-1]).any(-1)
    else:
        index = index.sort(-1).values
    if redo.any():
        index[redo] = _lowest_of_ties(values[redo], k, ordered)
    return index


def _is_numpy(values: Tensor) -> bool:
    return (
        values.device.type == "cpu"
        and values.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    )


def _first_of_sorted(values: Tensor, k: int, ordered: bool) -> Tensor:
    """The definition itself, in numpy; for values so few that calls are what counts."""
    falling = np.fmin(-values.detach().numpy(), np.inf)  # NaN becomes inf
    index = np.argsort(falling, -1, kind="stable")[..., :k]
    return torch.from_numpy(index if ordered else np.sort(index, -1))


def _of_one_row(row: Tensor, k: int) -> Tensor:
    """Of many values: thinned out first by a guess of the k-th largest, a value of a sample that more than k values
    should reach. All of the k largest, and all that equal the k-th, reach a guess which k values reach.
    """
    values = row.numpy()
    sample = values[::STRIDE]
    place = len(sample) - min(len(sample), 2 * k // STRIDE + 16)
    guess = np.partition(sample, place)[place]
    index = np.flatnonzero(values >= guess)
    if len(index) < k or guess == -np.inf:  # NaN counts as -inf, and reaches nothing
        return _with_ties_settled(row, k, False)
    few = values[index]
    cut = guess if np.count_nonzero(few > guess) < k else np.partition(few, len(few) - k)[len(few) - k]
    equal = few == cut
    equal &= equal.cumsum() <= k - np.count_nonzero(few > cut)
    return torch.from_numpy(index[(few > cut) | equal])


def _lowest_of_ties(values: Tensor, k: int, ordered: bool) -> Tensor:
    """The same for rows `[r, e]` with ties: everything above the k-th value, then the first of those equal to it."""
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    cut = values.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = values > cut, values == cut
    room = k - torch.count_nonzero(above, dim=-1)
    picked = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room[:, None]))
    index = picked.nonzero()[:, 1].view(-1, k)
    if ordered:
        index = index.gather(-1, values.gather(-1, index).sort(dim=-1, descending=True, stable=True).indices)
    return index
