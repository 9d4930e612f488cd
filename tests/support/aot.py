"""The compile report: what every shipped kernel takes on every architecture, found without a GPU.

    python tests/support/aot.py                    a Markdown table of everything
    python tests/support/aot.py --json sm_90       one JSON document: rows of dicts, and the sources they come from
    python tests/support/aot.py --only pool sm_90  the cases of compiled_pool.py alone
    python tests/support/aot.py --case NAME sm_90  one case alone

Cases run the host code of an op at real shapes in a dry run; the rows say which case compiled them first. A file
compiled_*.py holds those of a few ops: CASES, name: (architectures, function), and PRODUCTS, its kernels that multiply.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests/support"
OPS = [path.stem.removeprefix("compiled_") for path in sorted(SUPPORT.glob("compiled_*.py"))]
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
COLUMNS = ("target", "case", "kernel", "warps", "registers", "spilled", "shared", "hgmma", "mma", "async", "tma")
Row = dict[str, Any]


def report(op: str, target: str, names: list[str] | None = None) -> list[Row]:
    """A row for each kernel that the op's cases for this target compile, or those of these names alone."""
    from dryrun import gpu

    rows: list[Row] = []
    with gpu(target) as (_, kernels):
        for case, (where, run) in importlib.import_module(f"compiled_{op}").CASES.items():
            start = len(kernels)
            if target in where and (names is None or case in names):
                run()
            rows += [{"op": op, "target": target, "case": case, **kernel} for kernel in kernels[start:]]
    return rows


def digest(path: str) -> str | None:
    """Of the text of a source file, None where there is none."""
    file = ROOT / path
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def loaded() -> set[str]:
    """The files of kernels/ and tests/support/ that this process has loaded."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = {Path(file).resolve() for file in files if file}
    here = {path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)}
    return {path for path in here if path.startswith(("kernels/", "tests/support/"))}


def sources(public: set[str]) -> dict[str, str | None]:
    """Digests of what was loaded beside the public functions, which lead to launches but do not make them."""
    return {path: digest(path) for path in sorted(loaded() - public) if not path.endswith("__init__.py")}


def compiled(*arguments: str) -> dict[str, Any]:
    """The JSON document of a process of its own, as the interpreter's functions cannot be compiled.

    Raises:
        RuntimeError: a kernel does not compile, or needs more shared memory than there is.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append")
    parser.add_argument("--case", action="append")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    importlib.import_module("abyssal.kernels")
    public, rows = loaded() - {"tests/support/aot.py"}, []
    for op, target in itertools.product(options.only or OPS, options.targets):
        rows += report(op, target, options.case)
    if options.json:
        print(json.dumps({"sources": sources(public), "rows": rows}))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(str(row.get(c, "")) for c in COLUMNS) + " |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
