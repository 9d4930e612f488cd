"""Forward and backward of attention as launches: no host synchronisation, every grid a function of shapes.

    forward    q, kv, compressed, sink -> out, lse
    backward   for each chunk of queries: dq, <do, out>, and p and ds of each (query, head) on the keys that it sees;
               from them dkv and dcompressed, tiles of keys over queries in order; chunks are added in order

For dcompressed an index is used in two ways. Where entries are few (`DENSE`) it becomes counts, and they are treated as
a range. Else each (query, slot) gets a row of its own, and `scatter_sum` adds up those of an entry.

b batch · t queries · n queries of a chunk · s window rows · p entries · k picks · h heads · d head dim
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, in_rows, next_power, on_device, registers
from ...triton.scatter import atomics, entry_lists, scatter_sum
from . import kernels

BUDGET = 1 << 30  # bytes of p, ds and rows of picks: a chunk is as many queries as that holds
CHUNK = 64  # queries that a chunk, or a program's share of them, is a multiple of
FEW = 4  # queries of a sequence up to which each is shared among programs; by their number alone, so that a sequence
# that is decoded has the same bits in any batch
SPLIT = 128  # keys of a program's share, see `first_key`
AT_ONCE = 512  # slots of a list
DENSE = 4  # entries per pick up to which to look at all of them is less work than to give each pick a row
PROGRAMS = 256  # that occupy a large GPU
FINITE = 1e30  # stands for an infinite sink


# blocks of each kernel on each architecture --------------------------------------------------------------------------
# One fixed choice, so that no query depends on the rest of its batch. Chosen by compiling: no register spills, shared
# memory within the limit, wgmma on Hopper, which needs 64 heads.


class Blocks(NamedTuple):
    """Of a kernel with one query to a program: heads, keys of a step, warps, pipeline stages."""

    heads: int
    keys: int
    warps: int
    stages: int


class Owned(NamedTuple):
    """Of the kernel with one tile of keys to a program: keys, (query, head) rows of a step, channels, warps, stages."""

    keys: int
    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    forward: Blocks
    few: Blocks  # the same of few queries
    backward: Blocks  # dq; its keys divide those of `owned`
    counted: Blocks  # the same with counts, which take a few registers more
    owned: Owned  # dkv


HALF = {  # bf16 and fp16, chosen for d = 512
    "sm_80": Tiles(
        Blocks(32, 32, 8, 2), Blocks(16, 32, 4, 2), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Owned(64, 64, 128, 8, 2)
    ),
    "sm_89": Tiles(
        Blocks(32, 32, 8, 1), Blocks(16, 32, 4, 2), Blocks(32, 16, 8, 1), Blocks(32, 16, 8, 1), Owned(64, 64, 128, 8, 1)
    ),
    "sm_90": Tiles(
        Blocks(64, 32, 8, 2), Blocks(16, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1), Owned(64, 64, 256, 8, 2)
    ),
    "sm_100": Tiles(
        Blocks(64, 32, 8, 2), Blocks(16, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Owned(64, 64, 256, 8, 2)
    ),
    "hip": Tiles(
        Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Owned(64, 32, 128, 4, 1)
    ),
}
_SMALL = Blocks(16, 16, 4, 1)
SINGLE = Tiles(Blocks(16, 16, 8, 1), _SMALL, _SMALL, _SMALL, Owned(32, 16, 64, 4, 1))  # float32 takes no tensor cores


def tiles_for(q: Tensor) -> Tiles:
    """The table for this dtype on the current device."""
    return HALF[architecture()] if q.itemsize == 2 else SINGLE


# inputs --------------------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """Which keys queries see: `window` rows from `window_start [b|1, t]` on, and entries from `start` to `end` [b|1, t]
    or those of `picks [b, t, k]`.
    """

    window: int
    window_start: Tensor | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    picks: Tensor | None = None


class Inputs(NamedTuple):
    """What forward and backward read; `prepared` for kernels, with how they are to see entries: their ENTRIES."""

    q: Tensor
    kv: Tensor
    compressed: Tensor | None
    sink: Tensor
    mask: Mask
    scale: float
    entries: str = ""

    @property
    def sizes(self) -> dict[str, Any]:
        """Shapes, and what else all kernels that go by query are told."""
        _, t, h, d = self.q.shape
        p, entry_rows = (0, 0) if (x := self.compressed) is None else (x.shape[1], x.stride(0) // d)
        k = 0 if self.mask.picks is None else self.mask.picks.shape[2]
        flags = {"ENTRIES": self.entries, "DOCUMENTS": self.mask.window_start is not None}
        rows = {"kv_rows": self.kv.stride(0) // d, "entry_rows": entry_rows}
        shapes = {"t": t, "s": self.kv.shape[1], "p": p, "k": k, "h": h, "d": d, **rows}
        return {**shapes, "window": self.mask.window, "scale": self.scale, **flags}

    def prepared(self) -> "Inputs":
        """All contiguous but keys of a cache, bounds [b, t]; lists of many queries end with the last slot that holds a
        pick.
        """
        b, t = self.q.shape[:2]
        picks, compressed = self.mask.picks, None if self.compressed is None else in_rows(self.compressed)
        first, start, end = (None if x is None else x.expand(b, t).contiguous() for x in self.mask[1:4])
        picks = None if picks is None else picks.contiguous()
        entries = "range" if picks is None else "list"
        if compressed is None or compressed.shape[1] == 0 or (picks is not None and picks.shape[2] == 0):
            compressed = start = end = picks = None
            entries = "none"
        if picks is not None and t > FEW:
            end = picks.new_empty(b, t, dtype=torch.int32)
            with on_device(self.q):
                kernels.used_slots[b * t,](picks, end, picks.shape[2], AT_ONCE=AT_ONCE)
        mask = Mask(self.mask.window, first, start, end, picks)
        tensors = self.q.contiguous(), in_rows(self.kv), compressed, self.sink.contiguous()
        return Inputs(*tensors, mask, self.scale, entries)


def _by_query(x: Inputs, b: Blocks) -> tuple[int, dict[str, int]]:
    """Programs of a query, and their blocks; little work takes few warps."""
    h, width = x.sizes["h"], next_power(x.sizes["d"], 16)
    heads = min(next_power(h, 16), b.heads)
    warps = b.warps if heads * width * x.q.itemsize >= 1 << 15 else min(b.warps, 4)
    blocks = {"D": width, "BH": heads, "TK": b.keys}
    return triton.cdiv(h, heads), {**blocks, "num_stages": b.stages, **registers(warps)}


# forward -------------------------------------------------------------------------------------------------------------


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`out [b, t, h, d]` and the log-sum-exp `[b, t, h]`, which counts the sink."""
    x = inputs.prepared()
    out, lse = x.q.new_empty(x.q.shape), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
    few = x.sizes["t"] <= FEW and (inputs.compressed is not None or x.mask.window > SPLIT)
    with on_device(x.q):
        if few:
            _forward_by_splits(x, out, lse)
        else:
            _forward(x, tiles_for(x.q).forward, out, lse, (1, 0), SPLIT=0)
    return out, lse


