"""Teacher, student, loss and gradients as launches, a chunk of queries at a time.

b batch · t queries · h attention heads · d head dim · i index heads · e index head dim · p entries · k picks
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, next_power, on_device, registers
from ...triton.scatter import entry_lists, scatter_sum
from ..reference import FLOOR, measured_queries
from . import kernels

SCRATCH = 1 << 28  # bytes of mass, scores and picked gradients at a time, but at least those of LEAST queries
LEAST = 16
ROW = 256  # slots of a row at a time
PROGRAMS = 1024  # of the keys' gradient without picks, about
QUERIES = 256  # looked at in one go for those that see a tile of entries


class Blocks(NamedTuple):
    """Of one product: slots, heads (at most), warps, pipeline stages."""

    slots: int
    heads: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Of one architecture, for heads of up to 512 channels (teacher) and 128 (student)."""

    teacher: Blocks
    student: Blocks
    gradient: Blocks  # all heads at once, whatever their number


HALF = {  # bf16 and fp16
    "sm_80": Table(Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "sm_86": Table(Blocks(32, 32, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2)),
    "sm_90": Table(Blocks(64, 64, 4, 2), Blocks(128, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "sm_100": Table(Blocks(32, 64, 4, 2), Blocks(128, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "hip": Table(Blocks(16, 32, 4, 1), Blocks(64, 64, 4, 2), Blocks(16, 64, 8, 1)),
}
_SMALL = Blocks(16, 16, 4, 2)
PLAIN = Table(
    _SMALL, _SMALL, Blocks(16, 16, 16, 1)
)  # float32, whose products take no tensor cores, and heads of more channels


class Loss(NamedTuple):
    """Scalars, and gradients of the sum over queries in the dtypes of queries, weights and (keys) float32; empty unless
    wanted.
    """

    loss: Tensor
    share: Tensor
    queries: Tensor
    dq: Tensor
    dweights: Tensor
    dkeys: Tensor


class _Student(NamedTuple):
    q: Tensor
    weights: Tensor
    keys: Tensor


class _Set(NamedTuple):
    """Which entries each query compares: its `picks [b, t, k]`, or all from `start` to `end`, `[b, t]`."""

    picks: Tensor | None
    start: Tensor
    end: Tensor


def table_for(q: Tensor, width: int) -> Table:
    """Blocks for heads of this dtype and width on the current device."""
    return HALF[architecture()] if q.itemsize == 2 and q.shape[-1] <= width else PLAIN


def index_loss(
    index_q: Tensor, index_weights: Tensor, index_keys: Tensor, q: Tensor, compressed: Tensor, lse: Tensor,
    scale: float, start: Tensor, end: Tensor, index: Tensor | None, wanted: bool,
) -> Loss:  # fmt: skip
    """Products are made in the dtypes of index_q and q, to which index_keys and compressed are rounded."""
    (b, t, _, e), p = index_q.shape, compressed.shape[1]
    student = _Student(index_q.contiguous(), index_weights.contiguous(), index_keys.to(index_q.dtype).contiguous())
    teacher = q.contiguous(), lse.contiguous(), compressed.to(q.dtype).contiguous()
    over = _Set(None if index is None else index.contiguous(), *(x.expand(b, t).contiguous() for x in (start, end)))
    losses = q.new_empty(b, t, dtype=torch.float32)
    dq, dweights = (x.new_empty(x.shape if wanted else (0,)) for x in (index_q, index_weights))
    dkeys = torch.zeros(index_keys.shape if wanted else (0,), dtype=torch.float32, device=q.device)
    width = p if index is None else index.shape[2]
    chunk = max(SCRATCH // max(b * width * (8 if index is None else 8 + e * index_q.itemsize), 1), LEAST)
    with on_device(q):
        for first in range(0, t, chunk):
            n = min(chunk, t - first)
            mass, scores = (q.new_empty(b * n, width, dtype=torch.float32) for _ in range(2))
            _sum_heads(*teacher, over, mass, first, n, scale)
            _sum_heads(*student, over, scores, first, n, None)
            kernels.divergence[b * n,](
                mass, scores, *over, losses, first, n, t, width, width, FLOOR,
                PICKED=index is not None, BS=min(next_power(width, 16), ROW),
            )  # fmt: skip
            if wanted:
                _gradients(scores, student, over, dq, dweights, dkeys, first, n)
        share = torch.ones((), device=q.device) if index is None else _share(*teacher, over, scale)
    queries = (end > start).expand(b, t).sum().clamp_min(1).float()
    return Loss(losses.sum() / queries, share, queries, dq, dweights, dkeys)


def _sum_heads(
    q: Tensor, per_head: Tensor, keys: Tensor, over: _Set, out: Tensor, first: int, n: int, scale: float | None
) -> None:
    """`out [b n, slots]`: the teacher's mass, or, without a scale, the student's scores."""
    (b, t, h, d), width = q.shape, out.shape[1]
    blocks = table_for(q, 128).student if scale is None else table_for(q, 512).teacher
    options = _options(blocks, h, d)
    kernels.sum_heads[b * n,](
        q, per_head, keys, *over, out, first, n, t, h, d, keys.shape[1], width, width, scale or 0.0,
        TEACHER=scale is not None, PICKED=over.picks is not None, HELD=h <= options["BH"], **options,
    )  # fmt: skip


def _gradients(
    dscores: Tensor, student: _Student, over: _Set, dq: Tensor, dweights: Tensor, dkeys: Tensor, first: int, n: int
) -> None:
    """Writes dq and dweights of the chunk, adds to `dkeys [b, p, e]`."""
    (b, t, h, d), width, picked = dq.shape, dscores.shape[1], over.picks is not None
    p, blocks = dkeys.shape[1], table_for(dq, 128).gradient
    options = _options(blocks._replace(heads=next_power(h, 16)), h, d) | registers(blocks.warps)
    rows = dq.new_empty(b, n if picked else 0, width, d)
    kernels.query_gradient[b * n,](
        dscores, *student, *over, dq, dweights, rows, first, n, t, h, d, p, width, width, PICKED=picked, **options
    )
    if over.picks is not None:
        scatter_sum(rows, entry_lists(over.picks[:, first : first + n], p), dkeys)
        return
    tiles = b * triton.cdiv(p, blocks.slots)
    span = triton.cdiv(n, min(max(PROGRAMS // max(tiles, 1), 1), 16))
    parts = dkeys.new_empty(triton.cdiv(n, span), *dkeys.shape)
    kernels.key_gradient[tiles, len(parts)](
        dscores, *student, over.start, over.end, parts, first, n, t, h, d, p, width, span, QUERIES=QUERIES, **options
    )
    for part in parts:
        dkeys += part


def _share(q: Tensor, lse: Tensor, compressed: Tensor, over: _Set, scale: float) -> Tensor:
    """Picked mass over visible mass, the mean over the measured queries that read any entry."""
    assert over.picks is not None
    at = (slice(None), measured_queries(q.shape[1]))
    picks, start, end = over.picks[at], over.start[at].contiguous(), over.end[at].contiguous()
    b, n = start.shape
    mass = q.new_empty(b, n, compressed.shape[1], dtype=torch.float32)
    some = q[at].contiguous(), lse[at].contiguous(), compressed
    _sum_heads(*some, _Set(None, start, end), mass.flatten(0, 1), 0, n, scale)
    slot = torch.arange(mass.shape[2], device=q.device)
    mass = torch.where(slot < (end - start)[..., None], mass, 0)
    picked = torch.where(picks < 0, 0, mass.gather(2, (picks - start[..., None]).clamp_min(0))).sum(-1)
    total = mass.sum(-1)
    reads = total > FLOOR
    return torch.where(reads, picked / total, 0).sum() / reads.sum().clamp_min(1)


def _options(b: Blocks, h: int, d: int) -> dict[str, int]:
    heads = min(next_power(h, 16), b.heads)
    return {"BH": heads, "BS": b.slots, "D": next_power(d, 16), "num_warps": b.warps, "num_stages": b.stages}
