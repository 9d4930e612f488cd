"""Tokens of the byte-level models: 0 to 255 are bytes, 256 (bos) opens every document."""

from collections.abc import Iterable

BOS = 256
VOCABULARY = 257  # what a model's vocabulary needs at least


def encode(text: str) -> list[int]:
    """A document's first tokens: bos, then the text's bytes (UTF-8)."""
    return [BOS, *text.encode()]


def decode(tokens: Iterable[int]) -> str:
    """The text of the byte tokens; other tokens are left out, and bytes that are no UTF-8 become U+FFFD."""
    return bytes(token for token in tokens if token < BOS).decode("utf-8", errors="replace")
