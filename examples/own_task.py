"""A planted task of one's own: nested brackets, each closing one asked for. `abyssal train examples/own_task.toml`

    bos ( [ { } ] ( ) ) ...          target: the kind of a bracket that closes; distance: to the one that it closes

A task draws rows of tokens, says at which positions an answer is asked for, and how far back its evidence stands: the
model is scored by distance. `values` of [planted] is the number of kinds of brackets.
"""

from typing import ClassVar

import numpy as np

from abyssal.train.data.planted import Row, Task
from abyssal.train.settings import PlantedConfig

DEEPEST = 24


class Brackets(Task):
    name: ClassVar[str] = "brackets"
    options: ClassVar[tuple[str, ...]] = ("values",)

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.vocabulary = 1 + 2 * config.values  # bos, then those that open, then those that close

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, kinds = Row.blank(np.zeros(length, np.int64)), self.config.values
        open_at: list[int] = []
        for position, (coin, kind) in enumerate(zip(draw.random(length - 1), draw.integers(kinds, size=length - 1)), 1):
            if open_at and (coin < 0.5 or len(open_at) == DEEPEST):
                opener = open_at.pop()
                row.ids[position] = row.ids[opener] + kinds
                row.ask(position - 1, int(row.ids[position]), position - 1 - opener)
            else:
                row.ids[position] = 1 + kind
                open_at.append(position)
        return row
