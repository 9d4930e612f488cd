"""Forward and backward of attention as launches: no host synchronisation, every grid a function of shapes.

    forward    q, kv, compressed, sink -> out, lse
    backward   <do, o>; for each chunk of queries: dq, and p and ds of each (query, head) on the keys that it sees; from
               them dkv and dcompressed, tiles of keys over queries in order; chunks are added in order. Of narrow heads
               there is one chunk, and tiles of keys make p and ds again

A list of picks is read in two ways. Where entries are few (`_how`) it becomes counts, and they are treated as a range,
whose tiles many queries share. Else each query reads its own; for dcompressed each (query, slot) gets a row, and
`scatter_sum` adds up those of an entry.

b batch · t queries · n queries of a chunk · s window rows · p entries · k picks · h heads · d head dim
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, in_rows, next_power, on_device, registers
from ...triton.scatter import atomics, entry_lists, scatter_sum
from . import backward as gradients
from . import decode, seen
from . import forward as kernels

BUDGET = 1 << 30  # bytes of p, ds and rows of picks: a chunk is as many queries as that holds
CHUNK = 64  # queries that a chunk, or a program's share of them for entries, is a multiple of
FEW = 4  # queries of a sequence up to which each is shared among programs; by their number alone, so that a sequence
# that is decoded has the same bits in any batch
SPLIT = 128  # keys of a program's share, see `first_key`
AT_ONCE = 512  # slots of a list
AHEAD = 64  # that a step takes of a list, or fetches of the next one, at most
DENSE = 4  # entries per pick up to which to look at all of them is less work, see `_how`
COUNTED = 8192  # entries of a query that are counted at once, at most
PROGRAMS = 132  # that occupy a large GPU, an H100
FINITE = 1e30  # stands for an infinite sink


# blocks of each kernel on each architecture --------------------------------------------------------------------------
# One fixed choice, so that no query depends on the rest of its batch. Chosen by compiling: no register spills, shared
# memory within the limit, on Hopper wgmma in its full width, which needs 64 rows (tests/support/speed.py).


class Blocks(NamedTuple):
    """Of a kernel that goes by query: (query, head) rows, keys of a step, warps, pipeline stages, and how many programs
    a multiprocessor is to hold the registers of.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 1


