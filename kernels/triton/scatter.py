"""Gradients of picked entries: a scatter-sum in one fixed order, without atomics.

    out[entry] = sum of rows[token, slot] over the pairs that picked it, tokens ascending, then slots ascending

A stable sort of the picks gives each entry the list of its pairs; then every entry, not every pair, owns a program. A
list is summed in tiles of ROWS pairs, each tile as a tree, the tiles in order: what is added to what depends on places
in the list alone. Queries may come in chunks: each has lists of its own, and its sums are added to those before.

Float atomics, which add in any order and so change the last bits from run to run, replace it where the environment
variable ABYSSAL_ATOMICS is 1: faster with long lists of picks, and without memory for a row per pick.

b batch · t queries · k slots · p entries · d channels · r = b t k pairs
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import next_power, on_device, registers

ROWS = 32  # pairs of a tile
COLUMNS = 128  # channels of a program, at most
BLOCK = 512  # picks or bounds of a program


class Lists(NamedTuple):
    """Pairs `[r]` int64 in the order of their entries; those of entry j of sequence i lie from `offsets[i, j]` to
    `offsets[i, j + 1]` (int64 `[b, p + 1]`).
    """

    pairs: Tensor
    offsets: Tensor


def atomics() -> bool:
    """Whether ABYSSAL_ATOMICS asks for float atomics; they are off unless it is 1.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("ABYSSAL_ATOMICS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"ABYSSAL_ATOMICS={value!r}: allowed are 0 (the same bits on each run) and 1 (float atomics)")
    return value == "1"


def entry_lists(picks: Tensor, entries: int) -> Lists:
    """Who picked what: picks int64 `[b, t, k]`, an id outside `0..entries-1` (-1) is none, repeats are legal."""
    picks, (b, t, k), r = picks.contiguous(), picks.shape, picks.numel()
    bounds = b * (entries + 1)  # what is no entry is one more per sequence, the last
    keys = picks.new_empty(r, dtype=torch.int32 if bounds < 2**31 else torch.int64)
    offsets = picks.new_empty(b, entries + 1)
    with on_device(picks):
        entry_keys[triton.cdiv(r, BLOCK),](picks, keys, r, t * k, entries, BLOCK=BLOCK)
        ordered, pairs = torch.sort(keys, stable=True)
        first_places[triton.cdiv(bounds, BLOCK),](ordered, offsets, bounds, r, r.bit_length(), BLOCK=BLOCK)
    return Lists(pairs, offsets)


def scatter_sum(rows: Tensor, lists: Lists, into: Tensor | None = None) -> Tensor:
    """`out[b, p, d]` float32, `out[i, j] = sum of rows[pair] over the pairs of entry j`, zero for an empty list.

    Args:
        rows: `[b, t, k, d]`, any floating dtype; rows of no entry are never read.
        lists: those of the same picks.
        into: float32 `[b, p, d]`, contiguous: the sums are added to it, and it is returned.
    """
    rows, (b, bounds), d = rows.contiguous(), lists.offsets.shape, rows.shape[-1]
    out = rows.new_empty(b, bounds - 1, d, dtype=torch.float32) if into is None else into
    columns = min(next_power(d), COLUMNS)
    with on_device(rows):
        sum_lists[b * (bounds - 1), triton.cdiv(d, columns)](
            rows, lists.pairs, lists.offsets, out, bounds - 1, d,
            ADD=into is not None, ROWS=ROWS, COLUMNS=columns, **registers(1),  # most lists are short, or empty
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["r", "per_sequence", "entries"])
def entry_keys(picks, keys, r, per_sequence, entries, BLOCK: tl.constexpr):
    """keys [r]: entry, or `entries` where there is none, after those of the sequences before."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(picks + at, mask=at < r, other=-1)
    entry = tl.where((entry >= 0) & (entry < entries), entry, entries)
    tl.store(keys + at, at // per_sequence * (entries + 1) + entry, mask=at < r)


@triton.jit(do_not_specialize=["bounds", "r", "bits"])
def first_places(ordered, offsets, bounds, r, bits, BLOCK: tl.constexpr):
    """offsets [bounds]: how many of `ordered [r]` lie below each, found bit by bit from the highest of r on."""
    bound = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.zeros((BLOCK,), tl.int64)
    for i in range(bits):
        further = place + (tl.full((BLOCK,), 1, tl.int64) << (bits - 1 - i))
        key = tl.load(ordered + further - 1, mask=further <= r, other=0)
        place = tl.where((further <= r) & (key < bound), further, place)
    tl.store(offsets + bound, place, mask=bound < bounds)


@triton.jit(do_not_specialize=["p"])
def sum_lists(
    rows, pairs, offsets, out, p, d, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [b p, d] (+)= the sum of rows [r, d] over the list of one entry, COLUMNS channels."""
    entry = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets += entry // p * (p + 1) + entry % p
    last = tl.load(offsets + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(tl.load(offsets), last, ROWS):
        place = start + tl.arange(0, ROWS)
        pair = tl.load(pairs + place, mask=place < last, other=0)
        at = rows + pair[:, None] * d + column[None, :]
        tile = tl.load(at, mask=(place < last)[:, None] & (column < d)[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=0)
    at = out + entry * d + column
    if ADD:
        total += tl.load(at, mask=column < d, other=0.0)
    tl.store(at, total, mask=column < d)