def _forward(x: Inputs, b: Blocks, out: Tensor, lse: Tensor, splits: tuple[int, int], SPLIT: int) -> None:
    """Launches `attention_forward` for so many splits in all, so many of the window."""
    groups, blocks = _by_query(x, b)
    kernels.attention_forward[x.sizes["t"] * len(x.q) * groups, splits[0]](
        x.q, x.kv, x.compressed, x.sink, *x.mask[1:], out, lse,
        window_splits=splits[1], SPLIT=SPLIT, **x.sizes, **blocks,
    )  # fmt: skip


def _forward_by_splits(x: Inputs, out: Tensor, lse: Tensor) -> None:
    """The keys of a query shared among programs. No bit depends on how many entries there are, but on those seen."""
    h, d = x.sizes["h"], x.sizes["d"]
    of_window = splits_of(min(x.mask.window, x.sizes["s"]))
    splits = of_window + splits_of(x.sizes["k" if x.entries == "list" else "p"])
    parts, tops = lse.new_empty(splits, *out.shape), lse.new_empty(splits, 2, *lse.shape)
    _forward(x, tiles_for(x.q).few, parts, tops, (splits, of_window), SPLIT)
    kernels.combine_splits[lse.numel(),](
        parts, tops, x.sink, out, lse, splits, h=h, d=d, D=next_power(d), AT_ONCE=8, num_warps=4
    )


def splits_of(n: int) -> int:
    """How many splits n keys are, see `first_key`."""
    least = triton.cdiv(n, SPLIT)
    doubled = max((least - 1).bit_length() - 4, 0)
    return 8 * doubled + triton.cdiv(least, 1 << doubled)


# backward ------------------------------------------------------------------------------------------------------------


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


class _Outputs(NamedTuple):
    """Of forward, with the gradient of `out` and room for <do, out>."""

    out: Tensor
    lse: Tensor
    dout: Tensor
    delta: Tensor


class _Chunk(NamedTuple):
    """Queries of all sequences, and what is kept of them until their keys have got their gradients."""

    first: int
    n: int
    dout: Tensor  # [b, t, h, d]
    pairs: Tensor | None  # [b, n, 2, h, slots] p and ds, by kv row from the first tile that is seen, then by entry


