"""The Engram tables of a run that keeps their rows apart: what a step looks up is known, and read, a step ahead.

for each step s:    hold the rows of s, read those of s + 1 meanwhile;   forward, backward, update;   write them back
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from ...model.engram import Engram
from ...model.tables import RowTable, row_tables
from ..data.rows import Batch
from ..recipe import Recipe


def places(recipe: Recipe, run: Path | None) -> AbstractContextManager[None]:
    """A context in which the recipe's model is built: for training in folder `run`, or (None) to be read only."""
    place = recipe.train.engram_tables
    if run is None:
        return nullcontext() if place == "resident" else row_tables("file" if place == "mapped" else place)
    if recipe.optim.engram_rows == "all":
        return nullcontext()
    run.mkdir(parents=True, exist_ok=True)
    return row_tables(place, run)


def named_tables(model: nn.Module) -> dict[str, RowTable]:
    """The row tables of a model, by the names of their weights."""
    return {f"{name}.weight": table for name, table in model.named_modules() if isinstance(table, RowTable)}


class Tables:
    """All row tables of a model together; without any, nothing happens."""

    def __init__(self, model: nn.Module) -> None:
        self.engrams = [m for m in model.modules() if isinstance(m, Engram) and isinstance(m.table, RowTable)]
        self.tables = [engram.table for engram in self.engrams]
        self._canonical: list[Tensor] | None = None
        self._ahead: int | None = None  # the step whose rows are being read

    def numel(self) -> int:
        return sum(table.weight.numel() for table in self.tables)

    def begin(self, step: int, batch_of: Callable[[int], Batch]) -> None:
        """Holds the rows of `batch_of(step)`, a batch on the host, and starts to read those of the step after it."""
        if not self.tables:
            return
        if self._ahead != step:
            self._prefetch(batch_of(step))
        for table in self.tables:
            table.begin()
        self._ahead = step + 1
        self._prefetch(batch_of(step + 1))

    def end(self) -> None:
        for table in self.tables:
            table.end()

    def _prefetch(self, batch: Batch) -> None:
        if self._canonical is None:  # on the host once: a step on the device need not be waited for
            self._canonical = [engram.canonical.cpu() for engram in self.engrams]
        for table, engram, canonical in zip(self.tables, self.engrams, self._canonical):
            table.prefetch(_look_ups(engram, batch, canonical))


def _look_ups(engram: Engram, batch: Batch, canonical: Tensor) -> Callable[[], Tensor]:
    return lambda: engram.look_ups(batch.ids, batch.documents, canonical)
