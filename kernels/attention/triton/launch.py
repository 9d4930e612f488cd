"""Forward and backward of attention as launches: no host synchronisation, every grid a function of shapes.

    forward    q, kv, compressed, sink -> out, lse
    backward   for each chunk of queries: dq, <do, out>, and p and ds of each (query, head) on the keys that it sees;
               from them dkv and dcompressed, tiles of keys over queries in order; chunks are added in order

For dcompressed an index is used in two ways. Where entries are few (`DENSE`) it becomes counts, and they are treated as
a range. Else each (query, slot) gets a row of its own, and `triton_scatter` sums up those of an entry.

b batch · t queries · n queries of a chunk · s window rows · p entries · k picks · h heads · d head dim
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, next_power, on_device, registers
from ...triton.scatter import atomics, entry_lists, scatter_sum
from . import kernels
from .tiles import HALF, SINGLE, Blocks, Owned, Tiles

BUDGET = 1 << 30  # bytes of p, ds and rows of picks: a chunk is as many queries as that holds
CHUNK = 64  # queries that a chunk, or a program's share of them, is a multiple of
DENSE = 4  # entries per pick up to which to look at all of them is less work than to give each pick a row
PROGRAMS = 256  # that occupy a large GPU
FINITE = 1e30  # stands for an infinite sink


class Sight(NamedTuple):
    """What queries see: `window` rows from `window_start [b|1, t]` on, and entries from `start` to `end` [b|1, t] or
    those of `picks [b, t, k]`.
    """

    window: int
    window_start: Tensor | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    picks: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    q: bool = True
    kv: bool = True
    compressed: bool = True
    sink: bool = True


class Gradients(NamedTuple):
    """None where not asked for."""

    q: Tensor | None
    kv: Tensor | None
    compressed: Tensor | None
    sink: Tensor | None


class _Inputs(NamedTuple):
    """As kernels read them: contiguous, bounds [b, t]; `entries` says how entries are seen, see triton_kernels."""

    q: Tensor
    kv: Tensor
    compressed: Tensor | None
    sight: Sight
    entries: str
    scale: float

    @property
    def sizes(self) -> dict[str, Any]:
        """Shapes, and what else all kernels that go by query are told."""
        _, t, h, d = self.q.shape
        p = 0 if self.compressed is None else self.compressed.shape[1]
        k = 0 if self.sight.picks is None else self.sight.picks.shape[2]
        flags = {"ENTRIES": self.entries, "DOCUMENTS": self.sight.window_start is not None}
        shapes = {"t": t, "s": self.kv.shape[1], "p": p, "k": k, "h": h, "d": d}
        return {**shapes, "window": self.sight.window, "scale": self.scale, **flags}


def tiles_for(q: Tensor) -> Tiles:
    """The table for this dtype on the current device."""
    return HALF[architecture()] if q.itemsize == 2 else SINGLE


def forward(
    q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, sight: Sight, scale: float
) -> tuple[Tensor, Tensor]:
    """`out [b, t, h, d]` and the log-sum-exp `[b, t, h]`, which counts the sink."""
    x = _inputs(q, kv, compressed, sight, scale)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    groups, blocks = _by_query(x, tiles_for(q).forward)
    with on_device(q):
        kernels.attention_forward[q.shape[0] * q.shape[1] * groups,](
            x.q, x.kv, x.compressed, sink.contiguous(), *x.sight[1:], out, lse, **x.sizes, **blocks
        )
    return out, lse


def _inputs(q: Tensor, kv: Tensor, compressed: Tensor | None, sight: Sight, scale: float) -> _Inputs:
    b, t = q.shape[:2]
    first, start, end = (
        None if x is None else x.expand(b, t).contiguous() for x in (sight.window_start, sight.start, sight.end)
    )
    index = None if sight.picks is None else sight.picks.contiguous()
    entries = "range" if index is None else "list"
    if compressed is None or compressed.shape[1] == 0 or (index is not None and index.shape[2] == 0):
        compressed, entries = None, "none"
    compressed = None if compressed is None else compressed.contiguous()
    if index is not None and entries == "list":
        end = index.new_empty(b, t, dtype=torch.int32)
        with on_device(q):
            kernels.used_slots[b * t,](index, end, index.shape[2], K=next_power(index.shape[2]))
    return _Inputs(
        q.contiguous(), kv.contiguous(), compressed, Sight(sight.window, first, start, end, index), entries, scale
    )


def _by_query(x: _Inputs, b: Blocks) -> tuple[int, dict[str, int]]:
    """Programs of a query, and their blocks; little work takes few warps."""
    h, width = x.sizes["h"], next_power(x.sizes["d"], 16)
    heads = min(next_power(h, 16), b.heads)
    warps = b.warps if heads * width * x.q.itemsize >= 1 << 15 else min(b.warps, 4)
    blocks = {"D": width, "BH": heads, "TK": b.keys}
    return triton.cdiv(h, heads), {**blocks, "num_stages": b.stages, **registers(warps)}


# backward ------------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Queries of all sequences, and what is kept of them until their keys have got their gradients."""

    first: int
    n: int
    pairs: Tensor | None  # [b, n, 2, h, slots] p and ds, by kv row from the first tile that is seen, then by entry


