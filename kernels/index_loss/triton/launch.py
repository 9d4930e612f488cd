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
DENSE = 2  # entries for each pick, at most, with which tiles of queries go through all of them instead
QUERIES = 256  # looked at in one go for those that see a tile of entries


class Blocks(NamedTuple):
    """Of one product: slots, rows (heads, of as many queries as fit where these share their slots), warps, pipeline
    stages.
    """

    slots: int
    rows: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Of one architecture, for heads of up to 512 channels (teacher) and 128 (student)."""

    teacher: Blocks
    student: Blocks
    gradient: Blocks  # all heads at once, whatever their number


HALF = {  # bf16 and fp16
    "sm_80": Table(Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "sm_89": Table(Blocks(32, 32, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 8, 2)),
    "sm_90": Table(Blocks(64, 64, 4, 2), Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 3)),
    "sm_100": Table(Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 2)),
    "hip": Table(Blocks(16, 32, 4, 1), Blocks(64, 64, 4, 2), Blocks(16, 64, 8, 1)),
}
_SMALL = Blocks(16, 16, 4, 2)
# float32, whose products take no tensor cores, and heads of more channels
PLAIN = Table(_SMALL, _SMALL, Blocks(16, 16, 16, 1))


class Teacher(NamedTuple):
    """What the attention reads with: `q [b, t, h, d]`, `lse [b, t, h]`, its entries `[b, p, d]` as keys."""

    q: Tensor
    lse: Tensor
    keys: Tensor


class Student(NamedTuple):
    """What the indexer scores with, `q [b, t, i, e]`, `weights [b, t, i]`, `keys [b, p, e]`; or their gradients, of the
    sum over queries, in their dtypes but float32 for the keys, and empty unless wanted.
    """

    q: Tensor
    weights: Tensor
    keys: Tensor


class Compared(NamedTuple):
    """Which entries each query compares: its `picks [b, t, k]`, or all from `start` to `end`, `[b|1, t]`."""

    picks: Tensor | None
    start: Tensor
    end: Tensor


class Loss(NamedTuple):
    """Scalars, and the gradients."""

    loss: Tensor
    share: Tensor
    queries: Tensor
    gradients: Student


class Chunk(NamedTuple):
    """Queries of every sequence at work together: the first, how many, and the slots of a row of theirs."""

    first: int
    n: int
    width: int


def table_for(q: Tensor, width: int) -> Table:
    """Blocks for heads of this dtype and width on the current device."""
    return HALF[architecture()] if q.itemsize == 2 and q.shape[-1] <= width else PLAIN


def index_loss(student: Student, teacher: Teacher, compared: Compared, scale: float, wanted: bool) -> Loss:
    """Products are made in the dtypes of the queries, to which the keys are rounded."""
    (b, t, _, e), p, device = student.q.shape, student.keys.shape[1], student.q.device
    dq, dweights = (x.new_empty(x.shape if wanted else (0,)) for x in student[:2])
    dkeys = torch.zeros(student.keys.shape if wanted else (0,), dtype=torch.float32, device=device)
    gradients = Student(dq, dweights, dkeys)
    student = Student(*(x.contiguous() for x in (*student[:2], student.keys.to(student.q.dtype))))
    teacher = Teacher(*(x.contiguous() for x in (*teacher[:2], teacher.keys.to(teacher.q.dtype))))
    keys = student.keys + (student.keys * 0).sum(-1, keepdim=True)  # nan, where any of its channels is not finite: it
    student = student._replace(keys=keys)  # spoils the loss of all that compare it
    finite = student._replace(keys=keys.nan_to_num(0)) if wanted else student
    start, end = (x.expand(b, t).contiguous() for x in compared[1:])
    compared = Compared(None if compared.picks is None else compared.picks.contiguous(), start, end)
    losses = student.q.new_empty(b, t, dtype=torch.float32)
    k = 0 if compared.picks is None else compared.picks.shape[2]
    slots = compared._replace(picks=None) if p <= DENSE * k else compared
    width, scratch = (p, 12) if slots.picks is None else (k, 8 + e * student.q.itemsize)
    most = max(SCRATCH // max(b * width * scratch, 1), LEAST)
    with on_device(student.q):
        for first in range(0, t, most):
            chunk = Chunk(first, min(most, t - first), width)
            mass, scores = (losses.new_empty(b * chunk.n, width) for _ in range(2))
            _sum_heads(teacher, slots, mass, chunk, scale)
            _sum_heads(student, slots, scores, chunk)
            dscores = scores if slots is compared else torch.zeros_like(scores)
            kernels.divergence[b * chunk.n,](
                mass, scores, *compared, dscores, losses, chunk.first, chunk.n, t, k, width, floor=FLOOR,
                PICKED=compared.picks is not None, DENSE=slots.picks is None, BS=ROW,
            )  # fmt: skip
            if wanted:
                _add_gradients(dscores, losses, finite, slots, gradients, chunk)
        share = losses.new_ones(()) if compared.picks is None else _share(teacher, compared, scale)
    queries = (end > start).sum().clamp_min(1).float()
    return Loss(losses.sum() / queries, share, queries, gradients)


def _sum_heads(x: Teacher | Student, compared: Compared, out: Tensor, chunk: Chunk, scale: float | None = None) -> None:
    """`out [b n, slots]`: the teacher's mass, or, without a scale, the student's scores."""
    (b, t, h, d), teacher = x.q.shape, scale is not None
    blocks = table_for(x.q, 512).teacher if teacher else table_for(x.q, 128).student
    options = _options(blocks, h, d, compared.picks is None) | registers(blocks.warps)
    kernels.sum_heads[b * triton.cdiv(chunk.n, options["BQ"]),](
        *x, *compared, out, chunk.first, chunk.n, t, h, d, p=x.keys.shape[1], k=chunk.width, width=chunk.width,
        scale=scale or 0.0, TEACHER=teacher, PICKED=compared.picks is not None, HELD=h <= options["BH"], **options,
    )  # fmt: skip


def _add_gradients(
    dscores: Tensor, losses: Tensor, student: Student, compared: Compared, gradients: Student, chunk: Chunk
) -> None:
    """Writes those of the chunk's queries and weights, adds to those of the keys."""
    (b, t, h, d), p, blocks = student.q.shape, student.keys.shape[1], table_for(student.q, 128).gradient
    first, n, width, picks = *chunk, compared.picks
    blocks = blocks._replace(rows=max(next_power(h), blocks.rows))
    options = _options(blocks, h, d, picks is None) | registers(blocks.warps)
    rows = student.q.new_empty(b, 0 if picks is None else n, width, d)
    kernels.query_gradient[b * triton.cdiv(n, options["BQ"]),](
        dscores, losses, *student, *compared, gradients.q, gradients.weights, rows,
        first, n, t, h, d, p, k=width, width=width, PICKED=picks is not None, **options,
    )  # fmt: skip
    if picks is not None:
        scatter_sum(rows, entry_lists(picks[:, first : first + n], p), gradients.keys)
        return
    tiles = b * triton.cdiv(p, blocks.slots)
    span = triton.cdiv(n, min(max(PROGRAMS // max(tiles, 1), 1), 16))
    parts = gradients.keys.new_empty(triton.cdiv(n, span), *gradients.keys.shape)
    kernels.key_gradient[tiles, len(parts)](
        dscores, *student, compared.start, compared.end, parts,
        first, n, t, h, d, p, width, span=span, QUERIES=QUERIES, **options,
    )  # fmt: skip
    gradients.keys.add_(parts.sum(0))


def _share(teacher: Teacher, compared: Compared, scale: float) -> Tensor:
    """Picked mass over visible mass, the mean over the measured queries that read any entry."""
    assert compared.picks is not None
    at = (slice(None), measured_queries(teacher.q.shape[1]))
    picks, start, end = (x[at] for x in (compared.picks, compared.start, compared.end))
    (b, n), entries = start.shape, teacher.keys.shape[1]
    mass = teacher.q.new_empty(b, n, entries, dtype=torch.float32)
    some = Teacher(teacher.q[at].contiguous(), teacher.lse[at].contiguous(), teacher.keys)
    every = Compared(None, start.contiguous(), end.contiguous())
    _sum_heads(some, every, mass.flatten(0, 1), Chunk(0, n, entries), scale)
    entry = torch.arange(entries, device=mass.device)
    mass = torch.where((entry >= start[..., None]) & (entry < end[..., None]), mass, 0)
    picked = torch.where(picks < 0, 0, mass.gather(2, picks.clamp_min(0))).sum(-1)
    total = mass.sum(-1)
    reads = total > FLOOR
    return torch.where(reads, picked / total, 0).sum() / reads.sum().clamp_min(1)


def _options(b: Blocks, h: int, d: int, shared: bool) -> dict[str, int]:
    """Of a tile of one query, or of several that have the same slots."""
    heads = min(next_power(h, 1 if shared else 16), b.rows)
    tile = {"BQ": max(b.rows // heads, 1) if shared else 1, "BH": heads, "BS": b.slots, "D": next_power(d, 16)}
    return tile | {"num_warps": b.warps, "num_stages": b.stages}
