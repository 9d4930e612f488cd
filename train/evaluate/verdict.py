"""Verdicts: whether one way beats another, from a few runs of each with the same seeds.

    d_s          difference of the two runs of seed s, which share data and initial weights: their noise is in part the
                 same, so that the difference has less of it than either
    difference   mean of d_s over n seeds
    interval     difference ± t sqrt(v),  v = sd(d)² / n,  t the 97.5 % point of Student's t with n - 1 degrees
    p            two-sided, of the hypothesis that nothing differs
    verdict      holds: the whole interval lies on the claimed side of 0; does not hold: on the other; else undecided

Answers to the same questions vary with the questions too. Where single answers are known (`items`), with d_sq of seed s
and question q of a task, and each task counting the same,

    v_task     = max(V_questions - V_rest / S, 0) / Q / tasks²
    interval   = difference ± sqrt( t_{S-1}² v_seeds + sum_tasks t_{Q-1}² v_task )

V_questions is the variance of the questions' means over seeds, of which V_rest / S, the chance of single answers, is in
v_seeds already. Each variance has its own t: the interval misses the truth no more often than it says, and questions
only widen it (Banerjee 1960; one t for the sum, with estimated degrees of freedom, would be too sure with few seeds).
Where all d_s are the same number, v_seeds is what chance of single answers alone makes, V_rest / S / Q.

Of many claims some hold by chance: `holm` gives the verdicts of a whole page, all of which are right with 95 %
probability (Holm 1979).

Questions of one row are easy or hard together. Where rows are known, R of them, `by_row` makes one answer of each,

    x_sr = mean_q d_sq + R/Q sum_(q of r) (d_sq - mean_q d_sq)

with the same mean, whose variance over r is that of a ratio of sums. Where few rows have most of the questions, R - 1
degrees of freedom are too many for it. A verdict speaks of one measure at one scale.

s one of S seeds · q one of Q questions of a task · r one of R rows
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
    items: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> Verdict:
    """Whether the values of `arm` are better than those of `other`, value by value.

    Args:
        better: "higher" or "lower".
        items: of each task the answers [S, Q] of both, or of its rows [S, R], if they are known; the values are means
            of these over tasks.

    Raises:
        ValueError: no values, values that are not finite, different numbers of them or of answers, or another word
            for `better`.
        ModuleNotFoundError: scipy is not installed.
    """
    _check(arm, other, better)
    if len(arm) != len(other):
        raise ValueError(f"{len(arm)} values against {len(other)}: allowed are as many, in the order of their seeds")
    differences = np.array(arm, float) - np.array(other, float)
    seeds = len(differences)
    if any(one.shape != two.shape or len(one) != seeds or not one.size for one, two in items):
        shapes = [(one.shape, two.shape) for one, two in items]
        raise ValueError(f"answers of shapes {shapes}: allowed are the same ones, of {seeds} seeds, not empty")
    if seeds < 2:
        return Verdict(UNDECIDED, float(differences[0]), None, None)
    answers = [one.astype(float) - two for one, two in items]
    of_seeds = differences.var(ddof=1) / seeds
    if np.allclose(differences, differences[0], rtol=0, atol=1e-12):
        of_seeds = sum(_chance(d) / d.shape[1] for d in answers) / seeds / max(len(items), 1) ** 2
    parts = [(float(of_seeds), seeds - 1)]  # variance, degrees of freedom
    parts += [(_of_questions(d) / len(items) ** 2, d.shape[1] - 1) for d in answers]
    return _verdict(float(differences.mean()), [part for part in parts if part[0]], better)


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


def by_row(answers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Answers [S, Q] of the rows [Q], put together to [S, R].

    Raises:
        ValueError: there are not as many answers.
    """
    if answers.shape[1] != len(rows):
        raise ValueError(f"{answers.shape[1]} answers: allowed are {len(rows)}, as many as the rows have questions")
    found, row = np.unique(rows, return_inverse=True)
    mean = answers.mean(1, keepdims=True)
    of_row = row == np.arange(len(found))[:, None]
    return mean + (answers - mean) @ of_row.T * (len(found) / len(row))


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


def _verdict(difference: float, parts: Sequence[tuple[float, int]], better: str) -> Verdict:
    """From variances that are not 0 and their degrees of freedom."""
    half, p = _half(parts, 1 - CONFIDENCE), _p(abs(difference), parts) if parts else float(difference == 0)
    word = _word(difference, p, better)
    return Verdict(word, difference, (difference - half, difference + half), p)


def _half(parts: Sequence[tuple[float, int]], p: float) -> float:
    """Half the width of the interval that misses with probability `p`."""
    from scipy.stats import t

    return math.sqrt(sum(float(t.isf(p / 2, freedom)) ** 2 * variance for variance, freedom in parts))


def _p(size: float, parts: Sequence[tuple[float, int]]) -> float:
    """The p whose interval reaches just as far as `size`; of one variance, that of its t."""
    from scipy.optimize import brentq
    from scipy.stats import t

    alone = max(float(2 * t.sf(size / math.sqrt(variance), freedom)) for variance, freedom in parts)
    if len(parts) == 1 or not 0 < alone < 1:
        return alone
    low = math.log(alone) - 1e-6  # together they are wider than each
    return math.exp(brentq(lambda log: _half(parts, math.exp(log)) - size, low, 0.0, xtol=1e-13))


def _word(difference: float, p: float, better: str) -> str:
    if p >= 1 - CONFIDENCE:
        return UNDECIDED
    return HOLDS if (difference > 0) == (better == "higher") else FAILS


def _of_questions(d: np.ndarray) -> float:
    """What the choice of questions adds to the variance of the mean of d [S, Q]."""
    seeds, questions = d.shape
    if questions < 2:
        return 0.0
    return float(max(d.mean(0).var(ddof=1) - _chance(d) / seeds, 0.0) / questions)


def _chance(d: np.ndarray) -> float:
    """V_rest of d [S, Q]: the variance of single answers beyond what their seed and their question make."""
    seeds, questions = d.shape
    if questions < 2:
        return 0.0
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    return float((rest**2).sum() / (seeds - 1) / (questions - 1))


def _point(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
