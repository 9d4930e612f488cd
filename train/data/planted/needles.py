"""Needles in a haystack: one, one among many, and several values of one key (RULER's S-NIAH, MK-NIAH, MV-NIAH).

    single       . . k3 v7 . . . . . . . . ? k3              target: v7 at k3
    multikey     . k3 v7 . k1 v2 . k5 v9 . ? k5 . ? k1       targets: v9 at k5, v2 at k1
    multivalue   . k3 v7 . k1 v2 . k3 v9 . ? k3 v7 ? k1      targets: v7 at k3, v9 at v7, v2 at k1

The values of a key are asked for in the order in which they stand. `single` has one value in its row: to say it, a
model has to find it, but need not read the key. Its blind readers are always right, a model that sees too little is
not.
"""

from typing import ClassVar

import numpy as np

from .haystack import ASKED, CELL, Haystack
from .task import Row

VALUES = 4  # of each key of multivalue


class Single(Haystack):
    name: ClassVar[str] = "single"
    room: ClassVar[int] = CELL

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, at = self.hay(draw, length), int(self.scattered(draw, length, 1)[0])
        row.ids[at : at + CELL] = self.some_keys(draw, 1)[0], self.some_values(draw, 1)[0]
        position = self.question(row, 0, int(row.ids[at]))
        row.ask(position, row.ids[at + 1], position - (at + 1))
        return row


class MultiKey(Haystack):
    name: ClassVar[str] = "multikey"

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, count = self.hay(draw, length), self.config.statements
        at = self.scattered(draw, length, count)
        row.ids[at], row.ids[at + 1] = self.some_keys(draw, count), self.some_values(draw, count)
        for number, pair in enumerate(draw.choice(at, ASKED).tolist()):
            position = self.question(row, number, int(row.ids[pair]))
            row.ask(position, row.ids[pair + 1], position - (pair + 1))
        return row


class MultiValue(Haystack):
    name: ClassVar[str] = "multivalue"
    room: ClassVar[int] = ASKED // VALUES * (CELL + VALUES - 1)

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, count = self.hay(draw, length), self.config.statements // VALUES
        at = self.scattered(draw, length, VALUES * count)
        keys = draw.permutation(np.repeat(self.some_keys(draw, count), VALUES))
        row.ids[at], row.ids[at + 1] = keys, self.some_values(draw, len(keys))
        begins = np.arange(length - self.room, length, CELL + VALUES - 1)
        for begin, key in zip(begins.tolist(), draw.choice(keys, len(begins)).tolist()):
            evidence = at[keys == key] + 1
            position = begin + 1 + np.arange(VALUES)
            row.ids[begin : begin + CELL] = self.mark, key
            row.ids[position[1:]] = row.ids[evidence[:-1]]
            row.ask(position, row.ids[evidence], position - evidence)
        return row
