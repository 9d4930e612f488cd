"""Runs a suite: every arm with every seed, side by side, each run in a folder of its own that is never run twice.

    OUT/runs/KEY/result.json     what a finished run measured; beside it what training writes (metrics, checkpoints)
    OUT/SUITE.json               all results of a suite and the verdicts, from which picture and page are made; written
                                 whenever all arms have done another seed
    OUT/SUITE.png
    OUT/clock.json               seconds of a step, with the recipe, for arms of equal time: measured once

KEY is a digest of the run's recipe and variant. A run that has a result, in its folder or in the JSON of any suite in
OUT, is skipped; an unfinished one goes on from its last checkpoint; and suites that need the same run share it.
"""

import json
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ...model import Transformer
from ...model.disk import write_json, write_text
from ...model.folders import read_json
from .. import own
from ..recipe import Recipe, own_code
from ..run import checkpoint, metrics, provenance
from ..run.load import prepared
from ..run.tables import places
from ..settings import OptimConfig
from ..start import never_saved, train
from .clock import equal_steps, seconds_per_step
from .measures import answers, curves, measure
from .probes import probe_of
from .progress import Progress
from .suite import Job, Suite, jobs, key_of
from .summary import known_runs, summarise
from .variants import variant_of

RUNS, RESULT, CLOCK = "runs", "result.json", "clock.json"


def run_suite(
    suite: Suite,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    size: str = "quick",
    overrides: Sequence[str] = (),
    workers: int = 2,
    shown: bool = True,
) -> dict[str, Any]:
    """Runs what is not yet run, writes OUT/SUITE.json, and returns what is in it.

    Args:
        seeds: None = those that the suite is registered with, 0 to `suite.seeds` - 1.

    Raises:
        ValueError: a seed, size or override that is not allowed, or fewer than one worker.
        ChildProcessError: a worker process died; what is finished stays, and the same command goes on.
        TrainingDiverged: a run met a number that is not finite.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: allowed are positive numbers")
    seeds = range(suite.seeds) if seeds is None else seeds
    steps = _equal_steps(suite, out, seeds, size, overrides)
    planned = jobs(suite, seeds, size, overrides, steps)
    runs = out / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    if provenance.source()["uncommitted_changes"]:
        warnings.warn("the code has uncommitted changes: the page of results takes no such runs", stacklevel=2)
    known = {key: run for key, run in known_runs(out).items() if not (runs / key / RESULT).is_file()}
    results = {job.key: known[job.key] for job in planned if _has_probes(known.get(job.key), job)}
    summary: dict[str, Any] = {}
    path = out / f"{suite.name}.json"
    written = read_json(path)["scale"]["seeds"] if path.is_file() else 0  # which may be kept nowhere else
    with Progress(suite.name, planned, runs, shown) as progress:
        waiting = [job for job in planned if job.key not in results]
        for job, result in execute(waiting, runs, workers, progress):
            results[job.key] = result
            progress.done(job, result)
            done = [seed for seed in seeds if all(j.key in results for j in planned if j.seed == seed)]
            if len(done) > summary.get("scale", {}).get("seeds", 0) and len(done) >= written:
                summary = _write(suite, size, overrides, [j for j in planned if j.seed in done], results, out)
    if not summary:
        summary = _write(suite, size, overrides, planned, results, out)
    return summary


def _write(
    suite: Suite, size: str, overrides: Sequence[str], done: Sequence[Job], results: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """The summary of the runs that are done, as it was written."""
    found = [results[job.key] for job in done]
    _check_contents(done, found, out / RUNS)
    path = out / f"{suite.name}.json"
    write_text(path, json.dumps(summarise(suite, size, list(overrides), done, found), separators=(",", ":")) + "\n")
    return read_json(path)


def _equal_steps(suite: Suite, out: Path, seeds: Sequence[int], size: str, overrides: Sequence[str]) -> dict[str, int]:
    """Steps of the arms of equal time, by the seconds in clock.json; what is not there is measured."""
    timed = {suite.arms[0].name, *(arm.name for arm in suite.arms if arm.equal_time)}
    first = [job for job in jobs(suite, seeds[:1], size, overrides) if job.arm in timed]
    if len(first) < 2:
        return {}
    path = out / CLOCK
    told = read_json(path)["steps"] if path.is_file() else []
    seconds = {_clocked(Recipe.from_dict(one["recipe"]), one["variant"]): one["seconds"] for one in told}
    first = [replace(job, recipe=job.recipe.with_seed(0)) for job in first]
    keys = [_clocked(job.recipe, job.variant) for job in first]
    missing = {key: job for key, job in zip(keys, first) if key not in seconds}
    if missing:
        out.mkdir(parents=True, exist_ok=True)
        again = {keys[0]: first[0], **missing}
        found = seconds_per_step([*again.values()])
        scale = seconds.get(keys[0], found[0]) / found[0]  # to the measurement that earlier arms are held to
        for (key, job), one in zip(again.items(), found):
            if key in missing:
                seconds[key] = scale * one
                told.append({"variant": job.variant, "seconds": scale * one, "recipe": job.recipe.to_dict()})
        write_json(path, {"steps": told})
    steps = first[0].recipe.train.steps
    return {job.arm: equal_steps(steps, seconds[keys[0]], seconds[key]) for key, job in zip(keys[1:], first[1:])}


def _clocked(recipe: Recipe, variant: str) -> str:
    """What is timed once: runs that differ in seed and learning rate alone have the same steps."""
    return key_of(replace(recipe.with_seed(0), optim=replace(recipe.optim, lr=OptimConfig.lr)), variant)


def _has_probes(result: dict[str, Any] | None, job: Job) -> bool:
    return result is not None and not {*_told(job).values()} - {*result["probes"]}


def _read(path: Path) -> dict[str, Any]:
    """A run's result. Raises ValueError where the file holds none."""
    result = read_json(path)
    if not isinstance(result.get("measures"), dict) or not isinstance(result.get("provenance"), dict):
        raise ValueError(f"{str(path)!r} holds no result of a run: remove it to run that again")
    return result


