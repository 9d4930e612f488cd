"""The corpus: documents of bytes, split into training and held-out documents by their names or contents alone.

The default needs no download: the source files of the Python standard library (about 500 documents, 9 MB). A path to a
folder (one document per text file) or to one text file (cut at line ends) works the same way, and so do records, one
document each (`records.py`; `places.py` says what else a source may be). Files are held out by their names and lengths,
records by their content, never by a seed, so that runs with different seeds are held against the same bytes.
A corpus is held in memory, or is places only, for text that is larger than that: 48 bytes for each record.
"""

import hashlib
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from ...model.fields import shown
from .places import SOURCES, locate
from .records import Place, Record, RecordFile, check_unchanged, first_of_each, held_out_by_key, key_of, no_field

TEXT, ALSO = "text", "content"  # fields of a record
PIECE_BYTES = 16 * 1024  # a single file is cut into documents of about this size
CHUNK = 1 << 20  # bytes read at once
FULL_ENOUGH = 0.95  # the search for held-out documents ends at this share of the bytes asked for


@dataclass(frozen=True)
class Document:
    """A document in memory."""

    name: str
    text: bytes

    @property
    def size(self) -> int:
        return len(self.text)

    def chunks(self, size: int) -> Iterator[bytes]:
        """The text in pieces of at most `size` bytes, cut behind a line's end where there is one."""
        return cut(lambda start, count: self.text[start : start + count], self.size, size)


@dataclass(frozen=True)
class FileDocument:
    """A document that is a file, or a part of one, and is read when it is asked for.

    Reading raises ValueError once the file has changed: the corpus would be another one.
    """

    name: str
    path: Path
    start: int
    size: int
    changed: int  # when the file was last changed, in ns

    @property
    def text(self) -> bytes:
        return self._read(0, self.size)

    def chunks(self, size: int) -> Iterator[bytes]:
        """As `Document.chunks`; no more than a piece is in memory."""
        return cut(self._read, self.size, size)

    def _read(self, start: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            check_unchanged(file.fileno(), self.path, self.changed)
            file.seek(self.start + start)
            return file.read(min(count, self.size - start))


@dataclass(frozen=True)
class RecordDocument:
    """A document that is a field of a record, which is read when it is asked for."""

    file: RecordFile
    place: Place
    size: int
    field: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.place[0]:06d}"

    @property
    def text(self) -> bytes:
        return text_of(self.file.read(self.place), self.field, self.file.where(self.place))

    def chunks(self, size: int) -> Iterator[bytes]:
        """As `Document.chunks`."""
        return Document(self.name, self.text).chunks(size)


AnyDocument = Document | FileDocument | RecordDocument


@dataclass(frozen=True, eq=False)
class Documents(Sequence[AnyDocument]):
    """Documents of files, then those of records, which are numbers until one is asked for."""

    of_files: Sequence[AnyDocument]
    files: list[RecordFile]
    records: np.ndarray  # int64 [records, 5]: which of the files; the place, three numbers; bytes of the text
    field: str

    def __len__(self) -> int:
        return len(self.of_files) + len(self.records)

    @overload
    def __getitem__(self, i: int) -> AnyDocument: ...

    @overload
    def __getitem__(self, i: slice) -> list[AnyDocument]: ...

    def __getitem__(self, i: int | slice) -> AnyDocument | list[AnyDocument]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if i < len(self.of_files):
            return self.of_files[i]
        which, number, start, count, size = self.records[i - len(self.of_files)].tolist()
        return RecordDocument(self.files[which], (number, start, count), size, self.field)


def cut(read: Callable[[int, int], bytes], size: int, most: int) -> Iterator[bytes]:
    """The bytes that `read(start, count)` gives, in pieces of at most `most`, cut behind line ends if there are any."""
    start = 0
    while size - start > most:
        piece = read(start, most)
        stop = piece.rfind(b"\n") + 1 or most
        yield piece[:stop]
        start += stop
    yield read(start, size - start)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out documents: those of files sorted by name, those of records in their order."""

    train: Sequence[AnyDocument]
    held_out: Sequence[AnyDocument]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all names and contents: two runs with the same digest saw the same corpus, split the same way."""
        sha = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                sha.update(os.fsencode(f"{document.name}\0{document.size}\0"))
                for chunk in document.chunks(CHUNK):
                    sha.update(chunk)
            sha.update(b"\1")
        return sha.hexdigest()

    def __str__(self) -> str:
        def describe(part: Sequence[AnyDocument]) -> str:
            return f"{len(part)} documents, {sum(d.size for d in part) / 1e6:.2f} MB"

        return f"train {describe(self.train)}; held out {describe(self.held_out)}"


