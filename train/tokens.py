"""Tokens of the byte-level models: 0 to 255 are bytes, 256 (bos) opens every document."""

import codecs
from collections.abc import Iterable, Iterator

BOS = 256
VOCABULARY = 257  # what a model's vocabulary needs at least


def encode(text: str) -> list[int]:
    """A document's first tokens: bos, then the text's bytes (UTF-8)."""
    return [BOS, *text.encode()]


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """The text of byte tokens, piece by piece as they come; other tokens are left out, invalid UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(bytes([token])) if token < BOS else ""
    yield decoder.decode(b"", final=True)


def decode(tokens: Iterable[int]) -> str:
    """The whole text of byte tokens, as `decode_stream` gives it."""
    return "".join(decode_stream(tokens))
