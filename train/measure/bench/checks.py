"""The op's tests, before it is timed: a red op has no time worth knowing."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class RedTests(ValueError):
    """Tests of an op failed."""


def check(name: str, device: str) -> str:
    """Runs them; says what was run, or why nothing could be.

    Raises:
        RedTests: one of them failed.
    """
    folder = ROOT / "tests" / "kernels"
    if not folder.is_dir():
        return "not run: this installation has no tests"
    if not importlib.util.find_spec("pytest"):
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    command += [str(folder / f"test_{name}.py"), *(() if device == "cuda" else ("-k", "not triton"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
        raise RedTests(f"{name} is not timed, its tests are red: {(failed or [last])[0]} (--no-tests leaves them out)")
    return last.strip("= ")