def backward(
    dout: Tensor, q: Tensor, kv: Tensor, compressed: Tensor | None, sink: Tensor, out: Tensor, lse: Tensor,
    sight: Sight, scale: float, needs: Needs,
) -> Gradients:  # fmt: skip
    """Gradients of `forward`, given what it returned and the gradient of `out`."""
    x = _by_counts(_inputs(q, kv, compressed, sight, scale))
    dq, delta = q.new_empty(q.shape) if needs.q else None, lse.new_empty(lse.shape)
    dkv = kv.new_zeros(kv.shape, dtype=torch.float32) if needs.kv else None
    dcompressed = None
    if compressed is not None and needs.compressed:
        dcompressed = compressed.new_zeros(compressed.shape, dtype=torch.float32)
    if x.compressed is None:
        needs = needs._replace(compressed=False)
    dout, out, lse = (y.contiguous() for y in (dout, out, lse))
    with on_device(q):
        for first, n in _chunks(x):
            chunk = _queries(x, out, lse, dout, dq, delta, first, n, needs.kv or needs.compressed)
            if dkv is not None:
                _add_window(x, dout, chunk, dkv)
            if dcompressed is not None and needs.compressed:
                (_add_picks if x.entries == "list" else _add_range)(x, dout, chunk, dcompressed)
            del chunk
        dsink = _sink(sink, lse, delta) if needs.sink else None
    dkv, dcompressed = (None if sums is None else sums.to(kv.dtype) for sums in (dkv, dcompressed))
    return Gradients(dq, dkv, dcompressed, dsink)


