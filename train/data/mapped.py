"""A tokenised corpus in files that are mapped into memory: written once, read where a batch needs them.

    CACHE/tokens/KEY/train.tokens  held_out.tokens       uint16 (uint32 above 65,536 tokens): bos d0 d0 bos d1 d1 d1 ...
                     train.starts  held_out.starts       int64 [documents + 1]: where each begins, and the end
                                   held_out.bytes        uint32: how many each token is made of, where none can say
                     contents.json                       what KEY stands for: corpus and tokenizer; files and digests
    CACHE/tokenizers/KEY/tokenizer.json ...              a tokenizer trained on a corpus's training documents
    CACHE/overlap/KEY/copied.npy                         which held-out bytes training text has as well (`overlap.py`)

A folder is written under another name, flushed to the disk, and renamed when it is whole: a process that is killed
leaves none that looks finished, and of several that write the same one, the first to finish wins. Its writer locks it
meanwhile, so that whoever writes next knows which are left by the dead, and removes them. Files are read against their
digests; a folder in which one does not fit is written anew.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...model.disk import flush, lock, naming
from ...model.folders import read_json
from .corpus import CHUNK, AnyDocument, Corpus
from .tokenizers import FILE, BPETokenizer, Tokenizer, train_bpe

CACHE = "ABYSSAL_CACHE"  # the environment variable that says where the cache is
CONTENTS = "contents.json"
_LEFT = re.compile(r"\.[0-9a-f]{32}\..+")


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of documents in order, each document behind its bos. len() counts documents."""

    tokens: np.ndarray  # mapped, read-only
    starts: np.ndarray  # int64 [documents + 1]
    bos: int
    sizes: np.ndarray | None = None  # bytes of each token's text, where its own do not say

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, eq=False)
class Tokenised:
    """A corpus's training and held-out documents as tokens."""

    train: TokenFile
    held_out: TokenFile


def cache_folder() -> Path:
    """$ABYSSAL_CACHE, else abyssal in $XDG_CACHE_HOME, else ~/.cache/abyssal."""
    chosen = os.environ.get(CACHE)
    folder = Path(os.path.expanduser(chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if str(folder).startswith("~"):
        raise FileNotFoundError(errno.ENOENT, f"no such home; the environment variable {CACHE} names a folder", folder)
    return folder if chosen else folder / "abyssal"


def tokenised(corpus: Corpus, tokenizer: Tokenizer) -> Tokenised:
    """The corpus as tokens, from the cache, or written into it first."""
    contents = {"corpus": corpus.digest, "tokenizer": tokenizer.digest}

    def write(folder: Path) -> None:
        for part in ("train", "held_out"):
            _write_tokens(folder, part, getattr(corpus, part), tokenizer)
        if not tokenizer.exact:
            _write_sizes(folder, "held_out", corpus.held_out, tokenizer)

    folder = cached("tokens", contents, write)
    return Tokenised(_map(folder, "train", tokenizer), _map(folder, "held_out", tokenizer))


def trained_tokenizer(corpus: Corpus, vocab_size: int) -> BPETokenizer:
    """BPE of the corpus's training documents, from the cache, or trained first.

    Raises:
        ValueError: a size that is too small, or too large for the documents.
        ModuleNotFoundError: the `tokenizers` library is not installed.
    """
    contents = {"corpus": corpus.digest, "vocabulary": str(vocab_size)}
    chunks = (chunk for document in corpus.train for chunk in document.chunks(CHUNK))
    folder = cached("tokenizers", contents, lambda folder: train_bpe(chunks, vocab_size).save(folder))
    return BPETokenizer((folder / FILE).read_text("utf-8"), f"bpe:{vocab_size}")


def cached(kind: str, contents: dict[str, str], write: Callable[[Path], object]) -> Path:
    """The cache's folder of these contents, which `write` fills if it is not there."""
    parent = cache_folder() / kind
    key = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:32]
    folder = parent / key
    _sweep(parent)
    if _fits(folder, contents):
        return folder
    try:
        with naming(parent), _writing(parent, key) as writing:
            write(writing)
            files = {path.name: _digest(path) for path in writing.iterdir()}
            (writing / CONTENTS).write_text(json.dumps({**contents, "files": files}, indent=1) + "\n", "utf-8")
            for path in (*writing.iterdir(), writing):
                flush(path)
            if not _fits(folder, contents):
                _rename(writing, folder)
    except OSError as error:
        error.add_note(f"the environment variable {CACHE} says where tokens are kept")
        raise
    return folder


def _fits(folder: Path, contents: dict[str, str]) -> bool:
    """Whether the folder has these contents, every file as it was written."""
    try:
        listed = read_json(folder / CONTENTS)
        files = dict(listed.pop("files"))
        return listed == contents and all(_digest(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(parent: Path, key: str) -> Iterator[Path]:
    """A new folder to write to, locked by this process; what is still there in the end is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    held = None
    while held is None:
        folder = parent / f".{key}.{secrets.token_hex(8)}"
        folder.mkdir()
        with suppress(FileNotFoundError):  # in this moment it looks like one of the dead
            held = lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _sweep(parent: Path) -> None:
    """Removes what writers have left that were killed: nobody locks it."""
    for left in parent.glob(".*"):
        with suppress(OSError):
            held = lock(left) if _LEFT.fullmatch(left.name) and not left.is_symlink() else None
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)


def _rename(writing: Path, folder: Path) -> None:
    """Gives what is written its name; a broken folder of that name makes way."""
    broken = writing.with_name(f"{writing.name}.broken")
    if folder.exists():
        os.rename(folder, broken)
    try:
        os.rename(writing, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    shutil.rmtree(broken, ignore_errors=True)


def _write_tokens(folder: Path, part: str, documents: Sequence[AnyDocument], tokenizer: Tokenizer) -> None:
    kind, starts = _dtype(tokenizer), [0]
    with (folder / f"{part}.tokens").open("wb") as file:
        for document in documents:
            count = file.write(np.array([tokenizer.bos], kind).tobytes())
            for ids in tokenizer.encode_chunks(document.chunks(CHUNK)):
                count += file.write(np.array(ids, kind).tobytes())
            starts.append(starts[-1] + count // kind.itemsize)
    (folder / f"{part}.starts").write_bytes(np.array(starts, np.int64).tobytes())


def _write_sizes(folder: Path, part: str, documents: Sequence[AnyDocument], tokenizer: Tokenizer) -> None:
    """Each token's bytes, 0 for bos; all of a document's are counted, if need be for the token that is its last."""
    with (folder / f"{part}.bytes").open("wb") as file:
        for document in documents:
            counted = tokenizer.count_chunks(document.chunks(CHUNK))
            sizes = np.concatenate([np.zeros(1, np.uint32), *(np.array(each, np.uint32) for each in counted)])
            sizes[-1] += document.size - int(sizes.sum(dtype=np.int64))
            file.write(sizes.tobytes())


def _map(folder: Path, part: str, tokenizer: Tokenizer) -> TokenFile:
    tokens = np.memmap(folder / f"{part}.tokens", _dtype(tokenizer), mode="r")
    sizes = folder / f"{part}.bytes"
    counted = np.fromfile(sizes, np.uint32) if sizes.is_file() else None
    return TokenFile(tokens, np.fromfile(folder / f"{part}.starts", np.int64), tokenizer.bos, counted)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
