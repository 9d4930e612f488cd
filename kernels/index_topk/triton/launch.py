"""Scores and top-k as launches, in chunks of queries whose scores fit a scratch of fixed size.

b batch · t queries · h index heads · d index head dim · p entries · k picks
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, in_rows, next_power, on_device, registers
from . import kernels

SCRATCH = 1 << 28  # bytes of scores at a time, but at least one tile of queries with all its entries
HELD = (1 << 10, 1 << 12, 1 << 14, 1 << 16)  # entries of rows that do not stream, each with a kernel of its own
GROUPED = 1 << 10  # entries of a row, above which those of its best groups are looked at alone
STREAMED = 2048  # entries of a row at a time


class Blocks(NamedTuple):
    """Of the scores: queries and entries of a tile, warps, pipeline stages."""

    queries: int
    entries: int
    warps: int
    stages: int


HALF = {  # bf16 and fp16, d <= 128
    "sm_80": Blocks(128, 128, 8, 3),
    "sm_89": Blocks(128, 64, 8, 2),
    "sm_90": Blocks(64, 128, 4, 3),
    "sm_100": Blocks(128, 128, 8, 3),
    "hip": Blocks(64, 64, 8, 2),
}
FEW = 64  # queries for which a tile of so many will do; Hopper's tensor cores take no fewer and sum them alike
ONE = Blocks(1, 64, 4, 2)  # each of still fewer, whose heads are multiplied at once
ONE_PLAIN = Blocks(1, 16, 8, 2)
STILL_FEWER, HEADS = 4, 64
WIDE = Blocks(32, 32, 4, 2)  # heads of more channels
PLAIN = Blocks(16, 16, 8, 2)  # float32, whose products take no tensor cores; of larger ones triton 3.9 spills


def blocks_for(q: Tensor) -> Blocks:
    """The tile for queries of this number, dtype and width on the current device."""
    if q.shape[1] <= STILL_FEWER:
        return ONE if q.itemsize == 2 else ONE_PLAIN
    if q.itemsize != 2:
        return PLAIN
    if q.shape[-1] > 128:
        return WIDE
    blocks = HALF[architecture()]
    return blocks._replace(queries=FEW) if q.shape[1] <= FEW else blocks


class Inputs(NamedTuple):
    """`q [b, t, h, d]`, `weights [b, t, h]`, `keys [b, p, d]` in rows, `start`, `end` `[b, t]`; else contiguous."""

    q: Tensor
    weights: Tensor
    keys: Tensor
    start: Tensor
    end: Tensor


class Chunk(NamedTuple):
    """Tiles of queries at work together: the first of them, how many, and how many queries each holds."""

    first: int
    tiles: int
    queries: int


def index_topk(q: Tensor, weights: Tensor, keys: Tensor, k: int, start: Tensor, end: Tensor) -> Tensor:
    """`picks [b, t, min(k, p)]` int64. Products are made in the dtype of q, to which keys are rounded."""
    (b, t, _, _), p, queries = q.shape, keys.shape[1], blocks_for(q).queries
    bounds = (x.expand(b, t).contiguous() for x in (start, end))
    x = Inputs(q.contiguous(), weights.contiguous(), in_rows(keys.to(q.dtype)), *bounds)
    picks = q.new_empty(b, t, min(k, p), dtype=torch.int64)
    width, tiles = triton.cdiv(max(p, 1), 16) * 16, b * triton.cdiv(t, queries)
    most = max(SCRATCH // (4 * width * queries), 1)
    scratch = q.new_empty(min(most, tiles) * queries if p > k else 0, width, dtype=torch.float32)
    with on_device(q):
        for first in range(0, tiles, most):
            chunk = Chunk(first, min(most, tiles - first), queries)
            if p > k:
                scores(x, scratch, chunk, k)
            select(scratch, x.start, x.end, picks, chunk, k)
    return picks


def scores(x: Inputs, out: Tensor, chunk: Chunk, k: int) -> None:
    """Rows of `out [tiles queries, width]`: what the crowded queries of the chunk see."""
    (_, t, h, d), p, b = x.q.shape, x.keys.shape[1], blocks_for(x.q)
    kernel, rows = kernels.index_scores, {"BQ": b.queries}
    if b.queries == 1:
        kernel, rows = kernels.index_scores_of_few, {"BH": min(next_power(h, 16), HEADS if x.q.itemsize == 2 else 16)}
    kernel[chunk.tiles * triton.cdiv(p, b.entries),](
        *x, out, chunk.first, t, h, d, p, x.keys.stride(0) // d, k, out.shape[1] // 16,
        **rows, BP=b.entries, D=next_power(d, 16), num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip


def select(scores: Tensor, start: Tensor, end: Tensor, picks: Tensor, chunk: Chunk, k: int) -> None:
    """The picks of the chunk from the rows `scores [tiles queries, width]`."""
    (_, t), width = start.shape, scores.shape[1]
    n, best, each = next((n for n in HELD if n >= width), 0), next_power(k), 1024 if architecture() == "sm_90" else 512
    group = 1 << max((n // best).bit_length() - 1, 0) // 2 if n > GROUPED else 1
    held = max(n // group, best * group if group > 1 else n)  # maxima, then entries of the best groups
    if held > 8 * each:
        n = held = 0
    warps = max(held // each if held else STREAMED // 512, 1)
    wide = max(min(group, each * warps * group // max(n, 1)), 1)
    kernels.select[chunk.tiles * chunk.queries,](
        scores, start, end, picks, chunk.first, t, k, picks.shape[2], width // 16, chunk.queries,
        HELD=n > 0, N=n or STREAMED, G=group, W=wide, K=best if group > 1 else 1, C=min(n or STREAMED, STREAMED),
        **registers(warps),
    )  # fmt: skip
