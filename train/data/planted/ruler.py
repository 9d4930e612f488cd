"""All kinds of `haystack.KINDS` in turn: a row is one of them, drawn, and each kind is scored apart."""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .common import Common
from .haystack import Haystack
from .needles import MultiKey, MultiValue, Single
from .task import Guesses, Row, Task
from .tracking import Tracking

TASKS: tuple[type[Haystack], ...] = (Single, MultiKey, MultiValue, Tracking, Common)


class Ruler(Task):
    name: ClassVar[str] = "ruler"
    options: ClassVar[tuple[str, ...]] = Haystack.options

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.tasks = {kind.name: kind(config) for kind in TASKS}
        self.vocabulary = max(task.vocabulary for task in self.tasks.values())

    def row(self, draw: np.random.Generator, length: int) -> Row:
        name = TASKS[int(draw.integers(len(TASKS)))].name
        row = self.tasks[name].row(draw, length)
        row.kinds[row.asked] = [kind or name for kind in row.kinds[row.asked].tolist()]
        return row

    def blind(self, row: Row) -> dict[str, Guesses]:
        return self.tasks[str(row.kinds[row.asked[0]]).split("-")[0]].blind(row)
