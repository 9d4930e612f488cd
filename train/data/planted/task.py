"""What a planted task is: rows of tokens, with targets at the answers and what each answer is graded by.

t tokens of a row
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from ..rows import IGNORED

BOS = 0  # the first token of every row, in every task
NO_ANSWER = -1
NO_GUESS = -1

Positions = int | np.ndarray
Guesses = np.ndarray  # int64 [answers of a row, guesses of one reader]


@dataclass(frozen=True)
class Row:
    """int64 [t] each. `targets`: the answer at the position that predicts it, else -100. `distances`: how many tokens
    before that position the evidence stands, else -1; it is in the window if the distance is below the window's size.
    `kinds`: words [t], what answers are scored apart by, in a task that has several kinds of them.
    """

    ids: np.ndarray
    targets: np.ndarray
    distances: np.ndarray
    kinds: np.ndarray

    @classmethod
    def blank(cls, ids: np.ndarray) -> "Row":
        """A row that asks nothing yet; its first token becomes BOS."""
        ids[0] = BOS
        targets, distances = np.full(len(ids), IGNORED), np.full(len(ids), NO_ANSWER)
        return cls(ids.astype(np.int64), targets, distances, np.full(len(ids), "", "U16"))

    def ask(self, position: Positions, answer: Positions, distance: Positions, kind: str = "") -> None:
        self.targets[position], self.distances[position], self.kinds[position] = answer, distance, kind

    @property
    def asked(self) -> np.ndarray:
        """The positions of the answers, in order."""
        return np.flatnonzero(self.distances != NO_ANSWER)


class Task(ABC):
    """A way to draw rows. Raises ValueError for an option of [planted] that is set and not among its `options`."""

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    axis: ClassVar[str] = "tokens from the evidence to the question"  # what `Row.distances` counts
    vocabulary: int

    def __init__(self, config: PlantedConfig) -> None:
        self.config = config
        for f in fields(config):
            if f.name not in (*self.options, "eval_length", "eval_lengths") and getattr(config, f.name) != f.default:
                read = ", ".join(self.options)
                raise ValueError(
                    f"planted.{f.name}: the task {self.name} has no such option; it reads {read}; leave it at its"
                    f" default {f.default!r}"
                )

    @abstractmethod
    def row(self, draw: np.random.Generator, length: int) -> Row:
        """A row of `length` tokens. Raises ValueError where the distances asked for have no room in it."""

    def blind(self, row: Row) -> dict[str, Guesses]:
        """What readers who do not know what is asked for guess at each question, by name (`blind.py`)."""
        return {}

    def answers(self, length: int) -> int:
        """How many answers a row of `length` tokens has."""
        return max(1, round(self.config.density * length))

    def distances(
        self, draw: np.random.Generator, most: int, count: int, least: int | None = None, step: int = 1
    ) -> np.ndarray:
        """Distances in steps of `step` tokens, from `nearest` (or `least`) to `farthest` tokens and never above `most`:
        octaves equally often, a part of one as often as it is long on a log scale, and uniform within an octave.

        Raises:
            ValueError: there are none.
        """
        least = self.config.nearest if least is None else least
        nearest, farthest = -(-least // step), min(most, self.config.farthest or most) // step
        if farthest < nearest:
            raise ValueError(
                f"planted.nearest={self.config.nearest}: rows of this length leave room for distances up to"
                f" {max(0, farthest * step)}, and the least is {least}"
            )
        octaves = 1 << np.arange(nearest.bit_length(), farthest.bit_length())
        edges = np.array([nearest, *octaves, farthest + 1])
        use = np.log(edges[1:] / edges[:-1])
        octave = draw.choice(len(use), count, p=use / use.sum())
        return draw.integers(edges[octave], edges[octave + 1])


def zipf(count: int, exponent: float) -> np.ndarray:
    """Shares of so many words: that of the r-th, from 1, in proportion to r^-exponent."""
    use = np.arange(1, count + 1) ** -float(exponent)
    return use / use.sum()
