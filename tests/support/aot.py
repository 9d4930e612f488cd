"""The compile report: what every shipped kernel takes on every architecture, found without a GPU.

    python tests/support/aot.py                    a Markdown table of everything
    python tests/support/aot.py --json sm_90       one JSON document: rows of dicts
    python tests/support/aot.py --only moe sm_90   the cases of compiled_moe.py alone

Cases run the host code of an op at real shapes in a dry run; the rows say which case compiled them first. A file
compiled_*.py holds those of a few ops: CASES, name: (architectures, function), and PRODUCTS, its kernels that multiply.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
COLUMNS = ("target", "case", "kernel", "warps", "registers", "spilled", "shared", "hgmma", "mma", "tma")


def cases(only: str = "*") -> dict[str, tuple[list[str], Callable[[], None]]]:
    """Name: the architectures, and what to run; those of every file compiled_ONLY.py beside this one."""
    found: dict[str, tuple[list[str], Callable[[], None]]] = {}
    for path in sorted(Path(__file__).parent.glob(f"compiled_{only}.py")):
        found |= importlib.import_module(path.stem).CASES
    return found


def report(targets: list[str], only: str = "*") -> list[dict[str, Any]]:
    """A row for each kernel that the cases compile, with its case and target."""
    from dryrun import gpu

    rows = []
    for target in targets:
        with gpu(target) as (_, kernels):
            for case, (where, run) in cases(only).items():
                start = len(kernels)
                if target in where:
                    run()
                rows += [{"target": target, "case": case, **k} for k in kernels[start:]]
    return rows


def main(arguments: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="*")
    options = parser.parse_args(arguments)
    rows = report(options.targets, options.only)
    if options.json:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(str(row.get(c, "")) for c in COLUMNS) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
