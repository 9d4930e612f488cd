"""One benchmark, or all, from options to files: a JSON with every number, and a PNG drawn from it.

They are named OP-DEVICE, or OP-SHAPES-DEVICE where shapes were asked for.
"""

import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ....model.disk import write_json
from ...run import folder as folders
from ...run import provenance
from ..roofline import DTYPES, Peak, datasheet
from . import OPS, measure, peers
from .base import kernels_at
from .checks import RedTests, check
from .clocks import clocks
from .ours import is_ours
from .report import against_base, columns, table
from .task import Op, Setting

REPEATS = {"cuda": 100, "cpu": 7}


def run_all(*, device: str | None = None, out: Path | None = None, **options: Any) -> list[Path]:
    """Every op at its own shapes, into one folder; `options` as for `run`. An op with red tests is left out.

    Raises:
        ValueError: an option names something that is not there, or at the end: tests of an op are red.
    """
    folder, paths, red = out or folders.fresh("bench-all"), [], []
    for op in OPS:
        print(f"\n=== {op}: {OPS[op]}\n", flush=True)
        try:
            paths.append(run(op, device=device, out=folder, **options))
        except RedTests as error:
            print(error, flush=True)
            red.append(op)
    if red:
        raise RedTests(f"not timed, as their tests are red: {', '.join(red)}")
    return paths


def run(
    op: str,
    *,
    shape: str | None = None,
    tokens: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    repeats: int | None = None,
    data: str | None = None,
    out: Path | None = None,
    base: str | None = None,
    tests: bool = True,
    others: bool = True,
    drawn: bool = True,
    patience: float = measure.PATIENCE,
) -> Path:
    """Measures, prints tables as they come, writes the files; returns the JSON's path. None: the op's own choice.

    `base` is a commit whose kernels run beside the present ones; with `tests` the op's own tests run first; without
    `others` our own contenders run alone, without `drawn` there is no PNG; `patience` is the seconds after which one
    takes no more turns. The JSON is written anew after each shape and length: what is cut off leaves what it has.

    Raises:
        ValueError: an option names something that is not there.
        RedTests: a test of the op failed, and nothing was timed.
    """
    module, on = load(op), _device(device)
    kind = _choose("dtype", dtype or ("bfloat16" if on.type == "cuda" else "float32"), DTYPES)
    data = _choose("data", data or next(iter(module.data)), module.data)
    shapes = {name: _shape(module, name) for name in (shape or module.defaults[on.type]).split(",")}
    lengths = _lengths(tokens) if tokens else None
    repeats = REPEATS[on.type] if repeats is None else repeats
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1")
    with kernels_at(base) if base else nullcontext((None, None)) as (package, commit):
        checked = check(op, on.type) if tests else "not run: --no-tests"
        result = describe(op, kind, on, data, repeats) | {"tests": checked, "base": commit}
        print(_heading(result), flush=True)
        path = _path(
            out or folders.fresh(f"bench-{op}"), op, shapes if shape else (), result["provenance"]["machine"], on
        )
        for name, sizes in shapes.items():
            result["shapes"][name] = asdict(sizes)
            for n in lengths or sizes.tokens:
                setting = Setting(sizes, n, getattr(torch, kind), on, data, base=package)
                result["rows"] += _rows(module, setting, name, result, others, patience)
                result["provenance"]["clocks"]["after"] = clocks(on)
                write_json(path, result)
    print(f"\nnumbers  {path}\npicture  {_try_draw(path) if drawn else 'not asked for'}")
    return path


def _path(folder: Path, op: str, shapes: Iterable[str], machine: dict[str, Any], device: torch.device) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    where = machine["name"] if device.type == "cuda" else "cpu"
    return folder / f"{slug('-'.join([op, *shapes, where]))}.json"


