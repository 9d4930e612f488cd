"""Records, that is objects with named fields: lines of .jsonl, rows of .parquet and of data sets of Hugging Face.

    for place, record in file: ...        in order, one in memory; rows of a table by blocks
    file.read(place)                      the same record again, later
    file.where(place)                     for people: mine.jsonl:17

What is known of a record beside its place is a key, a hash of its content. It says on which side of the split the
record is, so that others can come, go or change places and it stays there.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...model.fields import shown

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

Record = dict[str, Any]
Place = tuple[int, int, int]  # number of the line or row from 1; of a line also its first byte and its bytes
ROWS = 1024  # of a data set that are read at once


class RecordFile(Protocol):
    """What records are read from."""

    name: str

    def __iter__(self) -> Iterator[tuple[Place, Record]]: ...

    def read(self, place: Place) -> Record: ...

    def where(self, place: Place) -> str: ...


class Lines:
    """A .jsonl file; blank lines are none. Raises ValueError for a broken line, or once the file has changed."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.changed = name, path, path.stat().st_mtime_ns

    def __iter__(self) -> Iterator[tuple[Place, Record]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place, start = (number, start, len(line)), start + len(line)
                if line.strip():
                    yield place, self._parsed(place, line)

    def read(self, place: Place) -> Record:
        with self.path.open("rb") as file:
            check_unchanged(file.fileno(), self.path, self.changed)
            file.seek(place[1])
            return self._parsed(place, file.read(place[2]))

    def where(self, place: Place) -> str:
        return f"{self.path}:{place[0]}"

    def _parsed(self, place: Place, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(place)}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{self.where(place)}: {shown(record)}: allowed is a JSON object")
        return record


class Table:
    """Rows that `load(block)` gives in blocks; `sizes`: rows of each. One block is in memory."""

    def __init__(self, name: str, shown: str, sizes: list[int], load: Callable[[int], "pyarrow.Table"]) -> None:
        self.name, self.shown, self.load = name, shown, functools.lru_cache(maxsize=1)(load)
        self.starts = np.cumsum([0, *sizes])

    def __iter__(self) -> Iterator[tuple[Place, Record]]:
        for number in range(1, int(self.starts[-1]) + 1):
            yield (number, 0, 0), self.read((number, 0, 0))

    def read(self, place: Place) -> Record:
        row = place[0] - 1
        block = int(np.searchsorted(self.starts, row, "right")) - 1
        try:
            found = self.load(block).slice(row - int(self.starts[block]), 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # of which pyarrow's own are
            raise ValueError(f"{self.where(place)}: {' '.join(str(error).split())}") from None
        return {name: _without_nulls(value) for name, value in found.items()}

    def where(self, place: Place) -> str:
        return f"{self.shown}: row {place[0]}"


def _without_nulls(value: Any) -> Any:
    """Without the keys that only other rows have: a column of tables has all keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def from_parquet(name: str, path: Path, fields: Collection[str]) -> Table:
    """A .parquet file, a block for each of its row groups."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise _missing("a .parquet file", "pyarrow") from None
    try:
        about, changed = parquet.read_metadata(path), path.stat().st_mtime_ns
    except ArrowInvalid as error:
        raise ValueError(f"{path}: no parquet file: {' '.join(str(error).split())}") from None
    columns = _chosen(str(path), about.schema.to_arrow_schema().names, fields)

    def load(block: int) -> "pyarrow.Table":
        check_unchanged(path, path, changed)
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(block, columns=columns)

    return Table(name, str(path), [about.row_group(i).num_rows for i in range(about.num_row_groups)], load)


def from_saved(name: str, path: Path, fields: Collection[str]) -> Table:
    """A folder that `save_to_disk` of the datasets library wrote: a data set, or several, of which one is `train`."""
    library = _library(f"the folder {str(path)!r}")
    try:
        found = library.load_from_disk(str(path))
    except (LookupError, ValueError) as error:  # an IndexError of an empty one
        raise ValueError(f"{path}: no data set that can be read: {' '.join(str(error).split())}") from None
    return _from_dataset(name, str(path), found, fields)


def from_hub(source: str, name: str, fields: Collection[str]) -> Table:
    """The data set NAME or NAME:CONFIG, downloaded into the cache of the datasets library unless it is there.

    Raises:
        OSError: it is in neither.
        ValueError: it has several configurations and none is named, or no split `train`.
    """
    library, (path, _, config) = _library(f"data.source={source!r}"), name.partition(":")
    if not path:
        raise ValueError(f"data.source={source!r}: allowed are hf:NAME and hf:NAME:CONFIG")
    try:
        found = library.load_dataset(path, config or None, split="train")
    except (OSError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"data.source={source!r}: {' '.join(str(error).split())}") from None
    return _from_dataset(name, source, found, fields)


def _from_dataset(name: str, shown: str, found: "Dataset | DatasetDict", fields: Collection[str]) -> Table:
    if isinstance(found, dict):
        if "train" not in found:
            raise ValueError(f"{shown}: it has no split 'train', but {', '.join(found)}: give the folder of one")
        found = found["train"]
    chosen = found.select_columns(_chosen(shown, found.column_names, fields)).with_format("arrow")
    sizes = [min(ROWS, len(chosen) - start) for start in range(0, len(chosen), ROWS)]
    return Table(name, shown, sizes, lambda block: chosen[block * ROWS : block * ROWS + ROWS])


READERS: dict[str, Callable[[str, Path, Collection[str]], RecordFile]] = {
    ".jsonl": lambda name, path, fields: Lines(name, path),
    ".parquet": from_parquet,
}


def no_field(where: str, fields: Collection[str], there: Collection[str]) -> ValueError:
    """The error about a record, or a table, that has none of the fields that are read."""
    hint = (
        "; conversations are for abyssal train sft" if "messages" in there else "; data.text_key names that of a text"
    )
    if "messages" in fields:
        hint = "; texts are for abyssal train finetune" if {"text", "content"} & set(there) else ""
    named = ", ".join(map(shown, there)) or "nothing"
    return ValueError(f"{where}: it has {named}: allowed is {' or '.join(fields)}{hint}")


def check_unchanged(file: int | Path, path: Path, changed: int) -> None:
    if os.stat(file).st_mtime_ns != changed:
        raise ValueError(f"data.source: {str(path)!r} has changed since the corpus was read")


def key_of(content: bytes) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Where each key stands for the first time, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])


def held_out_by_key(keys: np.ndarray, fraction: float, some: bool = True) -> np.ndarray:
    """Which are held out: those whose key is below that fraction of all there can be; of two or more, never all.

    some: the one of the smallest key where that gives none.
    """
    held_out = keys < np.uint64(int(fraction * 2**64))
    if some and len(keys) and not held_out.any():
        held_out[np.argmin(keys)] = True
    if held_out.all() and len(keys) > 1:
        held_out[np.argmax(keys)] = False
    return held_out


def _chosen(where: str, columns: Collection[str], fields: Collection[str]) -> list[str]:
    found = [column for column in columns if column in fields]
    if not found:
        raise no_field(where, fields, columns)
    return found


def _library(what: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise _missing(what, "datasets") from None
    return datasets


def _missing(what: str, library: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what} needs the {library} library: pip install 'abyssal[data]'", name=library)
