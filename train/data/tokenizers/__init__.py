"""Tokenizers: bytes, byte pairs trained on the corpus, or any of the `tokenizers` library.

tokenizer = load_tokenizer("bytes")             or a folder / tokenizer.json of another one
ids = [tokenizer.bos, *tokenizer.encode("def f():")]

The first two are exact for any bytes and have V4's special tokens; others have what their files say.
"""

import os
from contextlib import suppress
from pathlib import Path

from .base import Tokenizer
from .bpe import BPETokenizer, train_bpe
from .byte import BOS, ByteTokenizer, is_bytes
from .canonical import canonical_ids
from .files import FILE
from .library import BESIDE, LibraryTokenizer
from .special import COUNT as SPECIAL_TOKENS
from .special import STRINGS

__all__ = [
    "BOS",
    "FILE",
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "ByteTokenizer",
    "LibraryTokenizer",
    "Tokenizer",
    "bpe_size",
    "canonical_ids",
    "load_tokenizer",
    "train_bpe",
]


MOST = 10_000_000  # tokens of a vocabulary that is trained


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer that "bytes", a tokenizer.json, or a folder with one means; files beside it are read too.

    Raises:
        FileNotFoundError: another name, and no such path.
        ValueError: no tokenizer can be made of the file.
        ModuleNotFoundError: the `tokenizers` library is needed and not installed.
    """
    name = str(name_or_path)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    path = Path(os.path.expanduser(name))
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer={name!r}: no such file, and no folder with {FILE} in it")
    contents = file.read_text("utf-8")
    if STRINGS[-1] in contents:  # it may be one of ours
        with suppress(ValueError):
            return ByteTokenizer() if is_bytes(contents) else BPETokenizer(contents, name)
    beside = [file.with_name(other) for other in BESIDE]
    return LibraryTokenizer({FILE: contents, **{f.name: f.read_text("utf-8") for f in beside if f.is_file()}}, name)


def bpe_size(name: str) -> int | None:
    """The vocabulary that `bpe:N` asks for, None for another name. Raises ValueError where N is no size."""
    kind, colon, size = name.partition(":")
    if (kind, colon) != ("bpe", ":"):
        return None
    least = 256 + SPECIAL_TOKENS
    if not size.isdecimal() or not least < int(size) <= MOST:
        raise ValueError(f"tokenizer={name!r}: allowed after 'bpe:' is a size above {least}, up to {MOST:,}")
    return int(size)
