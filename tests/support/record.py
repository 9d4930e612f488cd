"""What compiling ahead of time has shown, for each op and version of triton: kernels/benchmarks/compiled.json; and what
it lets us predict of an H100, by one version: kernels/benchmarks/speed.json.

An entry holds as long as every source that its compilation loaded has the same text; its rows then stand for compiling.

    op -> version of triton -> {"date", "torch", "sources": {path: digest},
                                "rows": {case: {target: [[kernel, *NUMBERS], ...]}}}

    op -> {"date", "torch", "triton", "sources", "rows": of speed_cases.py, "kernels": digests of speed.py}
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import aot
import torch
import triton

PATH = aot.ROOT / "kernels/benchmarks/compiled.json"
SPEED = aot.ROOT / "kernels/benchmarks/speed.json"
PASSES = "passes"  # of whole models, filed like an op
NUMBERS = ("warps", "registers", "spilled", "shared", "hgmma", "mma", "async", "tma", "float atomics")
Record = dict[str, dict[str, dict[str, Any]]]


def load() -> Record:
    return json.loads(PATH.read_text("utf-8"))


def rows(op: str, entry: dict[str, Any] | None) -> list[aot.Row]:
    """Those that aot.py gave, none without an entry; numbers that a target does not have are left out."""
    if entry is None:
        return []
    return [
        {"op": op, "target": target, "case": case, "kernel": kernel}
        | {name: n for name, n in zip(NUMBERS, numbers) if n is not None}
        for case, targets in entry["rows"].items()
        for target, kernels in targets.items()
        for kernel, *numbers in kernels
    ]


def holds(entry: dict[str, Any], digest: Callable[[str], str | None] = aot.digest) -> bool:
    """Whether the sources are what they were."""
    return all(digest(path) == was for path, was in entry["sources"].items())


def fresh(op: str) -> list[aot.Row]:
    """The rows of the triton that is installed, none if there is no entry or a source has changed."""
    entry = load().get(op, {}).get(triton.__version__)
    return rows(op, entry) if entry and holds(entry) else []


def add(op: str) -> None:
    """Compiles an op for every target with the triton that is installed, and files what it finds."""
    found, by_case = aot.compiled("--only", op), {}
    for row in found["rows"]:
        kernels = by_case.setdefault(row["case"], {}).setdefault(row["target"], [])
        kernels.append([row["kernel"], *(row.get(name) for name in NUMBERS)])
    entry = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "sources": found["sources"],
        "rows": by_case,
    }
    record = load() if PATH.is_file() else {}
    versions = record.get(op, {}) | {triton.__version__: entry}
    record[op] = dict(sorted(versions.items()))
    ordered = {name: record[name] for name in aot.OPS if name in record}
    PATH.write_text(json.dumps(ordered).replace(': [["', ':\n[["') + "\n", "utf-8")


def speeds() -> dict[str, dict[str, Any]]:
    return json.loads(SPEED.read_text("utf-8")) if SPEED.is_file() else {}


def fresh_speed(op: str) -> dict[str, Any] | None:
    """What is predicted, if by the triton that is installed and from these sources."""
    entry = speeds().get(op)
    return entry if entry and entry["triton"] == triton.__version__ and holds(entry) else None


def predicted(*arguments: str) -> Any:
    """The JSON that speed_cases.py prints, in a process of its own: the interpreter's functions cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(aot.ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(aot.SUPPORT / "speed_cases.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def add_speed(op: str) -> None:
    """Predicts an op, or the passes, with the triton that is installed, and files it."""
    versions = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "triton": triton.__version__}
    filed = speeds() | {op: versions | predicted("--json", op)}
    text = json.dumps({name: filed[name] for name in (*aot.OPS, PASSES) if name in filed})
    SPEED.write_text(text.replace('{"case"', '\n{"case"') + "\n", "utf-8")
