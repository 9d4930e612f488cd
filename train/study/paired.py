"""Whether one set of runs answers more questions right than another: paired by seed and by question.

    d_sq       = right_sq of one - right_sq of the other          the same seed, the same question
    mean       = mean over tasks of the mean over s and q
    variance   = V_seeds / S + sum_tasks max(V_questions - V_rest / S, 0) / Q_task / tasks^2
    interval   = mean ± t(97.5 %, nu) sqrt(variance)               nu by Satterthwaite, from S - 1 and Q - 1 each

The first term is that of the paired t interval over seeds: what other seeds would do on these questions. The second is
what other questions would do; V_questions is the variance of the questions' means over seeds, of which V_rest / S, the
chance of single answers, is in the first term already. Tasks are given, and each counts the same. `holm` keeps the
chance that any of a page's claims holds wrongly at 5 %.

s one of S seeds · q one of Q questions of a task
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
Answers = Sequence[np.ndarray]  # of each task [S, Q]: 1 where right, or any number


@dataclass(frozen=True)
class Difference:
    """Of two arms: the mean, its 95 % interval, and p of a mean this far from 0; none of these with a single seed."""

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def compare(one: Answers, other: Answers) -> Difference:
    """one - other. Raises ValueError where they are not of the same seeds and questions."""
    shapes = [[each.shape for each in answers] for answers in (one, other)]
    if shapes[0] != shapes[1] or not all(each.size for each in one):
        raise ValueError(f"answers of shapes {shapes[0]} and {shapes[1]}: allowed are the same ones, not empty")
    differences = [np.asarray(a, float) - b for a, b in zip(one, other)]
    by_seed = np.mean([each.mean(1) for each in differences], 0)
    mean, seeds = float(by_seed.mean()), len(by_seed)
    if seeds < 2:
        return Difference(mean)
    parts = [(by_seed.var(ddof=1) / seeds, seeds - 1)]  # variance, degrees of freedom
    parts += [(_of_questions(each) / len(differences) ** 2, each.shape[1] - 1) for each in differences]
    variance = sum(part for part, _ in parts)
    if not variance:
        return Difference(mean, mean, mean, float(mean == 0))
    freedom = variance**2 / sum(part**2 / count for part, count in parts if part)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def _of_questions(d: np.ndarray) -> float:
    """What the choice of questions adds to the variance of the mean of d [S, Q]."""
    seeds, questions = d.shape
    if questions < 2:
        return 0.0
    rest = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
    chance = (rest**2).sum() / (seeds - 1) / (questions - 1)
    return max(d.mean(0).var(ddof=1) - chance / seeds, 0.0) / questions


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted so that each may be held against the level by itself: the i-th smallest of n times n - i, i from 0."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, (len(p) - rank) * p[place])
        adjusted[place] = min(largest, 1.0)
    return adjusted