def _sink(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsink = - sum exp(sink - lse) <do, out>: the sink is a key of value 0."""
    share = (sink.float().clamp(-FINITE, FINITE) - lse.clamp(-FINITE, FINITE)).exp()
    return -(share * delta).sum((0, 1)).to(sink.dtype)


def _by_counts(x: _Inputs) -> _Inputs:
    """With a list of picks replaced by counts where that is less work."""
    index = x.sight.picks
    if index is None or x.entries != "list" or atomics() or x.sizes["p"] > DENSE * x.sizes["k"]:
        return x
    start, end = torch.where(index < 0, x.sizes["p"], index).amin(-1), index.amax(-1) + 1
    return x._replace(sight=x.sight._replace(start=start, end=end), entries="counts")


def _slots(x: _Inputs) -> tuple[int, int]:
    """Slots of a query for window rows and for entries: whole tiles of keys."""
    keys, many = tiles_for(x.q).owned.keys, x.sizes["k" if x.entries == "list" else "p"]
    return _rounded(x.sight.window - 1, keys) + keys, _rounded(many, keys)


def _rounded(n: int, unit: int) -> int:
    return triton.cdiv(n, unit) * unit


def _chunks(x: _Inputs) -> list[tuple[int, int]]:
    """First query and number of queries of each chunk: equal shares that stay within the budget."""
    b, t, h, d = x.q.shape
    each = 2 * h * sum(_slots(x)) * x.q.itemsize
    each += {"list": x.sizes["k"] * d * x.q.itemsize, "counts": x.sizes["p"] * 4}.get(x.entries, 0)
    most = max(BUDGET // (each * max(b, 1)) // CHUNK, 1) * CHUNK
    share = _rounded(triton.cdiv(t, max(triton.cdiv(t, most), 1)), CHUNK)
    return [(first, min(share, t - first)) for first in range(0, t, max(share, 1))]


def _queries(
    x: _Inputs, out: Tensor, lse: Tensor, dout: Tensor, dq: Tensor | None, delta: Tensor,
    first: int, n: int, need_keys: bool
) -> _Chunk:  # fmt: skip
    """dq and delta of a chunk, and its p and ds: zero where gradients of keys read what is not seen."""
    (b, _, h, _), tiles, (window_slots, slots) = x.q.shape, tiles_for(x.q), _slots(x)
    groups, blocks = _by_query(x, tiles.counted if x.entries == "counts" else tiles.backward)
    pairs = counts = None
    if need_keys:
        pairs = x.q.new_empty(b, n, 2, h, window_slots + slots)
        if x.entries in ("range", "counts"):
            pairs.zero_()
        elif x.sight.window_start is not None:
            pairs[..., :window_slots] = 0
    if x.entries == "counts":
        sizes = {"chunk": first, "n": n, **{key: x.sizes[key] for key in "tpk"}}
        counts = delta.new_zeros(b, n, x.sizes["p"], dtype=torch.int32)
        kernels.count_picks[b * n,](x.sight.picks, counts, **sizes, K=next_power(sizes["k"]))
    kernels.attention_backward[b * n * groups,](
        x.q, x.kv, x.compressed, *x.sight[1:], counts, out, lse, dout, dq, delta, pairs,
        first, n, **x.sizes, NEED_Q=dq is not None, NEED_KEYS=need_keys,
        WINDOW_SLOTS=window_slots, SLOTS=window_slots + slots, KEYS=tiles.owned.keys,
        PART=min(blocks["D"], 64), **blocks,
    )  # fmt: skip
    return _Chunk(first, n, pairs)


def _add_window(x: _Inputs, dout: Tensor, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dkv `[b, s, d]` for the rows that it sees."""
    keys, past = tiles_for(x.q).owned.keys, x.sizes["s"] - x.sizes["t"]
    first, last = max(past + chunk.first - x.sight.window + 1, 0) // keys, past + chunk.first + chunk.n
    seers = keys + x.sight.window - 1  # queries that see something of a tile
    span = _rounded(triton.cdiv(seers, 4), CHUNK)
    tiles = triton.cdiv(last, keys) - first
    parts = _parts(x, dout, chunk, "window", first, tiles, triton.cdiv(seers, span), span)
    into[:, first * keys : last] += parts[:, : last - first * keys]


def _add_range(x: _Inputs, dout: Tensor, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dcompressed `[b, p, d]`; where tiles are few, queries are shared among programs."""
    b = tiles_for(x.q).owned
    tiles = triton.cdiv(x.sizes["p"], b.keys)
    programs = tiles * triton.cdiv(x.sizes["d"], b.columns)
    span = _rounded(triton.cdiv(chunk.n, triton.cdiv(PROGRAMS, programs)), CHUNK)
    into += _parts(x, dout, chunk, "range", 0, tiles, triton.cdiv(chunk.n, span), span)[:, : x.sizes["p"]]


def _add_picks(x: _Inputs, dout: Tensor, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dcompressed `[b, p, d]`: rows for its picks, then the sum of each entry's."""
    b, tiles, index = len(into), triton.cdiv(x.sizes["k"], tiles_for(x.q).owned.keys), x.sight.picks
    assert index is not None
    if atomics():
        _owned(x, dout, chunk, into, "list", 0, tiles, 1, 1, b * chunk.n, atomic=True)
        return
    rows = x.q.new_empty(b, chunk.n, x.sizes["k"], x.sizes["d"])
    _owned(x, dout, chunk, rows, "list", 0, tiles, 1, 1, b * chunk.n)
    picks = index[:, chunk.first : chunk.first + chunk.n]
    scatter_sum(rows, entry_lists(picks, x.sizes["p"]), into)


def _parts(
    x: _Inputs, dout: Tensor, chunk: _Chunk, kind: str, first_tile: int, tiles: int, splits: int, span: int
) -> Tensor:
    """Gradients `[b, tiles of keys, d]` in float32; queries lie in splits of `span`, which are added in order."""
    keys = tiles_for(x.q).owned.keys
    parts = x.q.new_empty(splits, x.q.shape[0], tiles * keys, x.sizes["d"], dtype=torch.float32)
    _owned(x, dout, chunk, parts, kind, first_tile, tiles, splits, span, x.q.shape[0])
    return parts[0] if splits == 1 else parts.sum(0)


def _owned(
    x: _Inputs, dout: Tensor, chunk: _Chunk, out: Tensor, kind: str, first_tile: int, tiles: int,
    splits: int, span: int, owners: int, atomic: bool = False
) -> None:  # fmt: skip
    """Launches `keys_backward`."""
    b: Owned = tiles_for(x.q).owned
    rows = min(b.rows, next_power(x.sizes["h"], 16)) if kind == "list" else b.rows
    columns = min(b.columns, next_power(x.sizes["d"], 16))
    sizes = {key: x.sizes[key] for key in ("t", "p", "k", "h", "d", "window")}
    kernels.keys_backward[owners * splits * tiles, triton.cdiv(x.sizes["d"], columns)](
        x.q, dout, chunk.pairs, x.sight.start, x.sight.end, x.sight.picks, out, first_tile, tiles, splits, span,
        chunk.first, chunk.n, past=x.sizes["s"] - x.sizes["t"], **sizes, KIND=kind, ATOMIC=atomic,
        WINDOW_SLOTS=_slots(x)[0], SLOTS=sum(_slots(x)), KEYS=b.keys, ROWS=rows, COLUMNS=columns,
        num_stages=b.stages, **registers(b.warps, 1 if x.q.itemsize == 2 else 4),
    )  # fmt: skip
