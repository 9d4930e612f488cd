"""Selective copying: items scattered among filler, a wait, then the mark to repeat them in order.

    bos . a . b c . . (wait) . . ! a b                 targets: a at !, b at the shown a, c at the shown b

A row is a chain of such episodes. The farthest an answer of an episode can be from its item is drawn log-uniformly,
d = nearest + 1 ... farthest; n = density · d items (at most half of d, and never so many that one would come nearer
than `nearest`) stand within 2 n tokens, then a wait of d - 2 n, so that every distance of the episode is in [d - n, d].

Tokens: 0 bos · 1 the mark · fillers · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .task import Row, Task

COPY = 1


class SelectiveCopy(Task):
    name: ClassVar[str] = "selective_copy"
    options: ClassVar[tuple[str, ...]] = ("density", "nearest", "farthest", "values", "fillers")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = COPY + 1
        self.first_value = self.first_filler + config.fillers
        self.vocabulary = self.first_value + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row = Row.blank(draw.integers(self.first_filler, self.first_value, length))
        start = 1
        while start == 1 or self._room(length - start) > self.config.nearest:
            start = self._episode(draw, row, start)
        return row

    def _room(self, tokens: int) -> int:
        """The farthest distance of an episode that fits: it takes d tokens and one for each of its n answers."""
        return min(tokens - 1, int(tokens / (1 + self.config.density)))

    def _episode(self, draw: np.random.Generator, row: Row, start: int) -> int:
        """Writes an episode at `start`; returns where it ends."""
        nearest = self.config.nearest
        farthest = int(self.log_uniform(draw, self._room(len(row.ids) - start), 1, least=nearest + 1)[0])
        count = max(1, min(int(self.config.density * farthest), farthest - nearest))
        items = draw.integers(self.first_value, self.vocabulary, count)
        places = start + np.sort(draw.permutation(2 * count)[:count])
        mark = start + farthest
        row.ids[places], row.ids[mark], row.ids[mark + 1 : mark + count] = items, COPY, items[:-1]
        for i, (place, item) in enumerate(zip(places.tolist(), items.tolist())):
            row.ask(mark + i, item, mark + i - place)
        return mark + count