def _rows(
    module: Op, setting: Setting, name: str, result: dict[str, Any], others: bool, patience: float
) -> list[dict[str, Any]]:
    """Of all tasks at one shape and length, printed as they come."""
    measured, told = Peak(**result["peaks"]["measured"]), result["peaks"]["datasheet"]
    peak, found = Peak(**told) if told else measured, []
    try:
        tasks = module.tasks(setting)
    except torch.OutOfMemoryError:
        print(f"\n{name} T={setting.tokens:,}: the inputs do not fit into the device's memory", flush=True)
        return []
    for task in tasks:
        if not others:
            task = replace(task, contenders=[c for c in task.contenders if is_ours(c.name)])
        try:
            with _Progress(f"{name} {task.name} T={setting.tokens:,}") as progress:
                rows = measure.measure(task, setting.dtype, result["repeats"], progress.say, patience)
        except torch.OutOfMemoryError:
            note = {"status": "not run", "note": "eager runs out of memory"}
            rows = [{"contender": c.name} | note for c in task.contenders]
        at = {"shape": name, "task": task.name, "tokens": setting.tokens}
        rows = [at | row | columns(task, row, peak, measured) for row in rows]
        against_base(rows)
        found += rows
        print("\n" + table(rows), flush=True)
    return found


def load(op: str) -> Op:
    """The op of that name. Raises ValueError, with the names there are."""
    return importlib.import_module(f".{_choose('op', op, OPS)}", __package__).OP


def describe(op: str, dtype: str, device: torch.device, data: str, repeats: int) -> dict[str, Any]:
    """The JSON document without its rows: what was asked for, where and when, and what the machine reaches."""
    machine = provenance.machine(device)
    told = datasheet(machine["name"], dtype)
    return {
        "op": op,
        "dtype": dtype,
        "data": data,
        "repeats": repeats,
        "provenance": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "source": provenance.source(),
            "versions": provenance.versions() | peers.versions(),
            "machine": machine,
            "clocks": {"before": clocks(device)},
        },
        "peaks": {
            "datasheet": told and told._asdict(),
            "measured": measure.measured_peak(device, getattr(torch, dtype))._asdict(),
        },
        "shapes": {},
        "rows": [],
    }


def _heading(result: dict[str, Any]) -> str:
    machine, versions = (result["provenance"][key] for key in ("machine", "versions"))
    source = result["provenance"]["source"]
    commit = (source["commit"] or "no commit")[:8] + (" with changes" if source["uncommitted_changes"] else "")
    state = ", ".join(f"{name} {value}" for name, value in result["provenance"]["clocks"]["before"].items())
    lines = [
        f"{machine['name']}, {machine['threads']} threads, {result['dtype']}, data: {result['data']}",
        f"clocks: {state or 'nothing tells'}",
        f"tests: {result['tests']}",
        f"commit {commit}, " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    for name, peak in result["peaks"].items():
        if peak:
            reached = f"{peak['flops'] / 1e12:.3g} TFLOP/s, {peak['bytes'] / 1e9:,.0f} GB/s"
            lines.append(f"peak, {name}: {reached}")
    if result["base"]:
        lines.append(f"base: commit {result['base'][:8]}")
    return "\n".join(lines)


def _choose(what: str, name: str, allowed: Any) -> str:
    if name not in allowed:
        raise ValueError(f"{what} {name!r}: allowed are {', '.join(allowed)}")
    return name


def _shape(op: Op, name: str) -> Any:
    if name in op.shapes:
        return op.shapes[name]
    if not re.fullmatch(r"[1-9]\d*" + op.format.count("x") * r"x[1-9]\d*", name):
        raise ValueError(f"shape {name!r}: allowed are {', '.join(op.shapes)}, or {op.format}")
    return op.make(*map(int, name.split("x")))


def _lengths(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"tokens={text!r}: expected numbers with commas, as in 1024,4096")
    return [int(n) for n in text.split(",")]


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: allowed are cpu, cuda, cuda:0, ...")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no CUDA device; allowed here is cpu")
    return torch.device(name)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def _try_draw(path: Path) -> str:
    from .draw import draw

    try:
        return str(draw(path))
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib)"
    except ValueError as error:
        return f"not drawn: {error}"


class _Progress:
    """What is going on: one line that changes on a terminal, a line for each task elsewhere."""

    def __init__(self, title: str) -> None:
        self.title, self.live = title, sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        if not self.live:
            print(f"{self.title} ...", file=sys.stderr, flush=True)
        return self

    def say(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{self.title}: {text}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
