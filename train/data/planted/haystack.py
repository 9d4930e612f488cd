"""What the tasks after RULER (Hsieh et al. 2024) have in common: statements scattered in filler, questions at the end.

    bos . . k3 v7 . . . . k1 v2 . k5 v9 . . . . . ? k5 ? k3

A statement or a question is two tokens. A row has planted.statements of them, however long it is: what grows with its
length is the hay. Each kind of row has a question mark of its own, by which a model that is trained on several kinds
knows what is asked. Questions are drawn with replacement, so that leaving out what was asked for gains nothing.

Tokens, the same for all kinds: 0 bos · question marks · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .blind import readers
from .task import Guesses, Row, Task

KINDS = ("single", "multikey", "multivalue", "tracking", "common")
ASKED = 8  # questions of a row
CELL = 2


class Haystack(Task):
    options: ClassVar[tuple[str, ...]] = ("statements", "keys", "values", "fillers")
    room: ClassVar[int] = CELL * ASKED  # tokens at the end of a row that the questions take

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.first_filler = 1 + len(KINDS)
        self.first_key = self.first_filler + config.fillers
        self.first_value = self.first_key + config.keys
        self.vocabulary = self.first_value + config.values

    @property
    def mark(self) -> int:
        return 1 + KINDS.index(self.name)

    def hay(self, draw: np.random.Generator, length: int) -> Row:
        """A row of filler."""
        return Row.blank(draw.integers(self.first_filler, self.first_key, length))

    def scattered(self, draw: np.random.Generator, length: int, count: int) -> np.ndarray:
        """Where so many statements begin, in order, none over another or over the questions."""
        first = 1 + int(draw.integers(CELL))
        cells = (length - self.room - first) // CELL
        if count > cells:
            raise ValueError(
                f"planted.statements={self.config.statements}: allowed are {max(0, cells)} for {self.name} in a row of"
                f" {length} tokens"
            )
        return first + CELL * np.sort(draw.permutation(cells)[:count])

    def some_keys(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """So many different keys."""
        if count > self.config.keys:
            raise ValueError(f"planted.keys={self.config.keys}: allowed are {count} or more for {self.name}")
        return self.first_key + draw.permutation(self.config.keys)[:count]

    def some_values(self, draw: np.random.Generator, count: int) -> np.ndarray:
        return self.first_value + draw.integers(self.config.values, size=count)

    def question(self, row: Row, number: int, key: int) -> int:
        """Writes a question into the row's last cells, which are numbered; the position that answers it."""
        position = len(row.ids) - self.room + CELL * number
        row.ids[position : position + CELL] = self.mark, key
        return position + 1

    def blind(self, row: Row) -> dict[str, Guesses]:
        values = np.flatnonzero(row.ids >= self.first_value)
        return readers(row, values[values < len(row.ids) - self.room])
