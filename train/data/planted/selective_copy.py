"""Selective copying: items scattered among filler, a wait, then the mark to repeat them in order.

    bos . a . b c . . (wait) . . ! a b                 targets: a at !, b at the shown a, c at the shown b

A row is a chain of such episodes. The farthest an answer of an episode can be from its item is drawn, d, so large that
its nearest answer is at least `nearest` away; n = density · d items stand within 2 n tokens, then a wait of d - 2 n, so
that every distance of the episode is in [d - n, d].

Tokens: 0 bos · 1 the mark · fillers · values
"""

from itertools import count
from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .blind import readers
from .task import Guesses, Row, Task

COPY = 1


class SelectiveCopy(Task):
    name: ClassVar[str] = "selective_copy"
    options: ClassVar[tuple[str, ...]] = ("density", "nearest", "farthest", "values", "fillers", "eval_nearest")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = COPY + 1
        self.first_value = self.first_filler + config.fillers
        self.vocabulary = self.first_value + config.values

        self.least = next(d for d in count(config.nearest) if d - self._items(d) >= config.nearest)

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row = Row.blank(draw.integers(self.first_filler, self.first_value, length))
        start = 1
        while start == 1 or self._room(length - start) >= self.least:
            start = self._episode(draw, row, start)
        return row

    def _items(self, farthest: int) -> int:
        return max(1, int(self.config.density * farthest))

    def _room(self, tokens: int) -> int:
        """The farthest distance of an episode that fits: it takes d tokens and one for each of its n answers."""
        return min(tokens - 1, int(tokens / (1 + self.config.density)))

    def _episode(self, draw: np.random.Generator, row: Row, start: int) -> int:
        """Writes an episode at `start`; returns where it ends."""
        farthest = int(self.distances(draw, self._room(len(row.ids) - start), 1, least=self.least)[0])
        n = self._items(farthest)
        items = draw.integers(self.first_value, self.vocabulary, n)
        places = start + np.sort(draw.permutation(2 * n)[:n])
        mark = start + farthest
        row.ids[places], row.ids[mark], row.ids[mark + 1 : mark + n] = items, COPY, items[:-1]
        answers = mark + np.arange(n)
        row.ask(answers, items, answers - places)
        return mark + n

    def blind(self, row: Row) -> dict[str, Guesses]:
        shown = row.asked[row.ids[row.asked] != COPY]
        items = np.setdiff1d(np.flatnonzero(row.ids >= self.first_value), shown)
        return readers(row, items, self.config.nearest)
