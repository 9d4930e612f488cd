"""Seconds of a step of some jobs, taken in turn: what arms of equal time get their steps from.

    steps of an arm = steps of the baseline · seconds of its step / seconds of the arm's step

A step's time is the median over a short run's steps but the first two, from forward pass to forward pass; of several
rounds, in which the jobs take turns, the fastest counts: whatever else the machine does only adds to it. On one thread,
as the runs themselves, and in seconds of the processor, which others on the machine take no share of; on a GPU, whose
time no processor counts, in seconds.
"""

import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from ...model import Transformer
from ..distributed.world import choose_device
from ..recipe import Recipe, apply
from ..start import train
from .suite import Job
from .variants import variant_of

ROUNDS, STEPS, UNTIMED = 3, 7, 2


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
    now = time.process_time if choose_device(recipe.train.device).type == "cpu" else time.perf_counter
    begins: list[float] = []

    def prepare(model: Transformer) -> None:
        variant_of(job.variant)(model)
        model.register_forward_pre_hook(lambda *_: begins.append(now()))

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run", shown=False, prepare=prepare)
    return median(after - before for before, after in pairwise(begins[UNTIMED:STEPS]))