def _check_contents(planned: Sequence[Job], results: Sequence[dict[str, Any]], runs: Path) -> None:
    """Raises ValueError where runs of the same data read other contents: no verdict compares them."""
    first: dict[str, tuple[str, str]] = {}
    for job, result in zip(planned, results):
        digest = result["provenance"]["data"]["digest"]
        asked = f"{job.recipe.data} {job.recipe.chat} {job.recipe.planted} {job.recipe.reason}"
        key, known = first.setdefault(asked, (job.key, digest))
        if known != digest:
            there = f"{str(runs / key)!r} and {str(runs / job.key)!r}"
            raise ValueError(f"{there} have read other contents of {job.recipe.data.source!r}: remove the older one")


def execute(planned: Sequence[Job], runs: Path, workers: int, progress: Progress) -> Iterator[tuple[Job, Any]]:
    """Jobs and results as they are done; each run once, however many jobs want it. One worker runs in this process."""
    waiting = list({job.key: job for job in planned}.values())
    if workers == 1:
        for job in waiting:
            progress.starts(job)
            yield job, run_job(job, runs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    running: dict[Future[Any], Job] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:  # no more than run at once, so that nothing starts after Ctrl-C
                job = waiting.pop(0)
                progress.starts(job)
                running[pool.submit(run_job, job, runs)] = job
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                yield job, _result(job, future)
            progress.look()
        pool.shutdown()
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _end_with_parent() -> None:
    """This process ends when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(job: Job, future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            f"the process of {job.arm} with seed {job.seed} died (killed, or out of memory); the same command goes on"
        ) from None


def run_job(job: Job, runs: Path) -> dict[str, Any]:
    """The result of a run: read if it is there, else trained to its end. On one thread, so that runs go side by side.

    Two processes that want the same run take turns, and the second reads what the first wrote.
    """
    own.allow(job.variant, *job.probes, *own_code(job.recipe.to_dict()))  # the suite is of whoever runs it
    folder = runs / job.key
    runs.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FileLock(runs / f".{job.key}.lock"):
            path = folder / RESULT
            result = _read(path) if path.is_file() else _train(job, folder)
            _probe(job, folder, result)
            write_json(path, result)
            return result
    finally:
        torch.set_num_threads(threads)


def _train(job: Job, folder: Path) -> dict[str, Any]:
    begun = bool(checkpoint.checkpoints(folder))
    if folder.exists() and not begun:
        never_saved(folder)  # or else its checkpoints are out of reach
        shutil.rmtree(folder)
    prepare = None if job.variant == "as configured" else variant_of(job.variant)
    summary = train(job.recipe, folder, folder if begun else None, shown=False, prepare=prepare)
    records, start = metrics.read(folder), provenance.starts(folder)[-1]
    model = _built(job)
    return {
        "key": job.key,
        "seed": job.seed,
        "variant": job.variant,
        "recipe": job.recipe.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": summary.progress.step,
        "tokens": summary.progress.tokens,
        "seconds": round(summary.progress.seconds, 1),
        "measures": measure(records, summary.scores),
        "answers": answers(summary.scores),
        "curves": curves(records, summary.scores),
        "probes": [],
        "provenance": {name: start[name] for name in ("time", "source", "versions", "machine", "data")},
    }


def _told(job: Job) -> dict[str, str]:
    """The job's probes, and how a result names them: one's own with the digest of their code."""
    return {name: f"{name} {own.digest(name)}" if own.is_own(name) else name for name in job.probes}


def _probe(job: Job, folder: Path, result: dict[str, Any]) -> None:
    """Adds what the job's probes measure on the trained model; those that were asked before are not asked again."""
    missing = {name: text for name, text in _told(job).items() if text not in result["probes"]}
    if missing:
        model = _built(job)
        checkpoint.load_model(checkpoint.find(folder), model)
        for name, text in missing.items():
            result["measures"] |= probe_of(name)(model.eval(), job.recipe)
            result["probes"].append(text)


def _built(job: Job) -> Transformer:
    """The job's model with new weights."""
    with places(job.recipe, None):
        model = Transformer(job.recipe.model)
    for change in (prepared(job.recipe), variant_of(job.variant)):
        if change:
            change(model)
    return model
