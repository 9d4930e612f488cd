"""The support matrix: the suite in throw-away environments, one for each Python, torch and triton that we name.

    pip install uv
    python tests/matrix                         every row in turn; the table in CONTRIBUTING.md is written anew
    python tests/matrix 3.12-torch2.14.1        one row; --list prints their names
    python tests/matrix --pytest '-k attention' with arguments for pytest; nothing is recorded

A row is a fresh environment that uv fills from the public index under its own defaults, and a fresh clone of the last
commit, so that nothing local helps. Rows take turns with the kernels of OpenBLAS, because bits that lean on one of them
are bits that only hold here. The whole suite runs with the newest torch and without triton; the other rows run `PART`:
the house, every kernel, the model, checkpoints and the command line. What `constraints.txt` pins runs whole at every
push. Python 3.11 to 3.13 are found, or fetched, by uv. An environment takes 6 to 7 GB while its row runs; downloads are
kept in uv's cache. A whole row takes a quarter of an hour on two cores, a part five minutes.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "CONTRIBUTING.md", Path(__file__).with_name("results.json")
MARKS = "<!-- matrix -->\n", "<!-- end of matrix -->"
PART = [
    *("tests/test_house.py", "tests/kernels", "tests/model/test_transformer.py", "tests/model/test_config.py"),
    *("tests/train/run/test_checkpoint.py", "tests/train/test_cli.py"),
]


@dataclass(frozen=True)
class Row:
    """A Python with a torch and the triton that this torch asks for (None: uninstalled), the BLAS kernel to use, and
    whether `PART` is enough.
    """

    python: str
    torch: str
    triton: str | None
    blas: str = ""
    part: bool = False

    @property
    def name(self) -> str:
        return f"{self.python}-torch{self.torch}" + ("" if self.triton else "-without-triton")


ROWS = [
    Row("3.11", "2.13.0", "3.7.1", "Haswell", part=True),
    Row("3.12", "2.13.0", "3.7.1", part=True),
    Row("3.13", "2.13.0", "3.7.1", "Zen", part=True),
    Row("3.11", "2.14.1", "3.8.0", "Sandybridge", part=True),
    Row("3.12", "2.14.1", "3.8.0", "Zen", part=True),
    Row("3.13", "2.14.1", "3.8.0", "Haswell", part=True),
    Row("3.11", "2.15.0", "3.9.0", "Zen", part=True),
    Row("3.12", "2.15.0", "3.9.0", "Nehalem", part=True),
    Row("3.13", "2.15.0", "3.9.0", "SkylakeX"),
    Row("3.12", "2.11.0", "3.6.0", part=True),
    Row("3.12", "2.13.0", None),
]


def runs_here(blas: str) -> bool:
    """Whether this processor can run a kernel of OpenBLAS: all are x86's, SkylakeX' an illegal instruction on many."""
    return platform.machine() == "x86_64" and (blas != "SkylakeX" or "avx512f" in processor_file())


def processor_file() -> str:
    """What Linux tells of the processor."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def environment(blas: str, folder: str) -> dict[str, str]:
    """That of the caller without what it tells pip, uv, Python, pytest, git, torch, triton and the BLAS; caches of its
    own, but for downloads.
    """
    theirs = ("PIP_", "UV_", "PYTHON", "PYTEST_", "GIT_", "TORCH", "TRITON_", "ABYSSAL_", "VIRTUAL_ENV")
    theirs += ("OPENBLAS_", "OMP_", "MKL_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
    own = {"UV_NO_CONFIG": "1", "TRITON_CACHE_DIR": f"{folder}/triton", "ABYSSAL_CACHE": f"{folder}/abyssal"}
    return {**kept, **own, **({"OPENBLAS_CORETYPE": blas} if blas else {})}


def run(row: Row, arguments: list[str]) -> dict[str, Any]:
    """Installs and tests one row; its line of the table."""
    blas = row.blas if runs_here(row.blas) else ""
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        clone, python, settings = f"{folder}/clone", f"{folder}/env/bin/python", environment(blas, folder)
        start = time.time()
        for command in (
            ["git", "clone", "--quiet", str(ROOT), clone],
            ["uv", "venv", "--quiet", "--python", row.python, f"{folder}/env"],
            ["uv", "pip", "install", "--quiet", "--python", python, "-e", f"{clone}[test]", f"torch=={row.torch}"]
            + ([f"triton=={row.triton}"] if row.triton else []),
            *([] if row.triton else [["uv", "pip", "uninstall", "--quiet", "--python", python, "triton"]]),
        ):
            subprocess.run(command, env=settings, check=True)
        installed = time.time()
        command = [python, "-m", "pytest", "-q", "-n", "2", "-rf", *(arguments or PART * row.part)]
        done = subprocess.run(command, env=settings, cwd=clone, stdout=subprocess.PIPE, text=True)
        print(done.stdout[-3000:], flush=True)
        commit = subprocess.check_output(["git", "-C", clone, "rev-parse", "--short", "HEAD"], env=settings, text=True)
    counts = {k: int(n) for n, k in re.findall(r"(\d+) (passed|failed|skipped|error)", last_line(done.stdout))}
    return {
        "python": row.python,
        "torch": row.torch,
        "triton": row.triton or "none",
        "suite": "part" if row.part else "whole",
        "BLAS kernel": blas or "its own choice",
        **{k: counts.get(k, 0) for k in ("passed", "skipped")},
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "exit": done.returncode,
        "install s": round(installed - start),
        "suite s": round(time.time() - installed),
        "date": str(date.today()),
        "commit": commit.strip(),
        "processor": processor(),
    }


def last_line(text: str) -> str:
    """pytest's counts, nothing where it died before it could count."""
    return text.splitlines()[-1] if text.strip() else ""


def processor() -> str:
    models = re.findall(r"^model name\s*:\s*(.+)$", processor_file(), re.MULTILINE)
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def record(name: str, line: dict[str, Any]) -> None:
    """Files a row's result, and writes the table of all of them into the page."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results[name] = line
    results = {row.name: results[row.name] for row in ROWS if row.name in results}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    shown = (
        "python",
        "torch",
        "triton",
        "BLAS kernel",
        "suite",
        "passed",
        "failed",
        "skipped",
        "exit",
        "suite s",
        "date",
        "commit",
    )
    lines = ["| " + " | ".join(shown) + " |", "|" + " --- |" * len(shown)]
    lines += ["| " + " | ".join(str(line[key]) for key in shown) + " |" for line in results.values()]
    before, _, rest = PAGE.read_text("utf-8").partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + "\n".join(["", *lines, "", MARKS[1]]) + rest.partition(MARKS[1])[2], "utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python tests/matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--pytest", type=shlex.split, default=[], metavar="ARGUMENTS", help="passed on, as in --pytest=-x; no record"
    )
    options = parser.parse_args(arguments)
    named = {row.name: row for row in ROWS}
    if options.list:
        print("\n".join(named))
        return 0
    unknown = set(options.rows) - named.keys()
    if unknown or not shutil.which("uv"):
        parser.error(f"no row {sorted(unknown)}; see --list" if unknown else "uv is missing: pip install uv")
    worst = 0
    for i, name in enumerate(options.rows or named):
        print(f"[{i + 1}/{len(options.rows or named)}] {name}", flush=True)
        try:
            line = run(named[name], options.pytest)
        except subprocess.CalledProcessError as error:
            print(f"{name}: not run: {error}", file=sys.stderr)
            worst = max(worst, 1)
            continue
        print(json.dumps(line), flush=True)
        worst = max(worst, abs(line["exit"]))
        if not options.pytest:
            record(name, line)
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
