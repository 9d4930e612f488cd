"""Seconds of a step of some jobs, taken in turn: what arms of equal time get their steps from.

    steps of an arm = steps of the baseline · seconds of its step / seconds of the arm's step

A step's time is the median over a short run's steps but the first two; of several rounds, in which the jobs take turns,
the fastest counts: whatever else the machine does only adds to it. On one thread, as the runs themselves.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from ..recipe import Recipe, apply
from ..run import metrics
from ..start import train
from .suite import Job
from .variants import variant_of

ROUNDS, STEPS, UNTIMED = 2, 7, 2


def seconds_per_step(jobs: Sequence[Job]) -> list[float]:
    """Of each job.

    Raises:
        ValueError: a recipe with stages, whose steps are not alike.
    """
    staged = [job.arm for job in jobs if job.recipe.stages]
    if staged:
        raise ValueError(f"arm {staged[0]!r}: equal time is not there for recipes with [[stages]]: their steps differ")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[_time(job) for job in jobs] for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    return [min(times) for times in zip(*rounds)]


def equal_steps(steps: int, baseline: float, seconds: float) -> int:
    """How many steps of `seconds` fit into so many of the baseline's."""
    return max(1, round(steps * baseline / seconds))


def _time(job: Job) -> float:
    changes = [f"train.steps={STEPS}", "train.eval_every=0", "train.minutes=0", "data.held_out_rows=1"]
    recipe = Recipe.from_dict(apply(job.recipe.to_dict(), changes))
    with tempfile.TemporaryDirectory() as folder:
        prepare = None if job.variant == "as configured" else variant_of(job.variant)
        train(recipe, Path(folder) / "run", shown=False, prepare=prepare)
        records = metrics.read(Path(folder) / "run")
    ends = [0.0, *(record["seconds"] for record in records)]
    return median(after - before for before, after in zip(ends[UNTIMED:], ends[UNTIMED + 1 :]))
