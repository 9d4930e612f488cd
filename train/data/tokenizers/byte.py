"""Bytes as tokens: 0 to 255 are bytes, 256 bos, 257 eos, 258 pad, then V4's other special strings; 288 in all."""

from functools import cached_property

from .base import Tokenizer
from .special import COUNT

BOS = 256


class ByteTokenizer(Tokenizer):
    """One token for each byte."""

    name = "bytes"
    digest = "bytes"
    vocab_size = 256 + COUNT

    def encode_bytes(self, data: bytes) -> list[int]:
        return list(data)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        return tuple(bytes([byte]) for byte in range(256))
