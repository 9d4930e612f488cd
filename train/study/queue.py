"""Runs studies: the first job whose needs are met, on each free core; what is finished is never run twice.

    OUT/runs/KEY/record-N.json  what a finished run can do, of N questions a task; beside it what training writes
    OUT/reasoning.json          the records of all finished runs and the studies, from which the page is made
    OUT/RESULTS.md

A run without a record goes on from its last checkpoint, and the page is written anew after every run: the same command
ends what was stopped at any moment. A run is one thread.
"""

import multiprocessing
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...model.disk import write_json, write_text
from ...model.folders import read_json
from ..ablate.run import _end_with_parent
from ..recipe import Recipe
from ..run import checkpoint
from ..start import never_saved, train
from .plan import ARMS, STUDIES, Job, jobs
from .record import record
from .report import markdown

RUNS, FILE, PAGE = "runs", "reasoning.json", "RESULTS.md"


def run_studies(
    names: Sequence[str],
    out: Path,
    *,
    seeds: Sequence[int],
    problems: int,
    workers: int = 2,
    overrides: Sequence[str] = (),
    shown: bool = True,
) -> Path:
    """Runs what is not yet run, and returns the JSON.

    Raises:
        ValueError: an unknown study, or what `Recipe` refuses of the overrides.
        BrokenProcessPool: a worker died; what is finished stays, and the same command goes on.
        TrainingDiverged: a run met a number that is not finite.
    """
    planned, began = jobs(names, seeds, overrides), time.perf_counter()
    waiting = [each for each in planned if not record_of(each, out / RUNS, problems).is_file()]
    collect(names, planned, out, problems)
    for number, done in enumerate(execute(waiting, out / RUNS, problems, workers), 1):
        collect(names, planned, out, problems)
        if shown:
            minutes = (time.perf_counter() - began) / 60
            print(f"{done.arm.name}, seed {done.seed}: run {number} of {len(waiting)}, {minutes:.1f} min", flush=True)
    return out / FILE


def collect(names: Sequence[str], planned: Sequence[Job], out: Path, problems: int) -> None:
    """JSON and page of what is finished."""
    paths = {each: record_of(each, out / RUNS, problems) for each in planned}
    runs = [
        {"arm": each.arm.name, **read_json(path), "seed": each.seed} for each, path in paths.items() if path.is_file()
    ]
    used = {arm: asdict(ARMS[arm]) for name in names for arm in STUDIES[name].arms}
    studies = [asdict(STUDIES[name]) for name in names]
    found = {"problems": problems, "studies": studies, "arms": used, "runs": runs}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, found)
    write_page(out)


def write_page(out: Path) -> Path:
    """OUT/RESULTS.md from OUT/reasoning.json. Raises FileNotFoundError where that is not there."""
    write_text(out / PAGE, markdown(read_json(out / FILE)))
    return out / PAGE


def execute(waiting: Sequence[Job], runs: Path, problems: int, workers: int) -> Iterator[Job]:
    """Jobs as they are done. One worker runs in this process."""
    if workers == 1:
        for each in waiting:
            run_job(each, runs, problems)
            yield each
        return
    left, unfinished = list(waiting), {each.key for each in waiting}
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    running: dict[Future[None], Job] = {}
    try:
        while left or running:
            ready = [each for each in left if not {need.key for need in each.needs} & unfinished]
            for each in ready[: workers - len(running)]:
                left.remove(each)
                running[pool.submit(run_job, each, runs, problems)] = each
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                each = running.pop(future)
                future.result()
                unfinished.remove(each.key)
                yield each
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_job(job: Job, runs: Path, problems: int) -> None:
    """Trains a run to its end and writes its record."""
    torch.set_num_threads(1)
    folder = runs / job.key
    begun = bool(checkpoint.checkpoints(folder))
    if folder.exists() and not begun:
        never_saved(folder)  # or else its checkpoints are out of reach
        shutil.rmtree(folder)
    train(recipe_of(job, runs), folder, folder if begun else None, shown=False)
    write_json(record_of(job, runs, problems), record(folder, problems, job.arm.tasks))


def record_of(job: Job, runs: Path, problems: int) -> Path:
    return runs / job.key / f"record-{problems}.json"


def recipe_of(job: Job, runs: Path) -> Recipe:
    """With the runs that it starts from and is taught by."""
    recipe = job.recipe
    if job.after:
        recipe = replace(recipe, train=replace(recipe.train, init=str(runs / job.after.key)))
    if job.teacher and recipe.distil:
        recipe = replace(recipe, distil=replace(recipe.distil, teacher=str(runs / job.teacher.key)))
    return recipe
