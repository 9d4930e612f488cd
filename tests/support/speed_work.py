"""What the launches of a pass take on an H100 by the model of speed.py: host code runs on meta tensors (counting.py),
kernels are compiled for sm_90, nothing is executed.

What the shapes of its arguments do not tell of a kernel, FACTS does, as a function of arguments and grid: names that
ranges of its loops depend on (`speed.turns`); by the name of a tensor the bytes of it that are moved, where that is not
all of it once; "work", the share of the grid that does not return at once; "L2" (`speed.predict`). Texts are one
document each, experts have as many rows, picks are any entries of the past.

t queries · n queries of a chunk · s window rows · h heads · d head dim · p entries · k picks
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import counting
import speed
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

PRODUCT, SINGLE = 600e12, 50e12  # FLOP/s of torch's in half precision, and in float32, which takes no tensor cores
CACHE = 50 << 20  # bytes of L2
# programs side by side load the same rows and columns of a product at once, which L2 serves together: tiles like those
# of `grouped_swiglu` make 488 TFLOP/s on an H100 (published), which 24 bytes a cycle for each would not allow
TILES = {"L2": 0.5}
_do_compile = JITFunction._do_compile

# what shapes do not tell of a kernel ---------------------------------------------------------------------------------

Grid = tuple[int, ...]
Names = dict[str, Any]


class A(dict[str, Any]):
    """Arguments of a launch by their names."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def part(self, share: float, *names: str) -> dict[str, float]:
        """That share of the bytes of each."""
        return {name: share * size(self[name]) for name in names if name in self}


def size(x: Any) -> float:
    x = getattr(x, "base", x)  # of a descriptor
    return float(counting.extent(x)) if isinstance(x, Tensor) else 0.0


def cdiv(a: float, b: float) -> int:
    return math.ceil(a / b)


