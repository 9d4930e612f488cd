"""What a compiled kernel costs on an H100 SXM, read off its code: a model, nothing is measured.

    python tests/support/speed.py attention           what the cases of compiled_attention.py compile for sm_90
    python tests/support/speed.py hyper bf16 d=4096   those whose name has all of these words

TTGIR tells the matrix products and what loops copy, the machine code its loops: for how many cycles of a turn each part
of a multiprocessor is busy, and how many the turn takes alone. P programs that share a multiprocessor take for a turn

    max(tensor, issue, shared, L2, serial / P)

`serial` is what one program takes: its instructions in order, each when its operands are there, products and copies
beside them until they are waited for (`_alone`). All warps of a program are taken to run in step, of a branch the
longer side, TMA to come in time. Not known: conflicts of banks, what caches hold, the order in which programs run.
"""

import ast
import functools
import importlib
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import dryrun
import triton

ROOT = Path(__file__).resolve().parents[2]

# an H100 SXM ---------------------------------------------------------------------------------------------------------

SMS, CLOCK = 132, 1.755e9  # datasheet; the boost clock under load
TENSOR = 4096  # FLOP per cycle of a multiprocessor, dense bf16 by wgmma (datasheet: 989 TFLOP/s at 1.83 GHz)
MMA = TENSOR // 2  # the same by mma.sync, which reaches some half of it on Hopper
ACHIEVED, COPIED = 798e12, 3.0e12  # a large product and a copy, measured: roofline.H100_ACHIEVED
SHARED = 128  # bytes per cycle of a multiprocessor: 32 banks of 4; shuffles go the same way
L2 = 24  # bytes per cycle of a multiprocessor: 5.5 TB/s, an estimate
SCHEDULERS = 4  # each issues an instruction of one warp per cycle
ALU, XU = 2, 8  # cycles of one on a scheduler's 16 integer and 4 special lanes (CUDA guide: 64 and 16 results a cycle)
REGISTERS, KIB, WARPS, PROGRAMS = 65536, 227, 64, 32  # of a multiprocessor; a program takes 1 KiB more than it asks
LAUNCH = 3e-6  # seconds, told apart: a graph hides most of them
# cycles until a result can be used: rounded from what others measured on Hopper and before, memory under load
MEMORY, NEAR, LINE = 800, 300, 35  # main memory; L2, for what is small; the rest of a line of 128 bytes
SMALL = 1024  # bytes below which a load is that
LATENCY = {"ATOMG": MEMORY, "LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 24, "REDUX": 24, "HMMA": 33, "VOTE": 12}
LATENCY |= {"I2F": 20, "F2I": 20, "POPC": 20, "LDC": 30, "ULDC": 12, "S2R": 20, "S2UR": 20, "R2UR": 12}
OTHER, BARRIER, WAIT, FENCE = 5, 30, 60, 20  # of the rest; beside, of BAR, a wait for wgmma, a fence: estimates

INTEGER = {"IADD3", "LOP3", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "SHF", "LEA", "PRMT", "VIADD", "VIMNMX", "MOV"}
INTEGER |= {"VIMNMX3", "VIADDMNMX", "IABS", "PLOP3", "F2FP", "SGXT", "P2R", "R2P", "I2FP"}
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC"}
COUNTED = {"HGMMA", "HMMA", "MUFU", "BAR", "WARPGROUP", "LDGSTS", "UTMALDG", "LDG", "STG", "LDS", "STS", "LDSM", "STSM"}
COUNTED |= {"SHFL", "LDL", "STL"}

# TTGIR ---------------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One matrix product of a tile. `repeats`: how often each of its elements is computed; `narrow`: its instruction
    has fewer columns than the tile allows without that.
    """

    loop: int  # the innermost that it lies in, -1 outside of all
    tile: str
    flops: int
    columns: int  # of an instruction
    warps: tuple[int, int]
    by: str  # "wgmma SS" from shared memory, "wgmma RS" from registers, "mma", "scalar"
    repeats: int
    narrow: bool


class Copy(NamedTuple):
    loop: int
    line: int
    bytes: int
    how: str  # "async", "tma", "load"
    rank: int


class IR(NamedTuple):
    products: list[Product]
    copies: list[Copy]
    lines: dict[int, int]  # loop -> line of its `for`
    used: set[str]  # arguments

    def slow_copies(self) -> list[Copy]:
        """Blocks that a loop with a product loads and waits for; of a loop that is there again, as where a tile is read
        again for what is not finite, those of the first."""
        loops = {p.loop for p in self.products} & {self._loops(line)[0] for line in self.lines.values()}
        return [c for c in self.copies if c.loop in loops and c.how == "load" and c.rank >= 2 and c.bytes >= 2048]

    def loaded(self, line: int | None, how: str = "") -> float:
        """Bytes that one turn of the loop at this line loads, what lies outside of loops for None."""
        loops = self._loops(line)
        return sum(c.bytes for c in self.copies if c.loop in loops and how in c.how) / max(len(loops), 1)

    def flops(self, line: int | None) -> float:
        """Of its products, each of them once."""
        loops = self._loops(line)
        return sum(p.flops for p in self.products if p.loop in loops) / max(len(loops), 1)

    def _loops(self, line: int | None) -> list[int]:
        return [-1] if line is None else sorted(i for i, at in self.lines.items() if at == line)


def read(text: str) -> IR:
    """Products and copies of a kernel in TTGIR."""
    layouts = dict(re.findall(r"^(#mma\d*) = #ttg\.nvidia_mma<\{(.*?)\}>", text, re.MULTILINE))
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    uses = Counter(re.findall(r"%(\w+)", text))
    ir, number = IR([], [], {}, {name for name, n in uses.items() if n > 1}), itertools.count()
    regions: list[int] = []
    loads = set(re.findall(r"(%\w+) = tt\.load ", text))
    for row in text.splitlines():
        code, _, place = row.strip().rpartition(" loc(")
        code, line = code or place, _line(place[:-1], places)
        if code.startswith("}") and regions and (closed := regions.pop()) >= 0:
            ir.lines[closed] = line
        loop = next((r for r in reversed(regions) if r >= 0), -1)
        if "warp_group_dot " in code or "tt.dot " in code:
            ir.products.append(_product(code, loop, layouts, instead=ELSE in regions))
        elif found := re.search(r"(tt\.load|async_copy_global_to_local|async_tma_copy\w*to_local)\b.*? : (.*)", code):
            how = {"tt.load": "load", "async_copy_global_to_local": "async"}.get(found[1], "tma")
            shape, bits = _shape(found[2].rsplit("->", 1)[1] if how == "tma" else found[2])
            size = math.prod(shape) * bits // 8
            if found[1] == "tt.load" and code.split(" : ")[0].split(", ")[-1] in loads:
                size = 0  # one block by two loads: what the other left out
            ir.copies.append(Copy(loop, line, max(size, 32), how, len(shape)))  # a sector at least
        if code.endswith("{"):
            turns, instead = re.search(r"\bscf\.(for|while)\b", code), code.startswith("}")
            regions.append(next(number) if turns else ELSE if instead else -2)
    return ir


ELSE = -3  # the other side of a branch


def _line(place: str, places: dict[str, str]) -> int:
    """Of the source, through names and calls."""
    text = places.get(place, "")
    if found := re.match(r'".*":(\d+):\d+$', text):
        return int(found[1])
    inner = re.search(r"#loc\d*", text)
    return _line(inner[0], places) if inner else 0


def _shape(text: str) -> tuple[list[int], int]:
    """Sides and bits of an element: of tensor<64x32xbf16, ..>, tensor<64x32x!tt.ptr<bf16>, ..>, !tt.ptr<i32>."""
    found = re.search(r"<((?:\d+x)*)(?:!tt\.ptr<)?[a-z]+(\d+)", text)
    assert found, text
    return [int(n) for n in found[1].split("x") if n], int(found[2])


def _product(code: str, loop: int, layouts: dict[str, str], instead: bool) -> Product:
    types = re.search(r" : ((?:tensor|!ttg\.memdesc)<.*?) \* .* -> (.*)", code)
    assert types, code
    ((*_, m, k), bits), n = _shape(types[1]), _shape(types[2])[0][-1]
    tile, layout = (f"{m}x{n}x{k} of {bits} bits", 0 if instead else 2 * m * n * k), re.search(r"#mma\d*", types[2])
    if layout is None:
        return Product(loop, *tile, 0, (0, 0), "scalar", 1, False)
    text = layouts[layout[0]]
    sides, (*_, down, across) = (
        [int(x) for x in re.findall(r"\d+", text.split(f"{key} = ")[1].split("]")[0])]
        for key in ("instrShape", "warpsPerCTA")
    )
    wgmma = "versionMajor = 3" in text
    columns = sides[-2] if wgmma else sides[-1]  # [16, n, k] and [16, 8]
    repeats = max(1, 16 * down // m) * max(1, columns * across // n)
    groups = down * across // 4
    beside = groups // max(min(groups, m // 64), 1)  # warp groups that have to share the columns
    by = f"wgmma {'RS' if types[1].startswith('tensor') else 'SS'}" if wgmma else "mma"
    narrow = wgmma and columns < min(256, n // beside)
    return Product(loop, *tile, columns, (down, across), by, repeats, narrow)


# machine code --------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    name: str  # LDG
    op: str  # LDG.E.128
    text: str
    writes: list[str]
    reads: list[str]
    place: tuple[str, int]  # file and line
    target: str  # label of a branch
    always: bool  # not predicated

    @property
    def wgmma(self) -> str:
        """64x128x16 RS."""
        found = re.search(r"64x\d+x\d+", self.op)
        return f"{found[0]} {'RS' if re.search(r' R[0-9]+, R', self.text) else 'SS'}" if found else ""


_NO_RESULT = {"STG", "STS", "STSM", "STL", "LDGSTS", "RED", "BAR", "DEPBAR", "HGMMA", "WARPGROUP", "BRA", "EXIT"}
_WIDTH = {"64": 2, "128": 4, "WIDE": 2}


def _wide(op: str) -> int:
    return max(_WIDTH.get(suffix, 1) for suffix in op.split("."))


def _instruction(text: str, place: tuple[str, int]) -> Instruction:
    found = re.match(r"(@!?U?P\w+ )?\s*([\w.]+)\s*(.*)", text)
    assert found, text
    guard, op, rest = found[1] or "", found[2], found[3]
    name, operands = op.split(".")[0], [x.strip() for x in rest.split(",")]
    wide, first = 4 if name == "HMMA" else _wide(op), re.fullmatch(r"(U?[RP])(\d+|T)", operands[0])
    writes: list[str] = []
    if name not in _NO_RESULT and first:
        if first[2] != "T":
            many = wide if "P" not in first[1] else 1
            writes = [f"{first[1]}{int(first[2]) + i}" for i in range(many)]
        if "P" in first[1] or re.match(r"U?P\d", (operands[1:2] or [""])[0]):  # two results: a register and a predicate
            writes += [x for x in operands[1:2] if re.fullmatch(r"U?[RP]\d+", x)]
    reads = re.findall(r"\bU?[RP]\d+\b", guard + ",".join(operands[bool(writes) :]))
    reads += [f"{u}R{int(n) + 1}" for u, n in re.findall(r"\b(U?)R(\d+)\.64", rest)]
    if name in ("STG", "STS", "HMMA"):
        last = re.findall(r"\bR(\d+)", rest if name == "HMMA" else operands[-1])
        reads += [f"R{int(n) + i}" for n in last for i in range(1, wide)]
    label = re.search(r"\((\.L_x_\d+)\)", rest)
    always = not guard and not re.match(r"!?U?P\d", operands[0])
    return Instruction(name, op, text, writes, reads, place, label[1] if label else "", always)


def _blocks(sass: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks and where each leads. What is called, or rarely branched to, is not reached."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    starts, place = {0}, ("", 0)
    for row in sass.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            place = found[1], int(found[2])
        elif found := re.match(r"\s*(\.L_x_\d+):", row):
            labels[found[1]] = len(code)
            starts.add(len(code))
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", row):
            code.append(_instruction(found[1], place))
            if code[-1].name in ("BRA", "EXIT", "RET"):
                starts.add(len(code))
    bounds = sorted(starts - {len(code)})
    blocks = [code[a:b] for a, b in itertools.pairwise([*bounds, len(code)])]
    leads = []
    for i, (*_, last) in enumerate(blocks):
        ends = last.name in ("BRA", "EXIT", "RET") and last.always and "DIV" not in last.op
        jumps = [bounds.index(labels[last.target])] if last.name == "BRA" and "DIV" not in last.op else []
        leads.append(jumps + ([] if ends or i + 1 == len(blocks) else [i + 1]))
    return blocks, leads


def _loops(leads: list[list[int]]) -> dict[int, set[int]]:
    """Natural loops, header -> blocks; as -1 all that can be reached."""
    order = _reached([0], leads, set())
    before = [[j for j in order if i in leads[j]] for i in range(len(leads))]
    loops = {-1: order}
    for i in order:
        for head in leads[i]:
            if head == i or i not in _reached([0], leads, {head}):  # every way to i leads through its head
                loops[head] = loops.get(head, {head}) | _reached([i], before, {head})
    return loops


def _reached(start: list[int], leads: list[list[int]], but: set[int]) -> set[int]:
    found, stack = set(but), list(start)
    while stack:
        if (i := stack.pop()) not in found:
            found.add(i)
            stack += leads[i]
    return found - but


def _way(blocks: list[list[Instruction]], leads: list[list[int]], body: set[int], head: int) -> set[int]:
    """The longest way from the head through blocks of a loop: of a branch one side."""
    longest: dict[int, tuple[int, list[int]]] = {}  # from a block on
    stack = [head]
    while stack:
        i = stack[-1]
        after = [j for j in leads[i] if j in body and j not in stack]  # what is on the stack lies before
        if left := [j for j in after if j not in longest]:
            stack.append(left[0])
        else:
            size, way = max((longest[j] for j in after), default=(0, []))
            longest[i] = size + len(blocks[i]), [i, *way]
            stack.pop()
    return set(longest[head][1])


class Segment(NamedTuple):
    """Instructions that run as often as their loop turns, inner loops left out; the first segment is no loop."""

    line: int | None  # of its `for`
    variable: str
    over: str  # the expression that it runs over
    parents: list[int]
    increments: list[int]  # of what may be its variable
    instructions: int
    counts: dict[str, int]  # of some, and of wgmma by shape
    tensor: float  # cycles of one turn, in which a multiprocessor is busy with it,
    issue: float
    shared: float
    serial: float  # and that one program takes alone
    loaded: float  # bytes


class Code(NamedTuple):
    kernel: str
    warps: int
    registers: int
    shared: int
    ir: IR
    segments: list[Segment]

    @property
    def programs(self) -> int:
        """That a multiprocessor holds at once."""
        registers = math.ceil(self.registers / 8) * 8 * 32 * self.warps
        return min(REGISTERS // registers, (KIB << 10) // (self.shared + 1024), WARPS // self.warps, PROGRAMS)


def analyse(kernel: Any) -> Code:
    """Of a triton.compiler.CompiledKernel for sm_90."""
    taken, ir = dryrun.resources(kernel), read(kernel.asm["ttgir"])
    blocks, leads = _blocks(dryrun._tool("nvdisasm", "-c", "-ndf", "-g", binary=kernel.asm["cubin"]))
    loops = {h: body for h, body in _loops(leads).items() if sum(len(blocks[i]) for i in body) >= 8}  # else it spins
    heads, found = sorted(loops), dict[int, Segment]()
    for head in sorted(heads, key=lambda h: len(loops[h])):  # from the inside
        inner = [h for h in heads if loops[h] < loops[head]]
        own = _way(blocks, leads, loops[head], max(head, 0)).difference(*(loops[h] for h in inner))
        body = [x for i in sorted(own) for x in blocks[i] if x.name != "NOP" and not x.text.startswith("@!PT")]
        parents = [i for i, h in enumerate(heads) if i and loops[h] > loops[head]]
        taken_lines = {found[h].line for h in inner}
        where = None if head < 0 else _statement(body, taken_lines)
        found[head] = _segment(body, taken["warps"], parents, ir, where)
    return Code(taken["kernel"], taken["warps"], taken["registers"], taken["shared"], ir, [found[h] for h in heads])


def _statement(body: list[Instruction], but: set[int | None]) -> tuple[int, str, str]:
    """Line, variable and iterable of the `for` that most of these instructions lie in."""
    votes: Counter[tuple[int, str, str]] = Counter()
    for (path, line), n in Counter(x.place for x in body).items():
        inside = [(last - first, at) for first, last, at in _statements(path) if first <= line <= last]
        votes.update({at: n for _, at in sorted(inside)[:1] if at[0] not in but})
    return votes.most_common(1)[0][0] if votes else (0, "", "")


@functools.cache
def _statements(path: str) -> list[tuple[int, int, tuple[int, str, str]]]:
    """First and last line, and line, variable and iterable, of each `for` of a source that is left to run time. What
    triton's cache holds may name the file of another checkout.
    """
    files = [ROOT / path[found.start() :] for found in re.finditer("kernels/", path)]
    file = next((f for f in files if f.is_file()), Path(path))
    if file.is_relative_to(Path(triton.__file__).parent) or not file.is_file():
        return []
    loops = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.For)]
    every = [(n, ast.unparse(n.target), ast.unparse(n.iter)) for n in loops]
    return [(n.lineno, n.end_lineno or 0, (n.lineno, x, over)) for n, x, over in every if "static_range" not in over]


def _segment(
    body: list[Instruction], all_warps: int, parents: list[int], ir: IR, where: tuple[int, str, str] | None
) -> Segment:
    warps, names, shapes = all_warps / SCHEDULERS, Counter(x.name for x in body), Counter(x.wgmma for x in body)
    line, variable, over = where or (None, "", "")
    del shapes[""]
    add = re.compile(r"\S*(?:IADD3?|VIADD)\S* (U?R\d+), \1(?:\.reuse)?, (-?0x[0-9a-f]+)")
    steps = [add.match(x.text) for x in body if x.place[1] == line]
    tensor = sum(n * _hgmma(shape) for shape, n in shapes.items()) + sum(_hmma(x.op) for x in body if x.name == "HMMA")
    busy = max(len(body), ALU * sum(names[n] for n in INTEGER), XU * sum(names[n] for n in SPECIAL))
    moved = 32 * all_warps * sum(map(_bytes, body)) + warps * sum(n * _operands(s) for s, n in shapes.items())
    return Segment(
        line,
        variable,
        over,
        parents,
        [abs(int(found[2], 16)) for found in steps if found],
        len(body),
        {n: many for n, many in sorted(names.items()) if n in COUNTED} | dict(shapes),
        tensor * warps,
        busy * warps,
        (moved + (ir.loaded(line, "tma") if where else 0)) / SHARED,
        _alone(body, max(warps, 1), ir, turns=3 if where else 1),
        ir.loaded(line),
    )


def _operands(shape: str) -> int:
    """Bytes that one warp group's wgmma reads from shared memory: 32 of each row and column."""
    m, n, _ = map(int, shape.split()[0].split("x"))
    return 32 * (n + (m if shape.endswith("SS") else 0))


def _hgmma(shape: str) -> float:
    """Cycles of one warp group's wgmma, of whatever dtype: its products, or its operands."""
    m, n, _ = map(int, shape.split()[0].split("x"))
    return max(2 * m * n * 16 / TENSOR, _operands(shape) / SHARED)


def _hmma(op: str) -> float:
    """Cycles of one warp's mma.sync, which a quarter of a multiprocessor computes."""
    k = {"16816": 16, "1688": 8, "1684": 4}.get(op.split(".")[1], 16)
    return 2 * 16 * 8 * k / (MMA / SCHEDULERS / (2 if "TF32" in op else 1))


def _bytes(x: Instruction) -> int:
    """Of shared memory, of one thread."""
    if x.name in ("LDSM", "STSM"):
        return 4 * int(x.op[-1]) if x.op[-1].isdigit() else 4
    return 4 * _wide(x.op) if x.name in ("LDS", "STS", "LDGSTS") else 4 if x.name == "SHFL" else 0


def _alone(body: list[Instruction], warps: float, ir: IR, turns: int) -> float:
    """Cycles of a turn when nothing else runs: of three the last, so that what is fetched ahead is there."""
    sizes = {line: max(c.bytes for c in ir.copies if c.line == line) for line in {c.line for c in ir.copies}}
    now = began = tensor = integer = special = copied = 0.0
    ready: dict[str, float] = {}
    last: dict[int, float] = {}  # when the last line of a small load comes, by line of the source
    products, groups = [0.0], [0.0]
    for _ in range(turns):
        began, misses = now, Counter[int]()
        for x in body:
            start = max([now, *(ready.get(r, 0.0) for r in x.reads)])
            latency: float = LATENCY.get(x.name, OTHER)
            left = int(x.text.rsplit("x", 1)[1], 16) if "DEPBAR.LE" in x.op else 0
            if x.name in INTEGER:
                start = max(start, integer)
                integer = start + ALU * warps
            elif x.name in SPECIAL:
                start = max(start, special)
                special = start + XU * warps
            elif x.name == "HMMA":
                start = max(start, tensor)
                tensor = start + warps * _hmma(x.op)
            elif x.name == "HGMMA":
                tensor = max(tensor, start) + warps * _hgmma(x.wgmma)
                products += [tensor] * ("gsb0" in x.text)
            elif x.op.startswith("WARPGROUP.DEPBAR"):
                start = max([start, *(end + WAIT for end in products[1 : len(products) - left])])
            elif x.name == "LDGSTS":
                copied = start + MEMORY
            elif x.name == "LDGDEPBAR":
                groups.append(copied)
            elif x.name == "DEPBAR":
                start = max([start, *groups[: len(groups) - left]])
            elif x.name == "LDG":
                size, misses[x.place[1]] = sizes.get(x.place[1], SMALL), misses[x.place[1]] + 1
                latency = NEAR if size < SMALL else MEMORY
                if size < SMALL and misses[x.place[1]] > math.ceil(size / 128):
                    latency = max(LINE, last[x.place[1]] - start)
                else:
                    last[x.place[1]] = start + latency
            start += {"BAR": BARRIER, "MEMBAR": FENCE, "FENCE": FENCE}.get(x.name, 0)
            for register in x.writes:
                ready[register] = start + latency + warps - 1
            now = start + warps
    return now - began


# time ----------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One segment of a launch."""

    over: str
    turns: float  # of a program
    seconds: float
    bound: str


class Time(NamedTuple):
    seconds: float
    bound: str
    parts: list[Part]
    tensor: float  # share of the time in which tensor cores are busy
    least: float  # seconds that bytes or products, each of them once, take at best


class _Length(float):
    """A range as its length, a whole number where its bounds are."""

    step: float

    def __new__(cls, *bounds: float, **_: Any) -> "_Length":
        start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
        number = max((stop - start) / step, 0)
        whole = all(isinstance(x, int) for x in (start, stop, step))
        made = super().__new__(cls, math.ceil(number) if whole else number)
        made.step = step
        return made


def turns(code: Code, names: dict[str, Any], grid: tuple[int, ...]) -> list[float]:
    """How often a program runs each segment. A loop runs over a range of `names`: the arguments of the launch and what
    else is known, "for x" being the turns of the loop of x itself, or those of all such loops of the source in order;
    times "again" where a loop of the source was there before.

    Raises:
        NameError: nothing is known of a name that a range depends on.
    """
    programs = {"program_id": lambda axis: 0, "num_programs": lambda axis: grid[axis]}
    tl = SimpleNamespace(range=_Length, cdiv=lambda a, b: -(-a // b), minimum=min, maximum=max, **programs)
    found: list[tuple[float, float]] = []  # in all, of one entry
    for i, s in enumerate(code.segments):
        each = 1.0
        if s.over:
            known, step = names.get(f"for {s.variable}"), 1
            if isinstance(known, list):
                known = known[
                    sorted({t.line or 0 for t in code.segments if t.variable == s.variable}).index(s.line or 0)
                ]
            if known is None:
                try:
                    known = eval(s.over, {"range": _Length, "tl": tl} | names)
                except Exception as error:
                    raise NameError(f"{code.kernel}: {s.variable} in {s.over}: {error}") from error
                step = known.step
            each = _unrolled(code, i, float(known), step, pairs="again" not in names)
            if any(t[:3] == s[:3] for t in code.segments[1:i]):
                each *= names.get("again", 1)
        found.append((each * math.prod(found[p][1] for p in s.parents), each))
    return [all for all, _ in found]


def _unrolled(code: Code, i: int, all: float, step: float, pairs: bool) -> float:
    """Turns of a loop of the machine code for so many of the source: several of these may be one of it, and what is
    left over have a loop of its own behind, a pair.
    """
    s = code.segments[i]
    for j in (i - 1, i + 1) if pairs else ():
        if 0 < j < len(code.segments) and code.segments[j][:4] == s[:4]:
            first, second = (_accesses(code.segments[x]) for x in sorted((i, j)))
            if (many := round(first / second)) > 1:
                return all // many if i < j else all % many
    least = min((x // step for x in s.increments if step > 1 and x and x % step == 0), default=1)
    at_once = least if least in (2, 4, 8) else 1
    return all // at_once if all == int(all) else all / at_once


def _accesses(s: Segment) -> int:
    return sum(s.counts.get(n, 0) for n in ("LDG", "STG", "SHFL", "LDS", "STS", "HGMMA", "HMMA")) or s.instructions


def predict(code: Code, grid: tuple[int, ...], names: dict[str, Any], moved: float) -> Time:
    """Of a launch that moves so many bytes from and to main memory. "L2" of `names`: the part of what is loaded that
    comes from there, of tiles that programs beside each other load at the same time.
    """
    each = math.ceil(math.prod(grid) / SMS)  # programs of the busiest multiprocessor
    rounds = math.ceil(each / code.programs)
    parts, tensor, flops = [], 0.0, 0.0
    for s, n in zip(code.segments, turns(code, names, grid)):
        busy = {"tensor": s.tensor, "issue": s.issue, "shared": s.shared, "L2": s.loaded * names.get("L2", 1) / L2}
        cycles = {name: each * x for name, x in busy.items()} | {"serial": rounds * s.serial}
        bound = max(cycles, key=cycles.__getitem__)
        parts.append(Part(s.over, n, n * cycles[bound] / CLOCK, bound))
        tensor += n * each * s.tensor / CLOCK
        flops += n * code.ir.flops(s.line) * math.prod(grid)
    seconds = {"code": sum(p.seconds for p in parts), "HBM": moved / COPIED}
    seconds["power"] = tensor * TENSOR * SMS * CLOCK / ACHIEVED  # all tensor cores at once slow the clock
    bound = max(seconds, key=seconds.__getitem__)
    longest = max(parts, key=lambda p: p.seconds).bound
    least = max(seconds["HBM"], flops / ACHIEVED)
    return Time(seconds[bound], longest if bound == "code" else bound, parts, tensor / (seconds[bound] or 1), least)


# digests of kernels --------------------------------------------------------------------------------------------------


def digest(kernel: Any) -> dict[str, Any]:
    """Of a kernel: what it takes, products, slow copies, loops; whether the assembler makes it wait for each wgmma."""
    code = analyse(kernel)
    numbers = {"warps": code.warps, "registers": code.registers, "shared": code.shared, "programs": code.programs}
    products = [[n, *what] for what, n in Counter((p.tile, *p[3:]) for p in code.ir.products).items()]
    wgmma, waits = (sum(s.counts.get(name, 0) for s in code.segments) for name in ("HGMMA", "WARPGROUP"))
    found = {"products": products, "slow copies": [c.bytes for c in code.ir.slow_copies()]}
    found["serial wgmma"] = wgmma > len(code.ir.products) and waits >= 2 * wgmma
    keys = ("tensor", "issue", "shared", "serial", "loaded")
    loops = [
        {"over": s.over, "instructions": s.instructions, **s.counts, **{key: round(getattr(s, key)) for key in keys}}
        for s in code.segments
    ]
    return {"kernel": code.kernel, **numbers, **found, "loops": loops}


def broken(row: dict[str, Any]) -> dict[str, str]:
    """The rules that a digest breaks, and by what."""
    found = {}
    for n, tile, columns, warps, by, repeats, narrow in row["products"]:
        if repeats > 1:
            found["repeated"] = f"{n} {by} of {tile}, {repeats} times by {warps} warps"
        if narrow:
            found["narrow"] = f"{n} {by} of {tile}, {columns} columns by {warps} warps"
    if row["slow copies"]:
        found["waits"] = "for blocks of " + ", ".join(f"{size:,} bytes" for size in row["slow copies"])
    if row["serial wgmma"]:
        found["serial"] = "waits for each wgmma before the next"
    return found


def digests(op: str, chosen: Callable[[str], bool] = lambda case: True) -> Iterator[dict[str, Any]]:
    """Of every kernel that the cases of an op compile for sm_90."""
    resources = dryrun.resources

    def both(kernel: Any) -> dict[str, Any]:
        with patch.object(dryrun, "resources", resources):
            return digest(kernel)

    with patch.object(dryrun, "resources", both), dryrun.gpu("sm_90") as (_, kernels):
        for case, (targets, run) in importlib.import_module(f"compiled_{op}").CASES.items():
            start = len(kernels)
            if "sm_90" in targets and chosen(case):
                run()
            yield from ({"case": case} | row for row in kernels[start:])


def main(op: str, *words: str) -> None:
    for row in digests(op, lambda case: all(word in case for word in words)):
        rules, loops, products = broken(row), row.pop("loops"), row.pop("products")
        print("\n" + ", ".join(f"{key} {value}" for key, value in row.items()))
        for x in (*(f"{rule}: {what}" for rule, what in rules.items()), *products):
            print("   ", x)
        for x in loops:
            print("    loop", ", ".join(f"{key} {value}" for key, value in x.items()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
