"""The best values of some keys of a recipe at equal time, one key after the other: tuning that can be repeated.

    best = ()                                 what is changed in the arm that is tuned
    for each axis:  for each of its changes:  train  arm + best + change,  as long as a run of `clock` takes
                    best gets the change with the lowest score, if that is lower than without it

A trial is a run of an ablation (`run.py`): resumed, made once, its steps from the measured seconds of its step. An axis
whose changes go together ("batch" and "length", say) names several keys in one change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...model.disk import write_json
from .run import run_suite
from .suite import Arm, Measure, Panel, Suite

SCORE = Measure("clean", "held-out bits per byte, clean bytes", "lower")
PANEL = Panel("bars", "Held-out text at the end", (SCORE.name,), "bits per byte")


@dataclass(frozen=True)
class Axis:
    """What is tried together: each change is some `key=value` of the recipe."""

    name: str
    changes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Sweep:
    """An arm, what is tried of it, in this order, and the arm whose run sets the time."""

    name: str
    recipe: str
    set: tuple[str, ...]
    clock: Arm
    tuned: Arm
    axes: tuple[Axis, ...]


def run_sweep(sweep: Sweep, out: Path, *, seed: int = 0, workers: int = 2, shown: bool = True) -> dict[str, Any]:
    """Runs what is not yet run, writes OUT/sweep-NAME.json and returns it: every trial, and the best changes.

    Raises:
        ValueError: as `run_suite`.
    """
    best: tuple[str, ...] = ()
    trials: list[dict[str, Any]] = []
    for axis in sweep.axes:
        found = run_suite(_suite(sweep, axis, best), out, seeds=[seed], workers=workers, shown=shown)
        base, *tried = found["arms"].values()
        if not trials and sweep.tuned is sweep.clock:
            trials.append(_trial("as it is", (), (), base))
        new = [_trial(axis.name, change, best, arm) for change, arm in zip(axis.changes, tried)]
        lowest = min([*trials, *new], key=lambda trial: trial["score"])
        trials += new
        best = tuple(lowest["changes"])
        (out / f"{_name(sweep, axis)}.json").unlink()  # the sweep's own JSON holds it
        write_json(out / f"sweep-{sweep.name}.json", {"sweep": sweep.name, "best": list(best), "trials": trials})
    return {"sweep": sweep.name, "best": list(best), "trials": trials}


def table(found: dict[str, Any]) -> str:
    """Every trial, with what it changes in the best before it, the best of all marked, as lines for a terminal."""
    rows = [("axis", "changes", "steps", "seconds", "parameters", SCORE.label)]
    for trial in found["trials"]:
        mark = " *" if trial["changes"] == found["best"] else ""
        numbers = f"{trial['steps']:,}", f"{trial['seconds']:.0f}", f"{trial['parameters']:,}"
        rows.append((trial["axis"], " ".join(trial["tried"]) or "-", *numbers, f"{trial['score']:.4f}{mark}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def _suite(sweep: Sweep, axis: Axis, best: Sequence[str]) -> Suite:
    """The arm that sets the time, and every change of the axis on top of the best so far."""
    arm = sweep.tuned
    tried = [
        Arm(f"{i}", " ".join(change), (*arm.set, *best, *change), arm.without, arm.variant, equal_time=True)
        for i, change in enumerate(axis.changes)
    ]
    return Suite(
        name=_name(sweep, axis),
        title=sweep.name,
        question=axis.name,
        caveat="",
        recipe=sweep.recipe,
        set=sweep.set,
        arms=(sweep.clock, *tried),
        measures=(SCORE,),
        claims=(),
        panels=(PANEL,),
    )


def _name(sweep: Sweep, axis: Axis) -> str:
    return f"sweep-{sweep.name}-{axis.name.replace(' ', '-')}"


def _trial(axis: str, tried: Sequence[str], best: Sequence[str], arm: dict[str, Any]) -> dict[str, Any]:
    """What was tried on top of the best before it, and all changes together."""
    run = arm["runs"][0]
    numbers = {name: run[name] for name in ("steps", "tokens", "seconds", "parameters")}
    commit = run["provenance"]["source"]["commit"]
    changes = {"tried": list(tried), "changes": [*best, *tried]}
    return {"axis": axis, **changes, "score": run["measures"][SCORE.name], "commit": commit, **numbers}
