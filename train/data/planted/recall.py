"""Key-value recall: pairs stand in one stretch of the row; some are asked for at its end, an octave of distances later.

    bos . k3 v7 k8 v1 . k1 v2 . . . . . . . ? k3 . ? k1          targets: v7 at the last k3, v2 at the last k1

The row is a grid of cells of two tokens: a pair, a question or filler; where the grid begins, 1 or 2, is drawn too, so
that pairs lie in all ways across compressed entries. An octave n of distances is drawn, from `nearest` to half the row.
Pairs, of different keys, fill a share `fill` of the cells, as far as keys suffice, whose distance to every question is
from n to 2 n tokens; `questions` of them, if there are so many, are asked for in the last n / 2 tokens, each once.

Without the key all pairs are as likely, at any distance. A blind reader gains by leaving out those that were asked for:
with 64 pairs of 32 values half a point after 16 questions, as each value stands as often as the others, whichever pairs
are asked for. The answer is not shown after its question: the pair is the only evidence at any depth of the model. Two
keys make all but a needle.

Tokens: 0 bos · 1 the question mark · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .blind import readers
from .task import Guesses, Row, Task

QUESTION = 1
CELL = 2


class Recall(Task):
    name: ClassVar[str] = "recall"
    options: ClassVar[tuple[str, ...]] = (
        *("nearest", "farthest", "keys", "values", "fillers", "fill", "questions", "eval_nearest"),
    )

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = QUESTION + 1
        self.first_key = self.first_filler + config.fillers
        self.first_value = self.first_key + config.keys
        self.vocabulary = self.first_value + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        c, first = self.config, 1 + int(draw.integers(CELL))
        cells = (length - first) // CELL
        octave = int(draw.choice(self._octaves(cells)))
        stretch, ending = self._stretch(cells, octave), np.arange(cells - self._ending(octave), cells)
        pairs = min(c.keys, max(1, round(c.fill * len(stretch))))
        asked = min(pairs, c.questions, len(ending))
        row = Row.blank(draw.integers(self.first_filler, self.first_key, length))
        at = first + CELL * draw.choice(stretch, pairs, replace=False)
        row.ids[at] = self.first_key + draw.permutation(c.keys)[:pairs]
        values = draw.permutation(c.values)[np.arange(pairs) % c.values]  # each as often as the others
        row.ids[at + 1] = self.first_value + draw.permutation(values)
        question, evidence = first + CELL * draw.choice(ending, asked, replace=False), at[:asked]
        row.ids[question], row.ids[question + 1] = QUESTION, row.ids[evidence]
        row.ask(question + 1, row.ids[evidence + 1], question - evidence)
        return row

    def _octaves(self, cells: int) -> list[int]:
        """Powers of two, in tokens, whose distances a row of so many cells has room for."""
        c = self.config
        every = [1 << i for i in range(3, (CELL * cells).bit_length())]
        last = c.farthest or 2 * CELL * cells
        found = [n for n in every if c.nearest <= n and 2 * n - 1 <= last and 8 * len(self._stretch(cells, n)) >= n]
        if not found:
            raise ValueError(
                f"planted.nearest={c.nearest}: a row of {CELL * cells} tokens has no room for a whole octave of"
                " distances from there on"
            )
        return found

    def _stretch(self, cells: int, octave: int) -> np.ndarray:
        """The cells whose distance to all questions lies in the octave."""
        return np.arange(max(0, cells - octave), cells - self._ending(octave) - octave // CELL + 1)

    def _ending(self, octave: int) -> int:
        """Cells at the end of a row among which the questions are."""
        return octave // CELL // 2

    def blind(self, row: Row) -> dict[str, Guesses]:
        values = np.flatnonzero(row.ids >= self.first_value)
        return readers(row, values, self.config.nearest)
