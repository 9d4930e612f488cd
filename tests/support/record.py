"""What compiling ahead of time has shown, for each op and version of triton: kernels/benchmarks/compiled.json.

An entry holds as long as every source that its compilation loaded has the same text; its rows then stand for compiling.

    op -> version of triton -> {"date", "torch", "sources": {path: digest},
                                "rows": {case: {target: [[kernel, *NUMBERS], ...]}}}
"""

import json
import time
from collections.abc import Callable
from typing import Any

import aot
import torch
import triton

PATH = aot.ROOT / "kernels/benchmarks/compiled.json"
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
