"""Tokenizers of the toys: bytes, or byte pairs trained on the corpus; exact for any bytes, with V4's special tokens.

tokenizer = load_tokenizer("bytes")             or a folder / tokenizer.json of a trained one
ids = [tokenizer.bos, *tokenizer.encode("def f():")]
"""

from .base import Tokenizer
from .byte import ByteTokenizer
from .special import COUNT as SPECIAL_TOKENS

__all__ = ["SPECIAL_TOKENS", "ByteTokenizer", "Tokenizer", "load_tokenizer"]


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer that a name means: "bytes".

    Raises:
        ValueError: another name.
    """
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    raise ValueError(f"tokenizer={str(name_or_path)!r}: allowed is 'bytes'")
