"""Multi-query associative recall (Arora et al. 2023): all pairs first, then every key once more, among filler.

    bos k3 v7 k1 v2 k5 v2 . . k1 . . . . . k5 . k3     targets: v2 at the last k1, v2 at the last k5, v7 at the last k3

density · t pairs, of different keys; then cells of two tokens, a key and filler. How many cells lie between the last
pair and a question is drawn by a power law, p(gap) ~ gap^(POWER - 1), so that most questions come soon; pairs and gaps
are matched at random. No mark says that a token is a question: that it stood before does. Each pair is asked for once,
so that towards the end a blind reader has few pairs left.

Tokens: 0 bos · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .blind import readers
from .task import Guesses, Row, Task

CELL = 2
POWER = 0.01  # as in the authors' experiments


class Mqar(Task):
    name: ClassVar[str] = "mqar"
    options: ClassVar[tuple[str, ...]] = ("density", "keys", "values", "fillers")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_key = 1 + config.fillers
        self.first_value = self.first_key + config.keys
        self.vocabulary = self.first_value + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        c, pairs = self.config, self.answers(length)
        cells = (length - 1) // CELL - pairs  # for questions
        if pairs > min(c.keys, cells):
            raise ValueError(
                f"planted.density={c.density}: {pairs} pairs and as many questions in a row of {length} tokens; allowed"
                f" are {(length - 1) // CELL // 2}, and planted.keys={c.keys}"
            )
        row = Row.blank(draw.integers(1, self.first_key, length))
        pair = 1 + CELL * np.arange(pairs)
        row.ids[pair] = self.first_key + draw.permutation(c.keys)[:pairs]
        row.ids[pair + 1] = self.first_value + draw.integers(c.values, size=pairs)
        use = np.arange(1.0, cells + 1) ** (POWER - 1)
        asked = 1 + CELL * (pairs + draw.choice(cells, pairs, replace=False, p=use / use.sum()))
        row.ids[asked] = row.ids[pair]
        row.ask(asked, row.ids[pair + 1], asked - (pair + 1))
        return row

    def blind(self, row: Row) -> dict[str, Guesses]:
        return readers(row, np.flatnonzero(row.ids >= self.first_value))
