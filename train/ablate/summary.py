"""A suite's runs put together: mean and spread of every measure of every arm, and a verdict on every claim.

The summary is JSON and holds all that picture and page need: texts, numbers of single runs, curves, where it ran.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ...model.folders import read_json
from .suite import Arm, Job, Suite
from .verdict import Spread, judge

NAMES = ("suite", "title", "question", "caveat", "measures", "panels", "arms", "claims", "scale", "provenance")
REACH = "reach"  # the share of its steps after which an arm has the baseline's final score


def summarise(
    suite: Suite, size: str, overrides: Sequence[str], planned: Sequence[Job], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON of a suite. `results[i]` is what `planned[i]` measured."""
    runs = {arm.name: [_run(r) for job, r in zip(planned, results) if job.arm == arm.name] for arm in suite.arms}
    if suite.reach:
        _add_reach(runs, suite)
    arms = {arm.name: _arm(arm, runs[arm.name]) for arm in suite.arms}
    first = results[0]
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
        "claims": [_claim(suite, claim, arms) for claim in suite.claims],
        "scale": {
            "seeds": len({job.seed for job in planned}),
            "runs": len(planned),
            "steps": first["steps"],
            "tokens": first["tokens"],
            "recipe": suite.recipe,
            "sequence_length": first["recipe"]["data"]["sequence_length"],
            "window": first["recipe"]["model"]["sliding_window"],
            "chance": 1 / planted["values"] if (planted := first["recipe"].get("planted")) else None,
            "learning_rate": first["recipe"]["optim"]["lr"],
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


def values_of(arm: dict[str, Any], measure: str) -> list[float]:
    """A measure of every run of an arm that has it."""
    return [run["measures"][measure] for run in arm["runs"] if run["measures"].get(measure) is not None]


def _run(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("key", "seed", "parameters", "steps", "tokens", "seconds", "measures", "curves")
    return {name: result[name] for name in kept} | {"measures": dict(result["measures"])}


def _arm(arm: Arm, runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {"label": arm.label, "set": list(arm.set), "without": list(arm.without), "variant": arm.variant}
    names = dict.fromkeys(name for run in runs for name in run["measures"])
    spreads = {}
    for name in names:
        values = values_of({"runs": runs}, name)
        if values:
            spreads[name] = Spread.of(values).to_dict()
    seconds = fmean(run["seconds"] for run in runs)
    return found | {
        "parameters": runs[0]["parameters"],
        "seconds": round(seconds, 1),
        "summary": spreads,
        "runs": runs,
    }


def _claim(suite: Suite, claim: Any, arms: dict[str, Any]) -> dict[str, Any]:
    better = suite.measure(claim.measure).better
    ours = values_of(arms[claim.arm], claim.measure)
    other = claim.than if isinstance(claim.than, float) else values_of(arms[claim.than], claim.measure)
    wanted = len(arms[claim.arm]["runs"])
    if len(ours) < wanted or other == []:
        verdict = {"word": "undecided", "difference": None, "interval": None, "note": f"{len(ours)} of {wanted} runs"}
    else:
        verdict = judge(ours, other, better).to_dict()
    return {**asdict(claim), "better": better, "verdict": verdict}


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
