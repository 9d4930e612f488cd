"""The corpus: documents of bytes, split into training and held-out documents by name alone.

The default needs no download: the source files of the Python standard library (about 500 documents, 9 MB). A path to a
folder (one document per text file) or to one text file (cut at line ends) works the same way. The split depends only on
the documents' names and lengths, never on a seed, so that runs with different seeds are held against the same bytes.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STDLIB_SKIPS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_SKIPS |= {"encodings"}  # generated tables, near copies of one another: a held-out one is known from its siblings
PIECE_BYTES = 16 * 1024  # a single file is cut into documents of about this size
FULL_ENOUGH = 0.95  # the search for held-out documents ends at this share of the bytes asked for


@dataclass(frozen=True)
class Document:
    name: str
    text: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out documents, each sorted by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all names and contents: two runs with the same digest saw the same corpus, split the same way."""
        sha = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                sha.update(f"{document.name}\0{len(document.text)}\0".encode())
                sha.update(document.text)
            sha.update(b"\1")
        return sha.hexdigest()

    def __str__(self) -> str:
        def describe(part: tuple[Document, ...]) -> str:
            return f"{len(part)} documents, {sum(len(d.text) for d in part) / 1e6:.2f} MB"

        return f"train {describe(self.train)}; held out {describe(self.held_out)}"


def load_corpus(source: str = "stdlib", held_out_fraction: float = 0.05) -> Corpus:
    """Reads `source` ("stdlib", a folder of text files or one text file) and holds out a fraction of its bytes.

    Empty documents, binary files (with a zero byte), hidden files and exact copies of an earlier document are left out.

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
    return split(documents, held_out_fraction)


def split(documents: list[Document], held_out_fraction: float) -> Corpus:
    """Holds out whole documents in the order of a hash of their names, as long as they fit into the bytes asked for."""
    budget = held_out_fraction * sum(len(d.text) for d in documents)
    chosen: set[str] = set()
    filled = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        if filled + len(document.text) <= budget:
            chosen.add(document.name)
            filled += len(document.text)
        if filled >= FULL_ENOUGH * budget:
            break
    if not chosen:
        chosen.add(min(documents, key=lambda d: (len(d.text), d.name)).name)
    ordered = sorted(documents, key=lambda d: d.name)
    return Corpus(tuple(d for d in ordered if d.name not in chosen), tuple(d for d in ordered if d.name in chosen))


def _read(source: str) -> list[Document]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in root.rglob("*.py") if not STDLIB_SKIPS & set(p.relative_to(root).parts[:-1])]
        return _read_files(root, paths)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_files(path, list(path.rglob("*")))
    if path.is_file():
        return _cut(path.name, path.read_bytes())
    raise FileNotFoundError(f"data.source={source!r}: no such file or folder; allowed are 'stdlib' and existing paths")


def _read_files(root: Path, paths: list[Path]) -> list[Document]:
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    visible = [(name, path) for name, path in named if not any(part.startswith(".") for part in name.split("/"))]
    return [Document(name, path.read_bytes()) for name, path in visible]


def _cut(name: str, text: bytes) -> list[Document]:
    size = min(PIECE_BYTES, len(text) // 20 + 1)
    pieces: list[bytes] = []
    start = 0
    while start < len(text):
        line_end = text.find(b"\n", start + size - 1) + 1
        stop = line_end or len(text)
        pieces.append(text[start:stop])
        start = stop
    return [Document(f"{name}:{i:06d}", piece) for i, piece in enumerate(pieces)]


def _without_copies(documents: list[Document]) -> list[Document]:
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        if document.text and b"\0" not in document.text and document.text not in seen:
            seen.add(document.text)
            kept.append(document)
    return kept
