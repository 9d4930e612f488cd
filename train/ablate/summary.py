"""A suite's runs put together: mean and spread of every measure of every arm, and a verdict on every claim.

The summary is JSON and holds all that picture and page need: texts, numbers of single runs, curves, where it ran.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...model.config import naming
from ...model.folders import read_json
from .. import own
from ..evaluate.verdict import Spread, by_row, judge
from ..recipe import Recipe, own_code
from ..start import open_source
from . import measures
from .suite import Arm, Job, Suite, key_of

NAMES = ("suite", "title", "question", "caveat", "measures", "panels", "arms", "claims", "scale", "provenance")
NO_VERDICT = {"word": "undecided", "difference": None, "interval": None, "p": None}
REACH = "reach"  # the share of its steps after which an arm has the baseline's final score


def summarise(
    suite: Suite, size: str, overrides: Sequence[str], planned: Sequence[Job], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON of a suite. `results[i]` is what `planned[i]` measured."""
    runs = {arm.name: [_run(r) for job, r in zip(planned, results) if job.arm == arm.name] for arm in suite.arms}
    if suite.reach:
        _add_reach(runs, suite)
    recipes = {job.arm: job.recipe for job in reversed(planned)}
    arms = {arm.name: _arm(arm, recipes[arm.name], runs[arm.name]) for arm in suite.arms}
    first, recipe = results[0], planned[0].recipe
    answering = [name for name, some in runs.items() if any(run["answers"] for run in some)]
    rows = {name: measures.rows(open_source(recipes[name])) for name in answering}
    return {
        "suite": suite.name,
        "title": suite.title,
        "question": suite.question,
        "caveat": suite.caveat,
        "size": size,
        "overrides": list(overrides),
        "measures": [asdict(measure) for measure in suite.measures],
        "panels": [asdict(panel) for panel in suite.panels],
        "arms": arms,
        "claims": [_claim(suite, claim, arms, rows) for claim in suite.claims],
        "scale": {
            "seeds": len({job.seed for job in planned}),
            "registered": suite.seeds,
            "runs": len(planned),
            "steps": first["steps"],
            "tokens": first["tokens"],
            "recipe": suite.recipe,
            "sequence_length": recipe.data.sequence_length,
            "window": recipe.model.sliding_window,
            "learning_rate": recipe.optim.lr,
            "cpu_minutes": round(sum(result["seconds"] for result in results) / 60, 1),
        },
        "provenance": _provenance(results),
    }


def read_summary(path: Path) -> dict[str, Any]:
    """The JSON of a suite. Raises ValueError where the file holds something else."""
    found = read_json(path)
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise ValueError(f"{str(path)!r} holds no results of a suite: {missing[0]!r} is missing")
    return found


def known_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Every run that the summaries in a folder hold, by the key that its recipe has today; but runs of code of one's
    own, of which a summary has nothing but the key.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        for arm in read_json(path).get("arms", {}).values():
            recipe = naming(str(path), Recipe.from_dict, arm["recipe"])
            other = any(map(own.is_own, (arm["variant"], *own_code(recipe.to_dict()))))
            for run in arm["runs"]:
                key = run["key"] if other else key_of(recipe.with_seed(run["seed"]), arm["variant"])
                found[key] = run | {"key": key}
    return found


def values_of(arm: dict[str, Any], measure: str) -> list[float]:
    """A measure of every run of an arm that has it."""
    return [run["measures"][measure] for run in arm["runs"] if run["measures"].get(measure) is not None]


