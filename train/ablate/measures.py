"""From a run's records to the numbers that arms are compared by.

NAME           a score of the last evaluation; nested ones as NAME.PART
train.PART     a part of the loss, mean over the last tenth of the steps
MECHANISM      what the model says of itself (load, spread, ...), mean over those steps and over layers
gain_forward, gain_backward    the two composite gains of the residual streams
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..data.planted import PlantedSource
from ..data.source import Source

LOSSES = ("loss", "lm", "mtp", "balance", "index")
MECHANISMS = ("load_max", "load_cv", "spread", "captured", "recall", "sinkhorn", "gate", "collisions", "grad_norm")
Rows = Mapping[str, np.ndarray]  # of each answer, by measure
DISTANCE = "accuracy_at."
POINTS = 60  # of a curve of single steps


def measure(records: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a run, by name; what the run did not measure is left out."""
    tail = records[-max(1, len(records) // 10) :]
    found = flatten(scores)
    found |= {f"train.{name}": value for name in LOSSES if (value := _mean(tail, name)) is not None}
    found |= {name: value for name in MECHANISMS if (value := _mean(tail, name)) is not None}
    gains = [record["gain"] for record in records if record.get("gain")]
    if gains:
        found |= {"gain_forward": gains[-1][0], "gain_backward": gains[-1][1]}
    return found


def flatten(scores: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested mappings, names joined by dots."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def answers(scores: Mapping[str, Any]) -> dict[str, str]:
    """Which held-out questions were answered right, by measure: the digits 1 and 0, behind a 1, in hexadecimal."""
    found = dict(scores.get("right", {}))
    every = "".join(found[name] for name in found if name.startswith(DISTANCE))
    return {name: f"{int('1' + text, 2):x}" for name, text in {"accuracy": every, **found}.items() if text}


def rows(source: Source) -> Rows:
    """The row of each of those answers, by measure; of what has no such questions nothing."""
    if not isinstance(source, PlantedSource):
        return {}
    found = source.rows_of_answers()
    return {"accuracy": np.concatenate([found[name] for name in found if name.startswith(DISTANCE)]), **found}


def unpacked(text: str) -> list[int]:
    """The answers in one of those strings."""
    return [int(digit) for digit in f"{int(text, 16):b}"[1:]]


def curves(records: Sequence[Mapping[str, Any]], scores: Iterable[str]) -> dict[str, list[list[float]]]:
    """[step, value] of every score that was evaluated on the way, and of the loss in means of POINTS stretches."""
    found: dict[str, list[list[float]]] = {"train.lm": []}
    stretch = -(-len(records) // POINTS)
    for i in range(0, len(records), stretch):
        piece = records[i : i + stretch]
        found["train.lm"].append([piece[-1]["step"], fmean(record["lm"] for record in piece)])
    for record in records:
        for name, value in flatten({name: record[name] for name in scores if name in record}).items():
            found.setdefault(name, []).append([record["step"], value])
    return found


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over records and, of lists, over their numbers; None where there is none."""
    found: list[float] = []
    for record in records:
        value = record.get(name)
        found += [x for x in (value if isinstance(value, list) else [value]) if x is not None]
    return fmean(found) if found else None
