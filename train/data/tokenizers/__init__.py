"""Tokenizers of the toys: bytes, or byte pairs trained on the corpus; exact for any bytes, with V4's special tokens.

tokenizer = load_tokenizer("bytes")             or a folder / tokenizer.json of a trained one
ids = [tokenizer.bos, *tokenizer.encode("def f():")]
"""

import os
from pathlib import Path

from .base import Tokenizer
from .bpe import BPETokenizer, read_bpe, train_bpe
from .byte import BOS, ByteTokenizer
from .canonical import canonical_ids
from .special import COUNT as SPECIAL_TOKENS

__all__ = [
    "BOS",
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "ByteTokenizer",
    "Tokenizer",
    "bpe_size",
    "canonical_ids",
    "load_tokenizer",
    "read_bpe",
    "train_bpe",
]


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer that "bytes", a tokenizer.json, or a folder with one means.

    Raises:
        FileNotFoundError: another name, and no such path.
        ValueError: the file is not one of ours.
        ModuleNotFoundError: the `tokenizers` library is needed and not installed.
    """
    return ByteTokenizer() if str(name_or_path) == "bytes" else read_bpe(Path(os.path.expanduser(name_or_path)))


def bpe_size(name: str) -> int | None:
    """The vocabulary that `bpe:N` asks for, None for another name. Raises ValueError where N is no size."""
    kind, colon, size = name.partition(":")
    if (kind, colon) != ("bpe", ":"):
        return None
    if not size.isdecimal() or int(size) <= 256 + SPECIAL_TOKENS:
        raise ValueError(f"tokenizer={name!r}: allowed after 'bpe:' is a size above {256 + SPECIAL_TOKENS}")
    return int(size)
