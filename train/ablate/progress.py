"""What a suite shows while it runs: a tqdm bar over all steps on a terminal, a line per run everywhere else."""

import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..run import metrics
from .suite import Job


class Progress:
    """Counts the steps in the metrics of the runs under way; `done` says what a run reached."""

    def __init__(self, name: str, planned: Sequence[Job], runs: Path, shown: bool = True) -> None:
        self.name, self.runs, self.shown = name, runs, shown
        self.jobs = {job.key: job for job in planned}
        self.finished = 0
        self.began = time.perf_counter()
        self.bar: Any = None
        if shown and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            total = sum(job.recipe.train.steps for job in self.jobs.values())
            self.bar = tqdm(total=total, unit="step", desc=name, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def starts(self, job: Job) -> None:
        self._say(f"{self.name}: {job.arm}, seed {job.seed}: {self._steps(job)} of {job.recipe.train.steps} steps")

    def done(self, job: Job, result: dict[str, Any]) -> None:
        self.finished += 1
        minutes = (time.perf_counter() - self.began) / 60
        which = f"run {self.finished} of {len(self.jobs)}, {minutes:.1f} min"
        loss = result["measures"]["train.lm"]
        self._say(
            f"{self.name}: {job.arm}, seed {job.seed}: done, loss {loss:.4f}, {result['seconds']:.0f} s ({which})"
        )
        self.look()

    def look(self) -> None:
        """Brings the bar up to date."""
        if self.bar is not None:
            self.bar.n = sum(map(self._steps, self.jobs.values()))
            self.bar.refresh()

    def _steps(self, job: Job) -> int:
        path = self.runs / job.key / metrics.FILE
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif self.shown:
            print(text, flush=True)
