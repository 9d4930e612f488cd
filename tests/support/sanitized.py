"""What `tests/sanitize` keeps of its runs: which kernels were executed, from which sources, with what result.

A part is a test file, by its name: `attention`, `models`. Its digest is of what decides a launch: the op's `triton/`
and the one that all share; of all of them, where it belongs to no single op.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KERNELS, TESTS = ROOT / "kernels", ROOT / "tests/kernels"
MODELS = ROOT / "tests/sanitize/test_models.py"
RECORD = ROOT / "tests/sanitize/record.json"


def launched(folder: Path) -> dict[str, set[str]]:
    """The kernels launched from a folder's own files, every `name[grid](...)` or `module.name[grid](...)`: grids as
    they are written.
    """
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted((folder / "triton").glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    kernels = {
        n.name
        for n in nodes
        if isinstance(n, ast.FunctionDef) and any(ast.unparse(d).startswith("triton.jit") for d in n.decorator_list)
    }
    found: dict[str, set[str]] = {}
    for call in (n.func for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)):
        if (name := ast.unparse(call.value).rpartition(".")[2]) in kernels:
            found.setdefault(name, set()).add(ast.unparse(call.slice))
    return found


@cache
def launched_kernels() -> frozenset[str]:
    """All kernels of the project that are launched, as `op.kernel`; `kernels.sum_lists` is one beside the folders."""
    return frozenset(f"{folder.name}.{name}" for folder in (KERNELS, *op_folders()) for name in launched(folder))


@cache
def single_programs() -> frozenset[str]:
    """Those whose grid is one program wherever they are launched: `kernel[1,](...)`."""
    return frozenset(
        f"{folder.name}.{name}"
        for folder in op_folders()
        for name, grids in launched(folder).items()
        if grids == {"(1,)"}
    )


def op_folders() -> list[Path]:
    """Of the ops that have kernels."""
    return sorted(path.parents[1] for path in KERNELS.glob("*/triton/__init__.py"))


def part_of(path: Path) -> str:
    return path.stem.removeprefix("test_")


def file_of(part: str) -> Path:
    if part == "models":
        return MODELS
    own = TESTS / f"test_{part}.py"
    return own if own.exists() else TESTS / f"triton/test_{part}.py"


def digest(part: str) -> str:
    """Of the sources that the part's launches come from."""
    folders = [KERNELS / part] if (KERNELS / part).is_dir() else op_folders()
    sources = sorted(path for folder in (KERNELS, *folders) for path in (folder / "triton").glob("*.py"))
    sha = hashlib.sha256()
    for path in sources:
        sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"versions": {}, "parts": {}}


def save(record: dict[str, Any]) -> None:
    record["parts"] = {name: part for name, part in sorted(record["parts"].items()) if name in parts()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def parts() -> list[str]:
    """Every op with kernels, those beside the ops, and whole models."""
    return [*(folder.name for folder in op_folders()), "scatter", "models"]


def stale() -> list[str]:
    """Parts that were not executed yet, or from other sources than there are now."""
    known = load()["parts"]
    return [part for part in parts() if digest(part) != known.get(part, {}).get("digest")]


def describe() -> str:
    """The record in a line."""
    entries = load()["parts"].values()
    passed, launches, faults, seconds = (
        sum(entry[name] for entry in entries) for name in ("passed", "launches", "faults", "seconds")
    )
    numbers = f"{passed} tests, {launches} launches, {faults} faults, {seconds} s"
    return f"on record: {numbers}; not of the present kernels: {', '.join(stale()) or 'none'}"
