"""What routing returns: which experts each token visits, with which weight, and where its rows lie in expert order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The choice of a router: `scores [n, e]`, `experts [n, k]` int64, `weights [n, k]`."""

    scores: Tensor
    experts: Tensor
    weights: Tensor


class Permutation(NamedTuple):
    """(token, slot) pairs sorted by expert: `order [n k]` row -> pair, `counts [e]`, `inverse [n, k]` pair -> row."""

    order: Tensor
    counts: Tensor
    inverse: Tensor


class Balance(NamedTuple):
    """How evenly experts are visited: the scalar `loss`, and `counts [e]` int64, the assignments of real tokens."""

    loss: Tensor
    counts: Tensor


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """Raise IndexError unless the ids lie in `0..limit-1`; not on CUDA, where looking would wait for the device,
    nor in compiled code."""
    if ids.is_cuda or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= limit:
        raise IndexError(f"{name} contains {low if low < 0 else high}: allowed is 0..{limit - 1}")