class _Work(NamedTuple):
    """How a launch of `keys_backward` is divided: tiles of keys from the first on, of each owner (a sequence, or a
    query with its list), by queries in splits of `span`.
    """

    kind: str  # its KIND
    tiles: int
    owners: int
    first_tile: int = 0
    splits: int = 1
    span: int = 1


def backward(dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
    """Gradients of `forward`, given what it returned and the gradient of `out`."""
    q, kv, compressed, sink = inputs[:4]
    x = _by_counts(inputs.prepared())
    dq, delta = q.new_empty(q.shape) if needs.q else None, lse.new_empty(lse.shape)
    dkv = kv.new_zeros(kv.shape, dtype=torch.float32) if needs.kv else None
    dcompressed = None
    if compressed is not None and needs.compressed:
        dcompressed = compressed.new_zeros(compressed.shape, dtype=torch.float32)
    if x.compressed is None:
        needs = needs._replace(compressed=False)
    outputs = _Outputs(out.contiguous(), lse.contiguous(), dout.contiguous(), delta)
    with on_device(q):
        for first, n in _chunks(x):
            chunk = _queries(x, outputs, dq, first, n, need_keys=needs.kv or needs.compressed)
            if dkv is not None:
                _add_window(x, chunk, dkv)
            if dcompressed is not None and needs.compressed:
                (_add_picks if x.entries == "list" else _add_range)(x, chunk, dcompressed)
            del chunk
        dsink = _sink(sink, outputs) if needs.sink else None
    dkv, dcompressed = (None if sums is None else sums.to(kv.dtype) for sums in (dkv, dcompressed))
    return Gradients(dq, dkv, dcompressed, dsink)


def _sink(sink: Tensor, outputs: _Outputs) -> Tensor:
    """dsink = - sum exp(sink - lse) <do, out>: the sink is a key of value 0."""
    share = (sink.float().clamp(-FINITE, FINITE) - outputs.lse.clamp(-FINITE, FINITE)).exp()
    return -(share * outputs.delta).sum((0, 1)).to(sink.dtype)


def _by_counts(x: Inputs) -> Inputs:
    """With a list of picks replaced by counts where that is less work."""
    picks = x.mask.picks
    if picks is None or x.entries != "list" or atomics() or x.sizes["p"] > DENSE * x.sizes["k"]:
        return x
    start, end = torch.where(picks < 0, x.sizes["p"], picks).amin(-1), picks.amax(-1) + 1
    return x._replace(mask=x.mask._replace(start=start, end=end), entries="counts")


def _slots(x: Inputs) -> tuple[int, int]:
    """Slots of a query for window rows and for entries: whole tiles of keys."""
    keys, many = tiles_for(x.q).owned.keys, x.sizes["k" if x.entries == "list" else "p"]
    return _rounded(x.mask.window - 1, keys) + keys, _rounded(many, keys)


def _rounded(n: int, unit: int) -> int:
    return triton.cdiv(n, unit) * unit


def _chunks(x: Inputs) -> list[tuple[int, int]]:
    """First query and number of queries of each chunk: equal shares that stay within the budget."""
    b, t, h, d = x.q.shape
    each = 2 * h * sum(_slots(x)) * x.q.itemsize
    each += {"list": x.sizes["k"] * d * x.q.itemsize, "counts": x.sizes["p"] * 4}.get(x.entries, 0)
    most = max(BUDGET // (each * max(b, 1)) // CHUNK, 1) * CHUNK
    share = _rounded(triton.cdiv(t, max(triton.cdiv(t, most), 1)), CHUNK)
    return [(first, min(share, t - first)) for first in range(0, t, max(share, 1))]


def _queries(x: Inputs, outputs: _Outputs, dq: Tensor | None, first: int, n: int, need_keys: bool) -> _Chunk:
    """dq and delta of a chunk, and its p and ds: zero where gradients of keys read what is not seen."""
    (b, _, h, _), tiles, (window_slots, slots) = x.q.shape, tiles_for(x.q), _slots(x)
    groups, blocks = _by_query(x, tiles.counted if x.entries == "counts" else tiles.backward)
    pairs = counts = None
    if need_keys:
        pairs = x.q.new_empty(b, n, 2, h, window_slots + slots)
        if x.entries in ("range", "counts"):
            pairs.zero_()
        elif x.mask.window_start is not None:
            pairs[..., :window_slots] = 0
    if x.entries == "counts":
        sizes = {"chunk": first, "n": n, **{key: x.sizes[key] for key in "tpk"}}
        counts = outputs.delta.new_zeros(b, n, x.sizes["p"], dtype=torch.int32)
        kernels.count_picks[b * n,](x.mask.picks, counts, **sizes, AT_ONCE=AT_ONCE)
    kernels.attention_backward[b * n * groups,](
        x.q, x.kv, x.compressed, *x.mask[1:], counts, outputs.out, outputs.lse, outputs.dout, dq, outputs.delta, pairs,
        first, n, (window_slots + slots) // tiles.owned.keys, **x.sizes, NEED_Q=dq is not None, NEED_KEYS=need_keys,
        WINDOW_SLOTS=window_slots, KEYS=tiles.owned.keys,
        PART=min(blocks["D"], 64), **blocks,
    )  # fmt: skip
    return _Chunk(first, n, outputs.dout, pairs)


def _add_window(x: Inputs, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dkv `[b, s, d]` for the rows that it sees."""
    keys, past = tiles_for(x.q).owned.keys, x.sizes["s"] - x.sizes["t"]
    first, last = max(past + chunk.first - x.mask.window + 1, 0) // keys, past + chunk.first + chunk.n
    seers = keys + x.mask.window - 1  # queries that see something of a tile
    span = _rounded(triton.cdiv(seers, 4), CHUNK)
    tiles, splits = triton.cdiv(last, keys) - first, triton.cdiv(seers, span)
    parts = _parts(x, chunk, _Work("window", tiles, len(into), first_tile=first, splits=splits, span=span))
    into[:, first * keys : last] += parts[:, : last - first * keys]


def _add_range(x: Inputs, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dcompressed `[b, p, d]`; where tiles are few, queries are shared among programs."""
    b = tiles_for(x.q).owned
    tiles = triton.cdiv(x.sizes["p"], b.keys)
    programs = tiles * triton.cdiv(x.sizes["d"], b.columns)
    span = _rounded(triton.cdiv(chunk.n, triton.cdiv(PROGRAMS, programs)), CHUNK)
    splits = triton.cdiv(chunk.n, span)
    into += _parts(x, chunk, _Work("range", tiles, len(into), splits=splits, span=span))[:, : x.sizes["p"]]


def _add_picks(x: Inputs, chunk: _Chunk, into: Tensor) -> None:
    """Adds the chunk's part of dcompressed `[b, p, d]`: rows for its picks, then the sum of each entry's."""
    b, k, picks = len(into), x.sizes["k"], x.mask.picks
    assert picks is not None
    work = _Work("list", triton.cdiv(k, tiles_for(x.q).owned.keys), b * chunk.n)
    if atomics():
        _by_keys(x, chunk, work, into, atomic=True)
        return
    rows = x.q.new_empty(b, chunk.n, k, x.sizes["d"])
    _by_keys(x, chunk, work, rows)
    scatter_sum(rows, entry_lists(picks[:, chunk.first : chunk.first + chunk.n], x.sizes["p"]), into)


def _parts(x: Inputs, chunk: _Chunk, work: _Work) -> Tensor:
    """Gradients `[b, tiles of keys, d]` in float32; those of splits are added in order."""
    keys = work.tiles * tiles_for(x.q).owned.keys
    parts = x.q.new_empty(work.splits, work.owners, keys, x.sizes["d"], dtype=torch.float32)
    _by_keys(x, chunk, work, parts)
    return parts[0] if work.splits == 1 else parts.sum(0)


def _by_keys(x: Inputs, chunk: _Chunk, work: _Work, out: Tensor, atomic: bool = False) -> None:
    """Launches `keys_backward`."""
    b: Owned = tiles_for(x.q).owned
    rows = min(b.rows, next_power(x.sizes["h"], 16)) if work.kind == "list" else b.rows
    columns = min(b.columns, next_power(x.sizes["d"], 16))
    sizes = {key: x.sizes[key] for key in ("t", "p", "k", "h", "d", "window")}
    bounds = x.mask[2:4] if work.kind == "range" else (None, None)
    kernels.keys_backward[work.owners * work.splits * work.tiles, triton.cdiv(x.sizes["d"], columns)](
        x.q, chunk.dout, chunk.pairs, *bounds, x.mask.picks if atomic else None, out,
        work.first_tile, work.tiles, work.splits, work.span,
        chunk.first, chunk.n, sum(_slots(x)) // b.keys, past=x.sizes["s"] - x.sizes["t"], **sizes,
        KIND=work.kind, ATOMIC=atomic, WINDOW_SLOTS=_slots(x)[0], KEYS=b.keys, ROWS=rows, COLUMNS=columns,
        num_stages=b.stages, **registers(b.warps, 1 if x.q.itemsize == 2 else 4),
    )  # fmt: skip
