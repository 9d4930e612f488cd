"""Where the rows of an Engram's table live: with the weights, or in a store of which a step holds what it looks up.

    prefetch   ids = the distinct look-ups of the step to come; its rows are read from the store, in the background
    begin      w = store[ids], with what the step before has changed of them
    forward    out = w[position of each look-up among ids]          gradients reach w alone: one per row, touched or not
    end        store[ids] = w, updated by the optimizer; written in the background

Look-ups depend on tokens alone, so they are known a step ahead (Engram, 2601.07372). One thread does the reading and
the writing, in the order of the calls: rows for step s + 1 are read before step s is written, so `begin` takes over
those that both look up, and every later reading finds them written. A store holds, beside the rows, whatever else
belongs to a row (the optimizer's moments); it comes and goes with them.

b batch · t tokens · h heads of all orders · r rows · w their width · u distinct look-ups of a step
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import engram_gather

PLACES = ("resident", "host", "mapped", "file")


class Table(nn.Embedding):
    """A table among the weights: embeddings [b, t, h w] of look-ups [b, t, h], a gradient for all of its rows."""

    def forward(self, rows: Tensor) -> Tensor:
        return engram_gather(self.weight, rows)


class Held(NamedTuple):
    """The rows of one step: their numbers, ascending, on the host, and every column of the store at them."""

    ids: Tensor
    columns: dict[str, Tensor]


class RowTable(nn.Module):
    """A table in a store, of which a step holds the rows that it looks up: `rows`, in each step a new parameter.

    Args:
        rows, width: of the table.
        place: "resident", where the weights are; "host", in the memory of the host; "mapped", in a file without a name,
            which is gone when the process is; "file", read only, where the state dict that is loaded has it.
        folder: of the file that "mapped" makes.
    """

    def __init__(self, rows: int, width: int, place: str = "resident", folder: Path | str | None = None) -> None:
        super().__init__()
        if place not in PLACES:
            raise ValueError(f"place={place!r}: allowed are {', '.join(PLACES)}")
        self.place, self.folder = place, folder
        self.size = rows, width
        self.store: dict[str, Tensor] = {}
        self.add_column("weight", (width,), torch.get_default_dtype())
        nn.init.normal_(self.weight)  # as nn.Embedding draws: all other weights are those of a model with one
        self.rows = nn.Parameter(torch.empty(0, width))
        self._worker = ThreadPoolExecutor(1, "rows") if place in ("host", "mapped") else None
        self._next: Callable[[], Held] | None = None
        self._held: Held | None = None
        self._ids = torch.empty(0, dtype=torch.int64)  # of the held rows, where those are
        self._last: Held | None = None
        self._written: Future | None = None

    @property
    def weight(self) -> Tensor:
        """The whole table [r, w], as of the last write that came to its end."""
        return self.store["weight"]

    def add_column(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Zeros for each row, in the place of the table.

        Raises:
            OSError: the disk of a mapped table has not enough room.
        """
        size = torch.Size((self.size[0], *shape))
        if self.place == "mapped":
            length = size.numel() * dtype.itemsize
            with tempfile.TemporaryFile(dir=self.folder) as file:  # whose name nobody can leave behind
                os.posix_fallocate(file.fileno(), 0, length)  # a full disk would kill us later
                column = torch.frombuffer(mmap.mmap(file.fileno(), length), dtype=dtype).view(size)
        elif self.place == "file":
            column = torch.empty(size, dtype=dtype, device="meta")
        else:
            at_home = self.weight.device if self.store else None
            column = torch.zeros(size, dtype=dtype, device="cpu" if self.place == "host" else at_home)
        self.store[name] = column

    def prefetch(self, look_ups: Callable[[], Tensor]) -> None:
        """Starts to read the rows of the next step; `look_ups()` gives them, int64 of any shape, on the host.

        Raises:
            RuntimeError: the table is read only.
        """
        if self.place == "file":
            raise RuntimeError("a table of place 'file' is read only: train with 'resident', 'host' or 'mapped'")
        if self._worker is None:
            self._next = lambda: self._read(look_ups)
        else:
            self._next = self._worker.submit(self._read, look_ups).result

    def begin(self) -> None:
        """Holds the prefetched rows, as `rows`, until `end`.

        Raises:
            RuntimeError: nothing was prefetched.
        """
        if self._next is None:
            raise RuntimeError("begin() without prefetch(): a step's look-ups must be known before it")
        held, self._next = self._next(), None
        device = self.rows.device
        columns = {name: column.to(device, non_blocking=True) for name, column in held.columns.items()}
        if self._last is not None:
            _take_over(Held(held.ids, columns), self._last)
        self._held = Held(held.ids, columns)
        self._ids = held.ids.to(device, non_blocking=True)
        self.rows = nn.Parameter(columns["weight"])

    def columns(self) -> dict[str, Tensor]:
        """What belongs to `rows`, by name: tensors [u, ...] to be changed in place."""
        if self._held is None:
            raise RuntimeError("no step has begun: begin() holds its rows")
        return self._held.columns

    def end(self) -> None:
        """Writes the rows of the step back. They no longer learn."""
        columns = self.columns()
        held = Held(self._held.ids, {**columns, "weight": self.rows.detach()})  # type: ignore[union-attr]
        self.rows, self._held = nn.Parameter(columns["weight"].new_empty(0, self.size[1])), None
        if self._worker is None:
            self._write(held)
            return
        self.wait()
        self._last, self._written = held, self._worker.submit(self._write, held)

    def wait(self) -> None:
        """Returns once all is written; raises what writing raised."""
        if self._written is not None:
            self._written.result()

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [b, t, h w] of look-ups [b, t, h]: of the held rows in a step, else of the store.

        Raises:
            IndexError: a look-up that the step has not prefetched.
            RuntimeError: a gradient is asked for outside of a step.
        """
        if self._held is not None:
            ids = self._ids
            at = torch.searchsorted(ids, rows).clamp(max=len(ids) - 1)
            self._check_held(ids[at] == rows)
            return engram_gather(self.rows, at)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError("training outside of a step: prefetch() and begin() hold the rows that learn")
        self.wait()
        picked = self.weight[rows.to(self.weight.device)]
        return picked.flatten(2).to(self.rows.device)

    def _check_held(self, held: Tensor) -> None:
        """On a GPU an assertion of the device: nobody waits for it."""
        missing = "these tokens look up rows that the step has not prefetched"
        if not held.is_cpu:
            torch._assert_async(held.all(), missing)
        elif not torch.compiler.is_compiling() and not held.all():
            raise IndexError(missing)

    def _read(self, look_ups: Callable[[], Tensor]) -> Held:
        with torch.no_grad():
            ids = look_ups().unique()
            return Held(ids, {name: self._pick(column, ids) for name, column in self.store.items()})

    def _pick(self, column: Tensor, ids: Tensor) -> Tensor:
        """The rows on the column's device; of a host's, in pinned memory where they are to leave it."""
        pinned = column.device != self.rows.device
        out = torch.empty(len(ids), *column.shape[1:], dtype=column.dtype, device=column.device, pin_memory=pinned)
        return torch.index_select(column, 0, ids.to(column.device), out=out)

    def _write(self, held: Held) -> None:
        with torch.no_grad():
            for name, column in self.store.items():
                column.index_copy_(0, held.ids.to(column.device), held.columns[name].to(column.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowTable":
        """A resident store goes where the weights go."""
        super()._apply(fn, recurse)
        if self.place == "resident":
            self.store = {name: fn(column) for name, column in self.store.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.wait()
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        missing, errors = arguments[2], arguments[4]
        given = state_dict.get(prefix + "weight")
        if given is None:
            missing.append(prefix + "weight")
        elif tuple(given.shape) != self.size:
            errors.append(f"{prefix}weight has shape {tuple(given.shape)}: the table has {self.size}")
        elif self.place == "file":
            self.store["weight"] = given
        else:
            self.wait()
            self.weight.copy_(given)
            self._next = self._last = None


def _take_over(held: Held, last: Held) -> None:
    """Puts into `held` the rows that the step before has changed since they were read."""
    at = torch.searchsorted(last.ids, held.ids).clamp(max=len(last.ids) - 1)
    both = last.ids[at] == held.ids
    new, old = both.nonzero()[:, 0], at[both]
    for name, column in held.columns.items():
        changed = last.columns[name]
        column.index_copy_(0, new.to(column.device), changed.index_select(0, old.to(column.device)))


_make: ContextVar[Callable[[int, int], nn.Module]] = ContextVar("make", default=Table)


def make_table(rows: int, width: int) -> nn.Module:
    """A `Table`, or what `row_tables` asks for."""
    return _make.get()(rows, width)


@contextmanager
def row_tables(place: str | None = "resident", folder: Path | str | None = None) -> Iterator[None]:
    """Models that are built inside have a `RowTable` in each Engram; with place None, a `Table`, as outside."""
    token = _make.set(Table if place is None else lambda rows, width: RowTable(rows, width, place, folder))
    try:
        yield
    finally:
        _make.reset(token)
