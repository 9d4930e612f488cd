"""The op's tests, before it is timed: a red op has no time worth knowing."""

import importlib.util
import os
import tempfile
from pathlib import Path

from . import workers

ROOT = Path(__file__).resolve().parents[3]
LIMIT, SECONDS = 120.0, 300.0  # of a test, and of all tests of an op


class RedTests(ValueError):
    """Tests of an op failed."""


def check(name: str, device: str) -> str:
    """Runs them side by side; says what was run and what was cut, or why nothing could be.

    Raises:
        RedTests: one of them failed.
    """
    folder = ROOT / "tests" / "kernels"
    if not folder.is_dir():
        return "not run: this installation has no tests"
    if not importlib.util.find_spec("pytest"):
        return "not run: pytest is not installed"
    arguments = ["-m", "not slow", *(() if device == "cuda" else ("-k", "not triton"))]
    with tempfile.TemporaryDirectory() as out:
        report = workers.run(
            [folder / f"test_{name}.py"],
            Path(out),
            root=ROOT,
            arguments=arguments,
            workers=min(os.cpu_count() or 1, 8),
            limit=LIMIT,
            seconds=SECONDS,
            first_failure=True,
            environment={"OMP_NUM_THREADS": "1"},
        )
    red = report.of("failed", "died")
    if red or report.error:
        told = f"{red[0]['id']}: {red[0]['text'].splitlines()[-1]}" if red else report.error
        raise RedTests(f"{name} is not timed, its tests are red: {told} (--no-tests leaves them out)")
    cut = ", ".join(result["id"].rpartition("::")[2] for result in report.of("cut"))
    return f"{report}{f'; cut: {cut}' if cut else ''}"
