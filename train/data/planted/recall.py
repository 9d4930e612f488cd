"""Key-value recall: pairs fill the row, and some of their keys are asked for, a known distance later.

    bos . k3 v7 . . k1 v2 k5 v2 . . ? k3 k8 v1 ? k1    targets: v7 at the last k3, v2 at the last k1

The row is a grid of cells of two tokens: a pair, a question or filler; where the grid begins, 1 or 2, is drawn too, so
that pairs lie in all ways across compressed entries. `fill` of the cells hold pairs of different keys, density · t of
them questions, exactly. Which pairs are asked for does not show, so that without the key a question at a distance of n
to 2 n tokens has fill · n / 2 answers that are as likely. The answer is not shown after its question: the pair is the
only evidence at any depth of the model. A pair may be asked for more than once, so that leaving out pairs that were
asked for gains nothing.

A distance and a question's cell are drawn until that is free and a pair stands at the distance before it. With
questions = "end" the questions are the last cells of the row, after all pairs, and each asks for a pair, drawn with the
same shares of distances.

Tokens: 0 bos · 1 the question mark · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .blind import octaves, readers
from .task import Guesses, Row, Task, zipf

QUESTION = 1
CELL = 2
Places = tuple[np.ndarray, np.ndarray, np.ndarray]  # cells of the pairs, of the questions, of what these ask for
TRIES = 64  # draws of a distance and a place for each question
ROWS = 20  # draws of a row's pairs; short rows, of few cells, may have none at the distances that are asked for


class Recall(Task):
    name: ClassVar[str] = "recall"
    options: ClassVar[tuple[str, ...]] = (
        *("density", "nearest", "farthest", "keys", "values", "fillers", "fill", "zipf", "questions", "eval_nearest"),
    )

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = QUESTION + 1
        self.first_key = self.first_filler + config.fillers
        self.first_value = self.first_key + config.keys
        self.use = zipf(config.keys, config.zipf)
        self.vocabulary = self.first_value + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        c, first = self.config, 1 + int(draw.integers(CELL))
        cells, asked = (length - first) // CELL, self.answers(length)
        pairs = self._pairs(cells, asked)
        places = self._at_end if c.questions == "end" else self._spread
        cell, question, pair = places(draw, cells, pairs, asked)
        row = Row.blank(draw.integers(self.first_filler, self.first_key, length))
        at = first + CELL * cell
        row.ids[at] = self.first_key + draw.choice(c.keys, pairs, replace=False, p=self.use)
        row.ids[at + 1] = self.first_value + draw.permutation(pairs) % c.values
        at, evidence = first + CELL * question, first + CELL * pair
        row.ids[at], row.ids[at + 1] = QUESTION, row.ids[evidence]
        row.ask(at + 1, row.ids[evidence + 1], at - evidence)
        return row

    def _pairs(self, cells: int, asked: int) -> int:
        """How many pairs a row of so many cells holds."""
        c, pairs = self.config, max(1, round(self.config.fill * cells))
        if pairs > c.keys:
            raise ValueError(
                f"planted.keys={c.keys}: allowed are {pairs} or more, planted.fill={c.fill} of {cells} cells"
            )
        if pairs + asked > cells:
            raise ValueError(
                f"planted.density={c.density}: {asked} questions beside {pairs} pairs (planted.fill={c.fill}) in a row"
                f" of {cells} cells; allowed are {max(0, cells - pairs)}"
            )
        return pairs

    def _spread(self, draw: np.random.Generator, cells: int, pairs: int, asked: int) -> Places:
        """Questions all over the row."""
        for _ in range(ROWS):
            cell = draw.permutation(cells)[:pairs]
            pair, free = np.zeros(cells, bool), np.ones(cells, bool)
            pair[cell], free[cell] = True, False
            distance = self.distances(draw, CELL * (cells - 1), TRIES * asked, step=CELL)
            question = distance + (draw.random(len(distance)) * (cells - distance)).astype(np.int64)
            lands = np.flatnonzero(free[question] & pair[question - distance])
            chosen = lands[np.sort(np.unique(question[lands], return_index=True)[1])][:asked]
            if len(chosen) == asked:
                return cell, question[chosen], (question - distance)[chosen]
        raise self._no_pairs(cells, asked)

    def _at_end(self, draw: np.random.Generator, cells: int, pairs: int, asked: int) -> Places:
        """Questions after all pairs."""
        self.distances(draw, CELL * (cells - 1), 1, step=CELL)  # there are any
        question = np.arange(cells - asked, cells)
        for _ in range(ROWS):
            cell = draw.permutation(cells - asked)[:pairs]
            far = CELL * (question[:, None] - cell)
            allowed = (far >= self.config.nearest) & (far <= (self.config.farthest or CELL * cells))
            use = np.where(allowed, 1 / octaves(far), 0).cumsum(1)
            if use[:, -1].all():
                chosen = (use <= draw.random((asked, 1)) * use[:, -1:]).sum(1)
                return cell, question, cell[chosen]
        raise self._no_pairs(cells, asked)

    def _no_pairs(self, cells: int, asked: int) -> ValueError:
        c = self.config
        return ValueError(
            f"planted.density={c.density}: {asked} questions find no pairs at their distances in a row of {cells} cells"
            f" with planted.fill={c.fill} and nearest={c.nearest}"
        )

    def blind(self, row: Row) -> dict[str, Guesses]:
        values = np.flatnonzero(row.ids >= self.first_value)
        return readers(row, values, self.config.nearest)
