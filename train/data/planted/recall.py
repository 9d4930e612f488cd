"""Key-value recall: each pair stands once in the row, and its key is asked for once, a known distance later.

    bos . k3 v7 . . k1 v2 . . . ? k3 . . ? k1          targets: v7 at the last k3, v2 at the last k1

The row is a grid of cells of two tokens: a pair, a question or filler; where the grid begins, 1 or 2, is drawn too, so
that pairs lie in all ways across compressed entries. The answer is not shown after the question: a key occurs nowhere
but in its pair and its question, so the pair is the only evidence at any depth of the model. Distances are log-uniform
from `nearest` to `farthest`; with questions = "end" all of them stand at the end of the row. One pair makes a needle.

Tokens: 0 bos · 1 the question mark · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .task import Row, Task

QUESTION = 1
CELL = 2
TRIES = 8  # draws of a place for each pair; in a row that is filled up some find none


class Recall(Task):
    name: ClassVar[str] = "recall"
    options: ClassVar[tuple[str, ...]] = ("density", "nearest", "farthest", "keys", "values", "fillers", "questions")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = QUESTION + 1
        self.first_key = self.first_filler + config.fillers
        self.first_value = self.first_key + config.keys
        self.vocabulary = self.first_value + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        c, first = self.config, 1 + int(draw.integers(CELL))
        cells = (length - first) // CELL
        row = Row.blank(draw.integers(self.first_filler, self.first_key, length))
        pairs = min(self.answers(length), c.keys)
        places = self._places(draw, cells, pairs)
        keys = self.first_key + draw.permutation(c.keys)[:pairs]
        values = self.first_value + draw.integers(c.values, size=pairs)
        for (pair, question), key, value in zip(places, keys.tolist(), values.tolist()):
            pair, question = first + CELL * pair, first + CELL * question
            row.ids[pair : pair + CELL] = key, value
            row.ids[question : question + CELL] = QUESTION, key
            row.ask(question + 1, value, question - pair)
        return row

    def _places(self, draw: np.random.Generator, cells: int, pairs: int) -> list[tuple[int, int]]:
        """Cells of pairs and of their questions, no two the same; at most `pairs` of them."""
        at_end = self.config.questions == "end"
        ending = cells - pairs if at_end else 0  # questions stand from here on, pairs (at_end) before
        apart = self.log_uniform(draw, CELL * (cells - 1), TRIES * pairs, step=CELL)
        free, places = bytearray(b"\1" * cells), []
        for distance, where in zip(apart.tolist(), draw.random(TRIES * pairs).tolist()):
            least = max(distance, ending)
            question = least + int(where * (cells - least))
            pair = question - distance
            if free[question] and free[pair] and not (at_end and pair >= ending):
                free[question] = free[pair] = 0
                places.append((pair, question))
                if len(places) == pairs:
                    break
        return places
