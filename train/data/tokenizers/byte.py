"""Bytes as tokens: 0 to 255 are bytes, 256 bos, 257 eos, 258 pad, then V4's other special strings; 288 in all."""

import json
from functools import cached_property

from .base import Tokenizer
from .files import CONFIG, FILE, SPELLING, config, written
from .special import COUNT, special_ids

BOS = 256
_VOCABULARY = {character: byte for byte, character in enumerate(SPELLING)}


class ByteTokenizer(Tokenizer):
    """One token for each byte. Its files are for other programs: nothing here needs them."""

    name = "bytes"
    digest = "bytes"
    vocab_size = 256 + COUNT

    def encode_bytes(self, data: bytes) -> list[int]:
        return list(data)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        return tuple(bytes([byte]) for byte in range(256))

    def files(self) -> dict[str, str]:
        return {FILE: written(_VOCABULARY, [], words=False), CONFIG: config()}


def is_bytes(contents: str) -> bool:
    """Whether a tokenizer.json is of bytes, with our special tokens in our order."""
    try:
        read = json.loads(contents)
        special = {token["content"]: token["id"] for token in read["added_tokens"]}
        return (read["model"]["vocab"], read["model"]["merges"], special) == (_VOCABULARY, [], special_ids(BOS))
    except (ValueError, KeyError, TypeError):
        return False
