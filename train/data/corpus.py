"""The corpus: documents of bytes, split into training and held-out documents by name alone.

The default needs no download: the source files of the Python standard library (about 500 documents, 9 MB). A path to a
folder (one document per text file) or to one text file (cut at line ends) works the same way. The split depends only on
the documents' names and lengths, never on a seed, so that runs with different seeds are held against the same bytes.
A corpus is held in memory, or is names and places only, for text that is larger than that.
"""

import hashlib
import mmap
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

STDLIB_SKIPS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_SKIPS |= {"encodings"}  # generated tables, near copies of one another: a held-out one is known from its siblings
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
            if os.fstat(file.fileno()).st_mtime_ns != self.changed:
                raise ValueError(f"data.source: {str(self.path)!r} has changed since the corpus was read")
            file.seek(self.start + start)
            return file.read(min(count, self.size - start))


AnyDocument = Document | FileDocument


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
    """Training and held-out documents, each sorted by name."""

    train: tuple[AnyDocument, ...]
    held_out: tuple[AnyDocument, ...]

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
        def describe(part: tuple[AnyDocument, ...]) -> str:
            return f"{len(part)} documents, {sum(d.size for d in part) / 1e6:.2f} MB"

        return f"train {describe(self.train)}; held out {describe(self.held_out)}"


def load_corpus(source: str = "stdlib", held_out_fraction: float = 0.05, in_memory: bool = True) -> Corpus:
    """Reads `source` ("stdlib", a folder of text files or one text file) and holds out a fraction of its bytes.

    Empty documents, binary files (with a zero byte), hidden files and exact copies of an earlier document are left out.

    Args:
        in_memory: hold the text; otherwise names and places only, and documents are read when they are asked for.

    Raises:
        FileNotFoundError: `source` is neither "stdlib" nor an existing path.
        ValueError: fewer than two documents are left, so that nothing can be held out.
    """
    documents = _without_copies(_read(source))
    if len(documents) < 2:
        raise ValueError(
            f"data.source={source!r}: found {len(documents)} text documents, at least 2 are needed (one to hold out); "
            "give 'stdlib', a folder with text files, or a text file of several lines"
        )
    if in_memory:
        return split([Document(document.name, document.text) for document in documents], held_out_fraction)
    return split(documents, held_out_fraction)


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


def _read(source: str) -> list[FileDocument]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not STDLIB_SKIPS & set(p.relative_to(root).parts[:-1])]
        return _read_files(root, paths)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _read_files(path, list(path.rglob("*")))
    if path.is_file():
        return _cut(path)
    what = "neither a file nor a folder" if path.exists() else "no such file or folder"
    raise FileNotFoundError(f"data.source={source!r}: {what}; allowed are 'stdlib' and existing paths")


def _read_files(root: Path, paths: list[Path]) -> list[FileDocument]:
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    visible = [(name, path) for name, path in named if not any(part.startswith(".") for part in name.split("/"))]
    stats = [path.stat() for _, path in visible]
    return [FileDocument(*pair, 0, stat.st_size, stat.st_mtime_ns) for pair, stat in zip(visible, stats)]


def _cut(path: Path) -> list[FileDocument]:
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    if not size:
        return []
    piece, starts = min(PIECE_BYTES, size // 20 + 1), [0]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while starts[-1] < size:
            starts.append(text.find(b"\n", starts[-1] + piece - 1) + 1 or size)
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