class Owned(NamedTuple):
    """Of a kernel with one tile of keys to a program: keys, (query, head) rows of a step, channels, warps, stages."""

    keys: int
    rows: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture and width."""

    forward: Blocks
    split: Blocks
    backward: Blocks  # its keys divide those of `owned`
    owned: Owned


FEW_ROWS = Blocks(16, 32, 4, 2)
NARROW = 128  # channels up to which a table of its own holds
HALF = {  # bf16 and fp16, of more channels, up to 512, and of few
    "sm_80": (
        Tiles(Blocks(32, 32, 8, 2), FEW_ROWS, Blocks(32, 16, 8, 1), Owned(64, 64, 128, 8, 2)),
        Tiles(Blocks(64, 32, 4, 2), FEW_ROWS, Blocks(32, 32, 4, 2), Owned(64, 32, 128, 4, 2)),
    ),
    "sm_89": (
        Tiles(Blocks(32, 32, 8, 1), FEW_ROWS, Blocks(32, 16, 8, 1), Owned(64, 64, 128, 8, 1)),
        Tiles(Blocks(64, 32, 4, 2), FEW_ROWS, Blocks(32, 32, 4, 2), Owned(64, 32, 128, 4, 1)),
    ),
    "sm_90": (
        Tiles(Blocks(64, 64, 8, 2), FEW_ROWS, Blocks(64, 32, 8, 2), Owned(128, 64, 256, 8, 2)),
        Tiles(Blocks(64, 32, 4, 3, 3), FEW_ROWS, Blocks(64, 32, 4, 2, 3), Owned(128, 64, 128, 8, 3)),
    ),
    "sm_100": (
        Tiles(Blocks(64, 32, 8, 2), FEW_ROWS, Blocks(64, 32, 8, 1), Owned(64, 64, 256, 8, 2)),
        Tiles(Blocks(64, 64, 4, 2), FEW_ROWS, Blocks(64, 32, 4, 2), Owned(64, 64, 128, 8, 2)),
    ),
    "hip": (
        Tiles(Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 32, 4, 1), Owned(64, 32, 128, 4, 1)),
        Tiles(Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 32, 4, 1), Owned(64, 32, 128, 4, 1)),
    ),
}
_PLAIN = Blocks(16, 16, 8, 1)  # float32 takes no tensor cores
SINGLE = Tiles(_PLAIN, Blocks(16, 16, 4, 1), _PLAIN, Owned(32, 16, 64, 4, 1))


def tiles_for(q: Tensor) -> Tiles:
    """The table for this dtype and width on the current device."""
    return HALF[architecture()][q.shape[-1] <= NARROW] if q.itemsize == 2 else SINGLE


# inputs --------------------------------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """Which keys queries see: `window` rows from `window_start [b|1, t]` on, and entries from `start` to `end` [b|1, t]
    or those of `picks [b, t, k]`; once prepared, what each query reads, or how often it picked each entry.
    """

    window: int
    window_start: Tensor | None = None
    start: Tensor | None = None
    end: Tensor | None = None
    picks: Tensor | None = None
    lists: Tensor | None = None  # [b, t, width], see `list_keys`
    ends: Tensor | None = None  # [b, t, 2]
    counts: Tensor | None = None  # [b, t, width]


class Inputs(NamedTuple):
    """What forward and backward read; `prepared` for kernels, with how they are to see entries: their ENTRIES."""

    q: Tensor
    kv: Tensor
    compressed: Tensor | None
    sink: Tensor
    mask: Mask
    scale: float
    entries: str = ""
    rows: Tensor | None = None  # of kv, of compressed, and one of zeros, where lists name them

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """window_start, start, end."""
        return self.mask[1:4]

    @property
    def sizes(self) -> dict[str, Any]:
        """Shapes, and what else kernels are told of them."""
        _, t, h, d = self.q.shape
        p, entry_rows = (0, 0) if (x := self.compressed) is None else (x.shape[1], x.stride(0) // d)
        bound_rows = t if any(x is not None and len(x) > 1 for x in self.bounds) else 0
        rows = {"kv_rows": self.kv.stride(0) // d, "entry_rows": entry_rows, "bound_rows": bound_rows}
        return {"t": t, "s": self.kv.shape[1], "p": p, "k": self.picks_each, "h": h, "d": d, **rows}

    @property
    def listed(self) -> dict[str, int]:
        """Rows that lists name, and how many they may name of them."""
        assert self.rows is not None and self.mask.lists is not None
        return {"rows": self.rows.shape[1], "width": self.mask.lists.shape[2]}

    @property
    def picks_each(self) -> int:
        return 0 if self.mask.picks is None else self.mask.picks.shape[2]

    def prepared(self, how: str) -> "Inputs":
        """All contiguous but keys of a cache, bounds alike [b, t] or [1, t]; picks as they are ("picks"), as "lists" of
        all that a query reads, or as "counts".
        """
        picks, compressed = self.mask.picks, None if self.compressed is None else in_rows(self.compressed)
        entries = "range" if picks is None else how
        if compressed is None or compressed.shape[1] == 0 or (picks is not None and picks.shape[2] == 0):
            compressed, picks, entries = None, None, "none"
        picks = None if picks is None else picks.contiguous()
        most = next_power(self.kv.shape[1], 1024)  # of a window that is wider than the text; few numbers, few kernels
        mask = self.mask._replace(picks=picks, window=min(self.mask.window, most))
        if entries != "range":
            mask = mask._replace(start=None, end=None)
        x = self._replace(q=self.q.contiguous(), kv=in_rows(self.kv), compressed=compressed, mask=mask, entries=entries)
        x = x._alike()
        if picks is not None and how != "picks":
            x = x._replace(mask=x._counted(picks) if how == "counts" else x._listed(picks))._alike()
        if compressed is not None and x.mask.lists is not None:
            x = x._replace(rows=torch.cat([x.kv, compressed, compressed.new_zeros(len(x.q), 1, x.q.shape[-1])], 1))
        return x._replace(sink=self.sink.contiguous())

    def _alike(self) -> "Inputs":
        """All bounds for one sequence or for each."""
        mask, t = self.mask, self.q.shape[1]
        rows = max([len(bound) for bound in self.bounds if bound is not None], default=1)
        alike = (None if bound is None else bound.expand(rows, t).contiguous() for bound in self.bounds)
        window_start, start, end = alike
        return self._replace(mask=mask._replace(window_start=window_start, start=start, end=end))

    def _listed(self, picks: Tensor) -> Mask:
        (b, t, k), window = picks.shape, self.mask.window
        lists, ends = (
            picks.new_empty(b, t, n, dtype=torch.int32)
            for n in (_rounded(window + k + seen.UNIT.value, AHEAD) + AHEAD, 2)
        )
        sizes = {key: self.sizes[key] for key in ("t", "s", "p", "k", "bound_rows")}
        start = self.mask.window_start
        with on_device(self.q):
            seen.list_keys[b * t,](
                start, picks, lists, ends, **sizes, width=lists.shape[2], window=window,
                DOCUMENTS=start is not None, AT_ONCE=AT_ONCE,
            )  # fmt: skip
        return self.mask._replace(lists=lists, ends=ends)

    def _counted(self, picks: Tensor) -> Mask:
        (b, t, k), p = picks.shape, self.sizes["p"]
        width = _rounded(p, seen.UNIT.value)
        block = next_power(width, 512)  # few numbers, few kernels
        counts = self.q.new_empty(b, t, width, dtype=torch.float16 if self.q.itemsize == 2 else torch.float32)
        start, end = (picks.new_empty(b, t, dtype=torch.int32) for _ in range(2))
        with on_device(self.q):
            seen.count_picks[b * t,](
                picks, counts, start, end, p, k, width,
                P=block, AT_ONCE=min(AT_ONCE, 256), num_warps=min(block // 256, 8),
            )  # fmt: skip
        return self.mask._replace(start=start, end=end, counts=counts)


def _how(x: Inputs, queries: int) -> str:
    """How lists are read where a product holds so many queries: as counts if to look at all entries is less work; half
    as many count, as what they do not pick is looked at all the same. float16 counts up to 2,048 exactly.
    """
    if x.compressed is None or x.mask.picks is None or atomics():
        return "lists"
    p, k = x.compressed.shape[1], x.picks_each
    return "counts" if p <= min(DENSE * max(queries // 2, 1) * k, COUNTED) and k <= 2048 else "lists"


def _shape(x: Inputs, b: Blocks, tile: bool) -> dict[str, int]:
    """D, BQ and BH of a product. Wide heads are of one query: to read a tile again for the sake of a key that is not
    finite takes more registers than there are.
    """
    (_, _, h, d), alone = x.q.shape, not tile
    width = next_power(d, 16)
    heads = min(next_power(h), b.rows)
    if width > NARROW and heads == 32 and b.rows == 64:
        heads = 64  # half of them empty, as 32 rows are no wgmma
    if alone or width > NARROW or heads == b.rows:
        return {"D": width, "BQ": 1, "BH": max(heads, 16)}
    return {"D": width, "BQ": b.rows // heads, "BH": heads}


def _blocks(x: Inputs, b: Blocks, tile: bool = True) -> tuple[int, dict[str, int]]:
    """Programs of a tile or query, and their blocks; little work takes few warps."""
    shape = _shape(x, b, tile)
    rows = shape["BQ"] * shape["BH"]
    warps = b.warps if rows * shape["D"] >= 1 << 14 or x.q.itemsize == 4 else min(b.warps, 4)
    blocks = shape if tile else {"D": shape["D"], "BH": shape["BH"]}
    options = {"TK": b.keys, "num_stages": b.stages, **registers(warps, b.programs if tile else 1)}
    options |= {
        key: n // 8 * 8 for key, n in options.items() if key == "maxnreg" and b.programs > 1 and tile
    }  # are given by eight
    return triton.cdiv(x.q.shape[2], shape["BH"]), {**blocks, **options}


# forward -------------------------------------------------------------------------------------------------------------


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`out [b, t, h, d]` and the log-sum-exp `[b, t, h]`, which counts the sink."""
    few = inputs.q.shape[1] <= FEW and (inputs.compressed is not None or inputs.mask.window > SPLIT)
    queries = _shape(inputs, tiles_for(inputs.q).forward, True)["BQ"]
    x = inputs.prepared("picks" if few else "lists" if queries == 1 else _how(inputs, queries))
    out, lse = x.q.new_empty(x.q.shape), x.q.new_empty(x.q.shape[:3], dtype=torch.float32)
    with on_device(x.q):
        (_by_splits if few else _by_lists if x.entries == "lists" else _by_tiles)(x, out, lse)
    return out, lse


