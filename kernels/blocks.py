"""Blocks of queries: how the eager engines keep their memory linear in the sequence length.

An engine never holds a score for every (query, key) pair. It walks over the queries in blocks, small enough that the
scores of one block stay in a CPU's cache, and looks only at the keys that the block can see.

b batch · t queries · p compressed entries
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES_PER_BLOCK = 1 << 20  # float32 scores of one block: 4 MiB
SMALLEST, LARGEST = 16, 256


def query_blocks(queries: int, scores_per_query: int, largest: int = LARGEST) -> Iterator[slice]:
    """Slices that cover `queries`, each of about SCORES_PER_BLOCK scores; a function of shapes only."""
    size = max(SMALLEST, min(largest, SCORES_PER_BLOCK // max(scores_per_query, 1)))
    for first in range(0, queries, size):
        yield slice(first, min(first + size, queries))


def visible_entries(start: Tensor, end: Tensor, block: slice) -> slice:
    """The smallest range of compressed entries that holds everything the block's queries see. start, end: [b|1, t]."""
    first, last = int(start[:, block].min()), int(end[:, block].max())
    return slice(first, max(first, last))


def outside(entry: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """True where an entry is not in its query's range. entry: [p] or [b, t, p]; start, end: [b|1, t]."""
    return (entry < start[..., None]) | (entry >= end[..., None])


def hidden_entries(seen: slice, start: Tensor, end: Tensor) -> Tensor:
    """[b|1, t, p] True for the entries of `seen` that a query does not see."""
    return outside(torch.arange(seen.start, seen.stop, device=start.device), start, end)


def sharing_pays(entries: int, picks: int, heads: int) -> bool:
    """Masked scores over all entries against copying the picks: a copy serves all heads, so that many heads favour
    copying.
    """
    return entries <= picks * (1 + 28 / heads)