def load_corpus(
    source: str = "stdlib", held_out_fraction: float = 0.05, in_memory: bool = True, text_key: str = TEXT
) -> Corpus:
    """Reads `source` (see `places.py`) and holds out a fraction of its bytes, of records a fraction of their number.

    Empty documents, binary files (with a zero byte), hidden files and exact copies of an earlier document are left out.

    Args:
        in_memory: hold the text; otherwise names and places only, and documents are read when they are asked for.
        text_key: the field of a record that is its text; `content` where there is none of that name.

    Raises:
        FileNotFoundError: `source` is no name that is known and no existing path.
        ValueError: fewer than two documents are left, so that nothing can be held out, or a record holds no text.
        ModuleNotFoundError: a library that reads it is not installed.
    """
    texts, files = locate(source, (text_key, ALSO))
    alone = len(texts) == 1 and not files
    documents = _without_copies(_cut(texts[0][1]) if alone else _read(texts))
    records, keys = _read_records(files, text_key)
    count = len(documents) + len(keys)
    if count < 2:
        raise ValueError(
            f"data.source={source!r}: found {count} text documents (empty and binary ones, hidden files and copies do"
            f" not count), at least 2 are needed, one to hold out; allowed are {SOURCES}"
        )
    corpus = split(documents, held_out_fraction) if len(documents) > 1 or not files else Corpus(tuple(documents), ())
    if files:
        apart = held_out_by_key(keys, held_out_fraction, some=not corpus.held_out)
        parts = ((corpus.train, ~apart), (corpus.held_out, apart))
        corpus = Corpus(*(Documents(part, files, records[chosen], text_key) for part, chosen in parts))
    if not in_memory:
        return corpus
    return Corpus(*(tuple(Document(d.name, d.text) for d in part) for part in (corpus.train, corpus.held_out)))


def text_of(record: Record, field: str, where: str) -> bytes:
    """The text of a record, empty where it is null. Raises ValueError where there is none, naming what there is."""
    name = field if field in record else ALSO
    if name not in record:
        raise no_field(where, (field, ALSO), record)
    text = record[name] if record[name] is not None else ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {name}={shown(text)}: allowed is text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} is no character of Unicode") from None


def split(documents: Sequence[AnyDocument], held_out_fraction: float) -> Corpus:
    """Holds out whole documents in the order of a hash of their names, as long as they fit into the bytes asked for."""
    budget = held_out_fraction * sum(d.size for d in documents)
    chosen: set[str] = set()
    filled = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest()):
        if filled + document.size <= budget:
            chosen.add(document.name)
            filled += document.size
        if filled >= FULL_ENOUGH * budget:
            break
    if not chosen:
        chosen.add(min(documents, key=lambda d: (d.size, d.name)).name)
    ordered = sorted(documents, key=lambda d: d.name)
    return Corpus(tuple(d for d in ordered if d.name not in chosen), tuple(d for d in ordered if d.name in chosen))


def _read(named: Sequence[tuple[str, Path]]) -> list[FileDocument]:
    stats = [path.stat() for _, path in named]
    return [FileDocument(*pair, 0, stat.st_size, stat.st_mtime_ns) for pair, stat in zip(named, stats)]


def _read_records(files: Sequence[RecordFile], field: str) -> tuple[np.ndarray, np.ndarray]:
    """`Documents.records` of all that hold text, each text once, and their keys."""
    found, keys = array("q"), array("Q")
    for which, file in enumerate(files):
        for place, record in file:
            text = text_of(record, field, file.where(place))
            if text:
                found.extend((which, *place, len(text)))
                keys.append(key_of(text))
    kept = first_of_each(np.array(keys, np.uint64))
    return np.array(found, np.int64).reshape(-1, 5)[kept], np.array(keys, np.uint64)[kept]


def _cut(path: Path) -> list[FileDocument]:
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    if not size:
        return []
    piece, starts = min(PIECE_BYTES, size // 20 + 1), [0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while starts[-1] < size:
            starts.append(text.find(b"\n", starts[-1] + piece - 1) + 1 or size)
        if len(starts) == 2 and size > PIECE_BYTES:  # one line: cut at blanks, or where there are none as it comes
            starts = [0]
            while starts[-1] < size:
                stop = min(starts[-1] + piece, size)
                starts.append(size if stop == size else text.rfind(b" ", starts[-1], stop) + 1 or stop)
    spans = enumerate(pairwise(starts))
    return [FileDocument(f"{path.name}:{i:06d}", path, start, stop - start, changed) for i, (start, stop) in spans]


def _without_copies(documents: list[FileDocument]) -> list[FileDocument]:
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        sha, binary = hashlib.sha256(), False
        for chunk in document.chunks(CHUNK):
            sha.update(chunk)
            binary = binary or b"\0" in chunk
        if document.size and not binary and sha.digest() not in seen:
            seen.add(sha.digest())
            kept.append(document)
    return kept