def _told(x: Inputs, *left_out: str) -> dict[str, Any]:
    """What kernels are told of the inputs."""
    flags = {"window": x.mask.window, "scale": x.scale, "DOCUMENTS": x.mask.window_start is not None}
    return {key: value for key, value in {**x.sizes, **flags}.items() if key not in left_out}


def _by_tiles(x: Inputs, out: Tensor, lse: Tensor) -> None:
    (b, t, _, _), (groups, blocks) = x.q.shape, _blocks(x, tiles_for(x.q).forward)
    kernels.attention_tile[b * triton.cdiv(t, blocks["BQ"]) * groups,](
        x.q, x.kv, x.compressed, x.sink, *x.bounds, x.mask.counts, out, lse,
        width=_width(x), ENTRIES=x.entries, STAGES=blocks["num_stages"], **_told(x, "k"), **blocks,
    )  # fmt: skip


def _by_lists(x: Inputs, out: Tensor, lse: Tensor) -> None:
    (b, t, h, d), (groups, blocks) = x.q.shape, _blocks(x, tiles_for(x.q).forward, tile=False)
    kernels.attention_list[b * t * groups,](
        x.q, x.rows, x.sink, x.mask.lists, x.mask.ends, out, lse,
        **x.listed, t=t, scale=x.scale, h=h, d=d, STAGES=blocks["num_stages"], **blocks,
    )  # fmt: skip