def _run(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("key", "seed", "parameters", "steps", "tokens", "seconds", "answers", "probes", "provenance")
    curves = {name: [[step, _short(y)] for step, y in curve] for name, curve in result["curves"].items()}
    measures = {name: _short(value) for name, value in result["measures"].items()}
    return {name: result[name] for name in kept} | {"measures": measures, "curves": curves}


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def _arm(arm: Arm, recipe: Recipe, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {"label": arm.label, "set": list(arm.set), "without": list(arm.without), "variant": arm.variant}
    names = dict.fromkeys(name for run in runs for name in run["measures"])
    spreads = {}
    for name in names:
        values = values_of({"runs": runs}, name)
        if values:
            spreads[name] = Spread.of(values).to_dict()
    seconds = fmean(run["seconds"] for run in runs)
    return found | {
        "equal_time": arm.equal_time,
        "recipe": recipe.to_dict(),
        "parameters": runs[0]["parameters"],
        "steps": runs[0]["steps"],
        "seconds": round(seconds, 1),
        "summary": spreads,
        "runs": runs,
    }


def _claim(suite: Suite, claim: Any, arms: dict[str, Any], rows: Mapping[str, measures.Rows]) -> dict[str, Any]:
    """The claim and its verdict, of the seeds whose runs have the number in both arms; `rows`: of each arm's answers.

    Answers to other questions are not paired, and say nothing of the noise of questions; nor does a single row, of
    which there is no verdict.
    """
    better = suite.measure(claim.measure).better
    ours, other = _by_seed(arms[claim.arm], claim.measure), arms.get(claim.than)
    if other is not None:
        theirs = _by_seed(other, claim.measure)
    else:
        fixed = isinstance(claim.than, float)
        theirs = dict.fromkeys(ours, claim.than) if fixed else _by_seed(arms[claim.arm], claim.than)
    wanted, common = len(arms[claim.arm]["runs"]), sorted(ours.keys() & theirs.keys())
    if len(common) < wanted:
        note = f"{len(common)} of {wanted} runs"
        return {**asdict(claim), "better": better, "verdict": NO_VERDICT | {"note": note}}
    values = [ours[seed] for seed in common], [theirs[seed] for seed in common]
    items, asked, others = [], *(rows.get(name, {}).get(claim.measure) for name in (claim.arm, claim.than))
    if other and asked is not None and others is not None and np.array_equal(asked, others):
        items = _items(arms[claim.arm], other, claim.measure, asked)
    verdict = judge(*values, better, items).to_dict()
    if items and items[0][0].shape[1] < 2:
        verdict |= NO_VERDICT | {"difference": verdict["difference"], "note": "one row of questions"}
    return {**asdict(claim), "better": better, "verdict": verdict}


def _by_seed(arm: dict[str, Any], measure: str) -> dict[int, float]:
    return {run["seed"]: value for run in arm["runs"] if (value := run["measures"].get(measure)) is not None}


def _items(
    arm: dict[str, Any], other: dict[str, Any], measure: str, rows: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Answers [seed, row] of both arms, where the runs tell them."""
    told = [[run["answers"].get(measure) for run in one["runs"]] for one in (arm, other)]
    if not all(text for texts in told for text in texts):
        return []
    first, second = (np.array([measures.unpacked(text) for text in texts]) for texts in told)
    return [(by_row(first, rows), by_row(second, rows))]


def _add_reach(runs: dict[str, list[dict[str, Any]]], suite: Suite) -> None:
    """Where each run's curve first reaches the final score of the baseline's run of the same seed, as a share of its
    steps; None where it does not.
    """
    targets = {run["seed"]: run["curves"][suite.reach][-1][1] for run in runs[suite.arms[0].name]}
    for some in runs.values():
        for run in some:
            run["measures"][REACH] = reach(run["curves"][suite.reach], targets[run["seed"]])


def reach(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """The share of the steps after which a falling curve [step, value] is down at `target`, linear between its points;
    None if it never is.
    """
    last = curve[-1][0]
    for i, (step, value) in enumerate(curve):
        if value <= target:
            if i == 0 or value == target:
                return step / last
            before, above = curve[i - 1]
            return (before + (step - before) * (above - target) / (above - value)) / last
    return None


def _provenance(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where and with what the runs were made; what they have in common once."""
    found = [result["provenance"] for result in results]
    return {
        "dates": sorted({one["time"][:10] for one in found}),
        "commits": sorted({one["source"]["commit"] or "none" for one in found}),
        "uncommitted_changes": any(one["source"]["uncommitted_changes"] for one in found),
        "machines": sorted({one["machine"]["name"] for one in found}),
        "threads_of_a_run": sorted({one["machine"]["threads"] for one in found}),
        "versions": found[0]["versions"],
        "data": sorted({one["data"]["contents"] for one in found}),
    }
