"""Common words (after RULER's CWE and FWE): which values stand most often in the row, the commonest first.

    . v7 . v2 v7 . v9 . v7 v2 . . ? v7                     targets: v7 at ?, v2 at the shown v7

Of planted.statements different values COMMON stand more often than the others, each of them RATIO times as often as the
next. The answer depends on the whole row; its distance is that to where the value stands first.
"""

from typing import ClassVar

import numpy as np

from .blind import readers
from .haystack import CELL, Haystack
from .task import NO_GUESS, Guesses, Row

COMMON = 3
RATIO = 2


class Common(Haystack):
    name: ClassVar[str] = "common"
    room: ClassVar[int] = COMMON

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, c = self.hay(draw, length), self.config
        if not COMMON < c.statements <= c.values:
            raise ValueError(f"planted.statements={c.statements}: allowed for common is {COMMON + 1} to planted.values")
        often = np.array([RATIO ** max(COMMON - i, 0) for i in range(c.statements)])
        cells = (length - self.room - CELL) // CELL
        counts = often * max(1, cells // int(often.sum()))
        words = self.first_value + draw.permutation(c.values)[: c.statements]
        at = self.scattered(draw, length, int(counts.sum()))
        row.ids[at] = draw.permutation(np.repeat(words, counts))
        position = length - self.room + np.arange(COMMON)
        row.ids[position[0]], row.ids[position[1:]] = self.mark, words[: COMMON - 1]
        first = [int(at[row.ids[at] == word][0]) for word in words[:COMMON]]
        row.ask(position, words[:COMMON], position - first)
        return row

    def blind(self, row: Row) -> dict[str, Guesses]:
        """What stands most often is what is asked for: the reader who counts is not blind."""
        values = np.flatnonzero(row.ids[: -self.room] >= self.first_value)
        found = readers(row, values)
        return found | {name: np.full_like(found[name], NO_GUESS) for name in ("frequency", "left")}