def _width(x: Inputs) -> int:
    return 0 if x.mask.counts is None else x.mask.counts.shape[2]


def _by_splits(x: Inputs, out: Tensor, lse: Tensor) -> None:
    """The keys of a query shared among programs. No bit depends on how many entries there are, but on those seen."""
    (b, t, h, d), (groups, blocks) = x.q.shape, _blocks(x, tiles_for(x.q).split, tile=False)
    of_window = splits_of(min(x.mask.window, x.sizes["s"]))
    splits = of_window + splits_of(x.sizes["k" if x.entries == "picks" else "p"])
    parts, tops = lse.new_empty(splits, *out.shape), lse.new_empty(splits, 2, *lse.shape)
    decode.attention_split[b * t * groups, splits](
        x.q, x.kv, x.compressed, *x.bounds, x.mask.picks, parts, tops,
        window_splits=of_window, ENTRIES=x.entries, SPLIT=SPLIT, **_told(x), **blocks,
    )  # fmt: skip
    decode.combine_splits[lse.numel(),](
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
    """Of forward, with the gradient of `out`, and <do, out>, which is written with dq."""

    lse: Tensor
    delta: Tensor
    out: Tensor
    dout: Tensor


class _Chunk(NamedTuple):
    """Queries of all sequences, and what is kept of them until their keys have got their gradients."""

    first: int
    n: int
    outputs: _Outputs
    pairs: Tensor | None  # [b, n, 2, h, slots] p and ds, by kv row from the first tile that is seen, then by entry


class _Work(NamedTuple):
    """How a launch of `keys_tile` is divided: tiles of keys from the first on, by queries in splits of `span`."""

    own: bool  # rows of kv, else entries
    tiles: int
    first_tile: int
    splits: int
    span: int


def backward(dout: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, needs: Needs) -> Gradients:
    """Gradients of `forward`, given what it returned and the gradient of `out`."""
    q, kv, compressed, sink = inputs[:4]
    x = inputs.prepared(_how(inputs, _shape(inputs, tiles_for(q).backward, True)["BQ"]))
    dq, dkv, dcompressed = q.new_empty(q.shape) if needs.q else None, None, None
    of_entries = needs.compressed and x.compressed is not None
    with on_device(q):
        outputs = _Outputs(lse.contiguous(), lse.new_empty(lse.shape), out.contiguous(), dout.contiguous())
        for first, n in _chunks(x):
            chunk = _queries(x, outputs, dq, first, n, (needs.kv or of_entries) and not _again(x))
            if needs.kv:
                dkv = _of_window(x, chunk, dkv)
            if of_entries:
                dcompressed = (_of_picks if x.entries == "lists" else _of_range)(x, chunk, dcompressed)
            del chunk
        dsink = _sink(sink, outputs) if needs.sink else None
    dkv = _whole(dkv, kv) if needs.kv else None
    dcompressed = _whole(dcompressed, compressed) if needs.compressed and compressed is not None else None
    return Gradients(dq, dkv, dcompressed, dsink)


def _whole(sums: Tensor | None, keys: Tensor) -> Tensor:
    """Those of keys in their dtype, zeros where no chunk added to them."""
    return keys.new_zeros(keys.shape) if sums is None else sums.to(keys.dtype).contiguous().flatten().view(keys.shape)


def _added(into: Tensor | None, part: Tensor, first: int, rows: int) -> Tensor:
    """The sum `[b, rows, d]` of what chunks gave, with a part of this one's, whose rows count from the first. A first
    part that is all of them is kept, and added to.
    """
    if into is None:
        if part.shape[1] == rows:
            return part
        into = part.new_zeros(len(part), rows, part.shape[2])
    into[:, first : first + part.shape[1]] += part
    return into


def _sink(sink: Tensor, outputs: _Outputs) -> Tensor:
    """dsink = - sum exp(sink - lse) <do, out>: the sink is a key of value 0."""
    share = (sink.float().clamp(-FINITE, FINITE) - outputs.lse.clamp(-FINITE, FINITE)).exp()
    return -(share * outputs.delta).sum((0, 1)).to(sink.dtype)


def _again(x: Inputs) -> bool:
    """Whether keys make p and ds again, instead of reading what queries leave: see `keys_again`."""
    return x.entries != "lists" and x.q.itemsize == 2 and x.q.shape[-1] <= NARROW


def _slots(x: Inputs) -> tuple[int, int]:
    """Slots of a query for window rows and for entries: whole tiles of keys."""
    keys, many = tiles_for(x.q).owned.keys, x.sizes["k" if x.entries == "lists" else "p"]
    return _rounded(x.mask.window - 1, keys) + keys, _rounded(many, keys)


def _rounded(n: int, unit: int) -> int:
    return triton.cdiv(n, unit) * unit


def _chunks(x: Inputs) -> list[tuple[int, int]]:
    """First query and number of queries of each chunk: equal shares that stay within the budget."""
    b, t, h, d = x.q.shape
    each = 2 * h * sum(_slots(x)) * x.q.itemsize
    each += x.sizes["k"] * d * x.q.itemsize if x.entries == "lists" else 0
    most = max(BUDGET // (each * max(b, 1)) // CHUNK, 1) * CHUNK
    share = t if _again(x) else _rounded(triton.cdiv(t, max(triton.cdiv(t, most), 1)), CHUNK)
    return [(first, min(share, t - first)) for first in range(0, t, max(share, 1))]


def _queries(x: Inputs, outputs: _Outputs, dq: Tensor | None, first: int, n: int, need_keys: bool) -> _Chunk:
    """dq of a chunk, and its p and ds where they are kept."""
    (b, _, h, d), tiles, (window_slots, slots) = x.q.shape, tiles_for(x.q), _slots(x)
    lists = x.entries == "lists"
    groups, blocks = _blocks(x, tiles.backward, tile=not lists)
    pairs = x.q.new_empty(b, n, 2, h, window_slots + slots) if need_keys else None
    left = *outputs, x.q if dq is None else dq, x.q if pairs is None else pairs, first, n, window_slots + slots
    flags = {"need_q": int(dq is not None), "KEEP": need_keys, "WINDOW_SLOTS": window_slots}
    flags |= {"KEYS": tiles.owned.keys, "JOINED": d > NARROW}
    if lists:
        sizes = {key: value for key, value in _told(x).items() if key in ("t", "s", "window", "scale", "h", "d")}
        gradients.queries_list[b * n * groups,](
            x.q, x.rows, x.mask.lists, x.mask.ends, *left, **x.listed, **sizes, **flags, **blocks
        )
    else:
        gradients.queries_tile[b * triton.cdiv(n, blocks["BQ"]) * groups,](
            x.q, x.kv, x.compressed, *x.bounds, x.mask.counts, *left,
            width=_width(x), ENTRIES=x.entries, **_told(x, "k"), **flags, **blocks,
        )  # fmt: skip
    return _Chunk(first, n, outputs, pairs)


def _of_window(x: Inputs, chunk: _Chunk, into: Tensor | None) -> Tensor:
    """dkv `[b, s, d]` with the chunk's part, for the rows that it sees."""
    b, past = tiles_for(x.q).owned, x.sizes["s"] - x.sizes["t"]
    first, last = max(past + chunk.first - x.mask.window + 1, 0) // b.keys, past + chunk.first + chunk.n
    tiles, seers = triton.cdiv(last, b.keys) - first, b.keys + x.mask.window - 1  # queries that see some key of a tile
    splits = 2 if _again(x) else _splits(tiles * triton.cdiv(x.sizes["d"], b.columns))
    span = _rounded(triton.cdiv(seers, splits), max(b.rows // x.sizes["h"], 1))
    parts = _parts(x, chunk, _Work(True, tiles, first, triton.cdiv(seers, span), span))
    return _added(into, parts[:, : last - first * b.keys], first * b.keys, x.sizes["s"])


def _splits(programs: int) -> int:
    """In how many parts to divide the work of so many programs, which a GPU takes in rounds: for the least of it in
    rounds that are not full.
    """
    return min(range(1, 6), key=lambda n: triton.cdiv(programs * n, PROGRAMS) / n)


def _of_range(x: Inputs, chunk: _Chunk, into: Tensor | None) -> Tensor:
    """dcompressed `[b, p, d]` with the chunk's part; where tiles are few, queries are shared among programs, of narrow
    heads among half as many, for each leaves a sum.
    """
    b, p, most = tiles_for(x.q).owned, x.sizes["p"], PROGRAMS // (2 if _again(x) else 1)
    tiles = triton.cdiv(p, b.keys)
    shared = max(most // (tiles * triton.cdiv(x.sizes["d"], b.columns)), 1)
    span = _rounded(triton.cdiv(chunk.n, shared), CHUNK)
    return _added(into, _parts(x, chunk, _Work(False, tiles, 0, triton.cdiv(chunk.n, span), span))[:, :p], 0, p)


def _of_picks(x: Inputs, chunk: _Chunk, into: Tensor | None) -> Tensor:
    """dcompressed `[b, p, d]` with the chunk's part: rows for its picks, then the sum of each entry's."""
    (b, _, h, d), k, p, picks = x.q.shape, x.sizes["k"], x.sizes["p"], x.mask.picks
    assert picks is not None
    if into is None:
        into = x.q.new_zeros(b, p, d, dtype=torch.float32)
    rows = into if atomics() else x.q.new_empty(b, chunk.n, k, d)
    owned, heads = tiles_for(x.q).owned, next_power(h, 16)
    columns = owned.columns // 2 if atomics() else owned.columns  # sums that are added lie in another order before
    columns = max(min(columns, next_power(d, 16), columns * owned.rows // heads), 16)
    sizes = {key: x.sizes[key] for key in ("t", "p", "k", "h", "d")}
    gradients.keys_list[b * chunk.n * triton.cdiv(d, columns),](
        x.q, chunk.outputs.dout, chunk.pairs, picks, x.mask.ends, rows,
        chunk.first, chunk.n, sum(_slots(x)) // owned.keys, **sizes,
        ATOMIC=atomics(), WINDOW_SLOTS=_slots(x)[0], KEYS=owned.keys, HEADS=heads, COLUMNS=columns,
        num_stages=owned.stages, **registers(owned.warps),
    )  # fmt: skip
    if not atomics():
        scatter_sum(rows, entry_lists(picks[:, chunk.first : chunk.first + chunk.n], p), into)
    return into


def _parts(x: Inputs, chunk: _Chunk, work: _Work) -> Tensor:
    """Gradients `[b, tiles of keys, d]` in float32; those of splits are added in order."""
    owned, (b, _, h, d) = tiles_for(x.q).owned, x.q.shape
    parts = x.q.new_empty(work.splits, b, work.tiles * owned.keys, d, dtype=torch.float32)
    sizes = {key: x.sizes[key] for key in ("t", "p", "bound_rows", "h", "d")} | {"past": x.sizes["s"] - x.sizes["t"]}
    start, *ends = x.bounds
    bounds = (start, None, None) if work.own else (None, *ends)  # no kernel more for what is not read
    sizes |= {"window": x.mask.window, "OWN": work.own, "DOCUMENTS": bounds[0] is not None}
    blocks = {"KEYS": owned.keys, "num_stages": owned.stages, **registers(owned.warps, 1 if x.q.itemsize == 2 else 4)}
    programs, divided = b * work.splits * work.tiles, (work.first_tile, work.tiles, work.splits, work.span)
    if chunk.pairs is None:
        keys, heads, outputs = x.kv if work.own else x.compressed, min(next_power(h), owned.rows), chunk.outputs
        gradients.keys_again[programs,](
            x.q, keys, outputs.lse, outputs.delta, outputs.dout, *bounds, None if work.own else x.mask.counts, parts,
            *divided,
            rows=x.sizes["kv_rows" if work.own else "entry_rows"], width=_width(x), scale=x.scale,
            COUNTED=x.entries == "counts" and not work.own, D=next_power(d, 16),
            BQ=owned.rows // heads, BH=heads, **sizes, **blocks,
        )  # fmt: skip
    else:
        columns = min(owned.columns, next_power(d, 16))
        gradients.keys_tile[programs * triton.cdiv(d, columns),](
            x.q, chunk.outputs.dout, chunk.pairs, *bounds, parts, *divided,
            chunk.first, chunk.n, sum(_slots(x)) // owned.keys, WINDOW_SLOTS=_slots(x)[0],
            ROWS=owned.rows, COLUMNS=columns, **sizes, **blocks,
        )  # fmt: skip
    return parts[0] if work.splits == 1 else parts.sum(0)
