"""Verdicts: whether one arm beats another, from a few runs of each.

    difference   mean(arm) - mean(other)
    interval     difference ± t sqrt(s_a²/n_a + s_o²/n_o),  t the 97.5 % point of Student's t with Welch's degrees of
                 freedom  ν = (s_a²/n_a + s_o²/n_o)² / ((s_a²/n_a)²/(n_a - 1) + (s_o²/n_o)²/(n_o - 1))
    verdict      holds: the whole interval lies on the claimed side of 0; does not hold: on the other; else undecided

A verdict speaks of one measure at one scale. With three seeds the interval is wide on purpose: t is 2.8 at four degrees
of freedom and 4.3 at two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

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
    """The difference of two means, its 95 % interval (None with a single run of one of them), and the word."""

    word: str
    difference: float
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        return {"word": self.word, "difference": self.difference, "interval": self.interval and list(self.interval)}


def judge(arm: Sequence[float], other: Sequence[float] | float, better: str) -> Verdict:
    """Whether the values of `arm` are better than those of `other`, or than a given number.

    Args:
        better: "higher" or "lower".

    Raises:
        ValueError: no values, values that are not finite, or another word for `better`.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better={better!r}: allowed are 'higher' and 'lower'")
    fixed = isinstance(other, int | float)
    others: Sequence[float] = [other] if isinstance(other, int | float) else other
    for name, values in (("arm", arm), ("other", others)):
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"{name}={list(values)}: allowed are one or more finite numbers")
    a, o = Spread.of(arm), Spread.of(others)
    difference = a.mean - o.mean
    if a.deviation is None or (o.deviation is None and not fixed):
        return Verdict(UNDECIDED, difference, None)
    n_o = math.inf if fixed else len(others)
    half = _half_width(a.deviation**2 / len(arm), len(arm), (o.deviation or 0.0) ** 2 / n_o, n_o)
    low, high = difference - half, difference + half
    if low <= 0 <= high:
        return Verdict(UNDECIDED, difference, (low, high))
    claimed = low > 0 if better == "higher" else high < 0
    return Verdict(HOLDS if claimed else FAILS, difference, (low, high))


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    return student_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _half_width(error_a: float, n_a: int, error_o: float, n_o: float) -> float:
    """`error` is s²/n, the squared standard error of a mean; a number that is known has none, and n = inf."""
    squared = error_a + error_o
    if not squared:
        return 0.0
    freedom = squared**2 / (error_a**2 / (n_a - 1) + error_o**2 / (n_o - 1))
    return student_quantile(0.5 + CONFIDENCE / 2, max(freedom, 1.0)) * math.sqrt(squared)


def student_quantile(probability: float, freedom: float) -> float:
    """The point below which Student's t lies with that probability (at least 1/2), by bisection to 1e-10.

    Raises:
        ValueError: a probability outside [0.5, 1), or fewer than one degree of freedom.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability={probability}: allowed are 0.5 up to, not including, 1")
    if not freedom >= 1:
        raise ValueError(f"freedom={freedom}: allowed are numbers of at least 1")
    low, high = 0.0, 1.0
    while _student(high, freedom) < probability:
        high *= 2
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return high


def _student(t: float, freedom: float) -> float:
    """P(T <= t) for t >= 0, by Simpson's rule over the angle: t = sqrt(ν) tan a, dP = c cos(a)^(ν - 1) da."""
    end, steps = math.atan(t / math.sqrt(freedom)), 400
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    heights = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 0.5 + scale * end / steps / 3 * (heights[0] + inner + heights[-1])
