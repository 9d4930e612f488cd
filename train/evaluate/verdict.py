"""Verdicts: whether one way beats another, from a few runs of each with the same seeds.

    d_s          difference of the two runs of seed s, which share data and initial weights: their noise is in part the
                 same, so that the difference has less of it than either
    difference   mean of d_s over n seeds
    interval     difference ± t sqrt(v),  v = sd(d)² / n,  t the 97.5 % point of Student's t with n - 1 degrees
    p            two-sided, of the hypothesis that nothing differs
    verdict      holds: the whole interval lies on the claimed side of 0; does not hold: on the other; else undecided

Answers to the same questions vary with the questions too. Where single answers are known (`items`), [seed, question],

    v = v_seeds + v_items - v_both      two-way clustered variance (Cameron, Gelbach and Miller 2011), v_seeds at least:
                                        the limit of resampling seeds and questions
        v_items   variance over questions of the mean over seeds, / questions;  v_both  of all cells, / cells
    with v² / (v_seeds² / (n - 1) + v_items² / (questions - 1)) degrees of freedom (Satterthwaite)

Of many claims some hold by chance: `holm` gives the verdicts of a whole page, all of which are right with 95 %
probability (Holm 1979).

A verdict speaks of one measure at one scale. Arms without common seeds are compared by Welch's t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a measure over seeds; the deviation of one value is None."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, tuple(values))

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


@dataclass(frozen=True)
class Verdict:
    """The mean difference, its 95 % interval and p (None with a single run of one of them), and the word."""

    word: str
    difference: float
    interval: tuple[float, float] | None
    p: float | None

    def to_dict(self) -> dict[str, Any]:
        interval = self.interval and list(self.interval)
        return {"word": self.word, "difference": self.difference, "interval": interval, "p": self.p}


def judge(
    arm: Sequence[float],
    other: Sequence[float],
    better: str,
    items: tuple[np.ndarray, np.ndarray] | None = None,
) -> Verdict:
    """Whether the values of `arm` are better than those of `other`, value by value.

    Args:
        better: "higher" or "lower".
        items: of both, the answers [seed, question] whose means the values are, if they are known.

    Raises:
        ValueError: no values, values that are not finite, different numbers of them, or another word for `better`.
        ModuleNotFoundError: scipy is not installed.
    """
    _check(arm, other, better)
    if len(arm) != len(other):
        raise ValueError(f"{len(arm)} values against {len(other)}: allowed are as many, in the order of their seeds")
    differences = np.array(arm, float) - np.array(other, float)
    if len(differences) < 2:
        return Verdict(UNDECIDED, float(differences[0]), None, None)
    variance, freedom = differences.var(ddof=1) / len(differences), len(differences) - 1.0
    if items is not None:
        variance, freedom = _two_way(items[0].astype(float) - items[1].astype(float))
    return _verdict(float(differences.mean()), float(variance), freedom, better)


def judge_apart(arm: Sequence[float], other: Sequence[float], better: str) -> Verdict:
    """As `judge`, of runs that have nothing in common: Welch's t. One of the two may be a single run then.

    Raises:
        ValueError: as `judge`.
    """
    _check(arm, other, better)
    difference = fmean(arm) - fmean(other)
    if len(arm) < 2 or len(other) < 2:
        return Verdict(UNDECIDED, difference, None, None)
    errors = [stdev(values) ** 2 / len(values) for values in (arm, other)]
    squares = sum(error**2 / (len(values) - 1) for error, values in zip(errors, (arm, other)))
    return _verdict(difference, sum(errors), sum(errors) ** 2 / squares if squares else 1.0, better)


def holm(verdicts: Sequence[dict[str, Any]], better: Sequence[str]) -> list[dict[str, Any]]:
    """The verdicts, as dicts, with p adjusted for how many they are, and the words that follow from it.

    With the p in ascending order, p_(i) becomes the largest of (m - j + 1) p_(j) over j <= i, 1 at most. A verdict that
    is no longer below 5 % is undecided; those without a p stay, and count for nothing.
    """
    order = sorted((v["p"], i) for i, v in enumerate(verdicts) if v.get("p") is not None)
    found, highest = [dict(v) for v in verdicts], 0.0
    for rank, (p, i) in enumerate(order):
        highest = min(1.0, max(highest, (len(order) - rank) * p))
        found[i]["p"] = highest
        found[i]["word"] = _word(found[i]["difference"], highest, better[i])
    return found


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    return _point(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _check(arm: Sequence[float], other: Sequence[float], better: str) -> None:
    if better not in ("higher", "lower"):
        raise ValueError(f"better={better!r}: allowed are 'higher' and 'lower'")
    for name, values in (("arm", arm), ("other", other)):
        if not len(values) or not all(map(math.isfinite, values)):
            raise ValueError(f"{name}={list(values)}: allowed are one or more finite numbers")


def _verdict(difference: float, variance: float, freedom: float, better: str) -> Verdict:
    from scipy.stats import t

    error = math.sqrt(variance)
    half = _point(freedom) * error
    p = float(2 * t.sf(abs(difference) / error, freedom)) if error else float(difference == 0)
    word = _word(difference, p, better)
    return Verdict(word, difference, (difference - half, difference + half), p)


def _word(difference: float, p: float, better: str) -> str:
    if p >= 1 - CONFIDENCE:
        return UNDECIDED
    return HOLDS if (difference > 0) == (better == "higher") else FAILS


def _two_way(differences: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of differences [seed, question] and its degrees of freedom."""
    seeds, questions = differences.shape
    over_seeds = differences.mean(1).var(ddof=1) / seeds
    over_items = differences.mean(0).var(ddof=1) / questions
    variance = max(over_seeds, over_seeds + over_items - differences.var(ddof=1) / differences.size)
    squares = over_seeds**2 / (seeds - 1) + over_items**2 / (questions - 1)
    return variance, max(seeds - 1.0, variance**2 / squares) if squares else seeds - 1.0


def _point(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