def mean(x: Tensor, step: int = 1) -> float:
    """Of these numbers, in steps of so many."""
    return float(((x + step - 1) // step).double().mean()) if x.numel() else 0.0


def seen(t: int, p: int, first: int = 0, n: int | None = None) -> Tensor:
    """How many of p entries each of n queries from the first on sees."""
    return (torch.arange(first, first + (t if n is None else n)) + 1) * p // max(t, 1)


def _keys(a: A, kind: str, first: int = 0, n: int | None = None, tile: int = 1) -> tuple[Tensor, Tensor]:
    """Window rows and entries of tiles of queries."""
    entries = seen(a.t, a.p, first, n) * (kind != "none")
    rows = (torch.arange(first, first + (a.t if n is None else n)) + 1 + a.s - a.t).clamp(max=a.window)
    entries = entries.clamp(max=a.k) if kind in ("list", "picks") else entries
    return rows[tile - 1 :: tile] + tile - 1, entries[tile - 1 :: tile]


def _steps(a: A, kind: str, first: int = 0, n: int | None = None) -> float:
    """Of the loop over the keys of a tile, whose first lies anywhere."""
    rows, entries = _keys(a, kind, first, n, a.get("BQ", 1))
    return mean(rows + (a.TK // 2 if a.get("BQ", 1) > 1 or n else 0), a.TK) + mean(entries, a.TK)


AGAIN = {"again": 0, "for first": 0}  # with keys that are not finite, of which there are none


def attention_tile(a: A, grid: Grid) -> Names:
    return AGAIN | {"for i": _steps(a, a.ENTRIES)}


WINDOW, AHEAD, UNIT = 128, 64, 16  # of every model's, where a kernel is not told; of attention's launch and kernels


def _listed(a: A, first: int = 0, n: int | None = None) -> Tensor:
    """Of each query, how many rows its list of window and picks holds."""
    s, window = a.get("s", a.t), a.get("window", WINDOW)
    k = (a.width - window - 16 - AHEAD) // AHEAD * AHEAD  # of launch._listed, of picks that are a multiple
    of = A({"t": a.t, "s": s, "p": a.rows - s - 1, "k": k, "window": window})
    rows, entries = _keys(of, "list", first, n)
    return rows + entries


def attention_list(a: A, grid: Grid) -> Names:
    return {"for i": mean(_listed(a), a.TK)}


def queries_list(a: A, grid: Grid) -> Names:
    listed = _listed(a, a.chunk, a.n)
    moved = a.part(a.n / a.t, "q", "lse", "out", "dout", "dq", "delta", "lists", "ends")
    return moved | a.part(min(mean(listed) / max(a.slots, 1), 1), "pairs") | {"for i": mean(listed, a.TK)}


def list_keys(a: A, grid: Grid) -> Names:
    return {"own": min(a.window, a.s)}


def attention_split(a: A, grid: Grid) -> Names:
    """Those that a query picks are few of the entries."""
    rows, entries = _keys(a, a.ENTRIES)
    read = min(a.t * a.k / max(a.p, 1), 1) if a.ENTRIES == "picks" else 1
    return a.part(read, "compressed") | {"for i": (mean(rows) + mean(entries)) / a.TK / grid[1]}


def queries_tile(a: A, grid: Grid) -> Names:
    rows, entries = _keys(a, a.ENTRIES, a.chunk, a.n)
    moved = a.part(a.n / a.t, "q", "lse", "out", "dout", "dq", "delta", "counts")
    moved |= a.part(min((mean(rows) + mean(entries)) / max(a.slots, 1), 1), "pairs")
    return AGAIN | moved | {"for i": _steps(a, a.ENTRIES, a.chunk, a.n)}


def keys_tile(a: A, grid: Grid) -> Names:
    own = a.WINDOW_SLOTS / (a.slot_tiles * a.KEYS)
    queries = (a.KEYS + a.window - 1) / a.splits if a.OWN else min(a.span, a.n) * (a.chunk + a.n / 2) / a.t
    moved = a.part(a.n / a.t, "q", "dout") | a.part(own if a.OWN else (1 - own) / 2, "pairs")
    seen_of = seen(a.t, a.p, a.chunk, a.n)  # of p and ds, units that are kept; of q and dout, all
    kept = (a.window + UNIT - 1) / (a.KEYS + a.window - 1) if a.OWN else mean(seen_of, UNIT) * UNIT / a.KEYS
    kept /= 1 if a.OWN else mean(seen_of, a.KEYS) or 1
    loaded = {"L2": (a.COLUMNS + kept * a.KEYS) / (a.COLUMNS + a.KEYS)}
    return moved | loaded | {"begin": 0, "stop": queries, "STEP": 128}


def keys_again(a: A, grid: Grid) -> Names:
    queries = (a.KEYS + a.window - 1) / a.splits if a.OWN else min(a.span, a.t) / 2
    return a.part(1 if a.COUNTED else 0, "counts") | {
        "begin": 0, "stop": queries, "STEP": 128, "for i": queries * a.h / (a.BQ * min(a.BH, a.h))
    }  # fmt: skip


def keys_list(a: A, grid: Grid) -> Names:
    own = a.WINDOW_SLOTS / (a.slot_tiles * a.KEYS)
    used = mean(seen(a.t, a.p, a.chunk, a.n).clamp(max=a.k))
    return a.part(a.n / a.t, "q", "dout", "index") | a.part(1 - own, "pairs") | {"last": used}


def loss_rows(a: A, grid: Grid) -> Names:
    blocks, again = cdiv(a.v, a.BLOCK), a.GRAD and 4 * a.v * speed.SMS * 2 > CACHE
    return a.part(1 + again, "logits") | {"for start": [0, blocks, blocks] if a.GRAD else [blocks]}


def experts(a: A, grid: Grid) -> Names:
    """Those that have rows, and their weights."""
    e, r = len(a.offsets) - 1, len(a.order if "order" in a else a.out)
    work = min(e, r) * cdiv(r / e, a.BM) / a.total
    return TILES | a.part(min(r / e, 1), "w", "w13", "w2") | {"work": work}


def sum_lists(a: A, grid: Grid) -> Names:
    rows = len(a.pairs) / grid[0]
    turns = cdiv(rows, a.ROWS) if rows > 1 else rows
    return a.part(1 + a.ADD, "out") | {"for start": turns, "L2": rows / turns / a.ROWS}


def index_scores(a: A, grid: Grid) -> Names:
    """Tiles of queries that see more entries than they pick, as far as they see."""
    tiles = torch.arange(a.first, a.first + grid[0] // cdiv(a.p, a.BP)) % cdiv(a.t, a.BQ)
    high = (tiles * a.BQ + a.BQ).clamp(max=a.t) * a.p // a.t
    share, chunk = mean(high * (high > a.k), a.BP) / cdiv(a.p, a.BP), len(tiles) * a.BQ / (a.t * len(a.q))
    return TILES | a.part(share, "out") | a.part(min(chunk, 1), "q", "weights") | {"work": share}


def select(a: A, grid: Grid) -> Names:
    high = seen(a.t, 16 * a.sixteens, a.first % cdiv(a.t, a.queries) * a.queries, min(grid[0], a.t))
    crowded = (high > a.k).double()
    held = a.HELD or 64 * a.sixteens * speed.SMS * 2 < CACHE  # the row, by registers or L2
    many, share = mean(high * crowded), float(crowded.mean())
    loops = [cdiv(a.kept, a.C) * (1 - share), many / a.C]
    moved = {"scores": 4 * (1 if held else 5) * many * grid[0]} | a.part(grid[0] / (a.t * len(a.start)), "picks")
    found = {"low": 0, "high": many, "for _": 32 * share, "for i": [loops[0], 4 * share, loops[1]]}
    return moved | found | {"for i": loops[0], "again": 1} if a.HELD else moved | found


def compared(a: A, grid: Grid) -> Names:
    last = seen(a.t, a.width, a.first, a.n)[a.get("BQ", 1) - 1 :: a.get("BQ", 1)]  # of each tile
    count = a.k if a.PICKED else a.BS * mean(last, a.BS)
    moved = a.part(a.n / a.t, "q", "per_head", "index", "dq", "dweights", "weights")
    return moved | {"count": count, "begin": 0, "stop": count}


def key_gradient(a: A, grid: Grid) -> Names:
    return {"begin": 0, "stop": a.span, "least": 0, "most": a.span * (a.first + a.n / 2) / a.t}


def symmetric(a: A, grid: Grid) -> Names:
    """One triangle."""
    below = (torch.arange(cdiv(a.r, a.BM))[:, None] + 1) * a.BM > torch.arange(cdiv(a.r, a.BN)) * a.BN
    return TILES | {"work": float(below.double().mean())}


FACTS: dict[str, Callable[[A, Grid], Names]] = {
    f.__name__: f for f in (attention_tile, attention_list, attention_split, queries_tile)
}
FACTS |= {f.__name__: f for f in (keys_tile, keys_again, keys_list, loss_rows, sum_lists, index_scores, select)}
FACTS |= {f.__name__: f for f in (key_gradient, symmetric)}
FACTS |= {f.__name__: f for f in (queries_list, list_keys)}
FACTS |= dict.fromkeys(("sum_heads", "divergence", "query_gradient"), compared)
FACTS |= dict.fromkeys(("grouped_swiglu", "grouped_swiglu_backward", "grouped"), experts)
FACTS |= {
    "product": lambda a, grid: TILES,
    "grouped_outer": lambda a, grid: TILES | {"for start": cdiv(len(a.order) / (len(a.offsets) - 1), a.BK)},
    "gather_rows": lambda a, grid: {"table": size(a.out)},
    "project": lambda a, grid: {"split": 0},
    "project_backward": lambda a, grid: {"group": 0},
    "coefficients_backward": lambda a, grid: {"part": 0},
    "pool_forward": lambda a, grid: {"begin": 0},
    "pool_rows": lambda a, grid: {"for i": 1},
    "place": lambda a, grid: {"block": (min(a.SPAN, grid[0]) - 1) / 2},
    "balance_strips": lambda a, grid: {"strip": 0},
    "gate_backward": lambda a, grid: {"block": 0},
}

# launches ------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: str
    code: speed.Code
    grid: Grid
    moved: float
    time: speed.Time


@dataclass
class Pass:
    """What a pass launches, and what torch does beside: seconds of copies, sorts and the like, and of products."""

    launches: list[Launch] = field(default_factory=list)
    torch: Counter[str] = field(default_factory=Counter)
    products: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(x.time.seconds for x in self.launches)

    @property
    def beside(self) -> float:
        """Seconds of torch's."""
        return sum(self.torch.values()) + self.products


_codes: dict[tuple[str, str], speed.Code] = {}


def launch(x: counting.Launched) -> Launch:
    """Compiles its kernel, once."""
    key = (x.name, str(x.call[1]))
    if key not in _codes:
        _codes[key] = speed.analyse(_do_compile(*x.call))
    code, a = _codes[key], A(x.arguments)
    known = FACTS[x.name](a, x.grid) if x.name in FACTS else {}
    tensors = {id(v): name for name, v in a.items() if size(v) and name in code.ir.used}
    moved = sum(known.get(name, size(a[name])) for name in tensors.values())
    names = a | {name: v for name, v in known.items() if not size(a.get(name))}
    grid = (math.ceil(x.grid[0] * known.get("work", 1)), *x.grid[1:])
    return Launch(x.name, code, x.grid, moved, speed.predict(code, grid, names, moved))


def passes(run: Callable[[], Any], back: Callable[[Any], Any] | None = None) -> list[Pass]:
    """Of a function in half precision, and of the backward pass of what it returns. Kernels are compiled behind both:
    what is compiled would be launched instead of counted.
    """
    with counting.gpu("sm_90", keep=True) as counted:
        with torch.autocast("meta", torch.bfloat16):
            result = run()
        found = [_taken(counted)]
        if back is not None:
            back(result)
            found.append(_taken(counted))
        return [Pass([launch(x) for x in launched], *beside) for launched, *beside in found]


def _taken(counted: counting.Counted) -> tuple[list[counting.Launched], Counter[str], float]:
    """What ran since the last call: launches, seconds of torch's copies by name, and of its products."""
    assert counted.launched is not None and counted.traffic is not None
    launched, seconds, products = list(counted.launched), Counter[str](), 0.0
    for x in counted.traffic:
        products += x.flops / (SINGLE if x.dtype == torch.float32 else PRODUCT)
        seconds[x.name] += 0 if x.flops else x.bytes / speed.COPIED  # type: ignore[assignment]
    counted.clear()
    return launched, seconds, products
