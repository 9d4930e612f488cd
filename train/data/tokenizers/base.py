"""What a tokenizer is: ids of bytes and back, exactly, and special tokens that no bytes can spell.

decode_bytes(encode_bytes(data)) = data            for any bytes, valid UTF-8 or not
encode(text, special=True)                         special strings in the text become their ids
"""

import codecs
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from .special import BOS, COUNT, EOS, PAD, special_ids


class Tokenizer(ABC):
    """Tokens 0 .. bos - 1 stand for bytes; from bos on, COUNT special ids end the vocabulary (some are reserved)."""

    name: str  # as in data.tokenizer
    digest: str  # of everything that decides how a text is encoded
    vocab_size: int

    @abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """The tokens of any bytes; never a special one."""

    @cached_property
    @abstractmethod
    def pieces(self) -> tuple[bytes, ...]:
        """What each token that is not special stands for."""

    def files(self) -> dict[str, str]:
        """What is kept of it, by file name: nothing, unless it was trained."""
        return {}

    def save(self, folder: Path) -> None:
        """Writes its files, each whole or not at all; `load_tokenizer(folder)` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            writing = folder / f".{name}.{os.getpid()}"
            writing.write_text(text, "utf-8")
            os.replace(writing, folder / name)

    @cached_property
    def special(self) -> dict[str, int]:
        """Special strings and their ids."""
        return special_ids(self.vocab_size - COUNT)

    @property
    def bos(self) -> int:
        return self.special[BOS]

    @property
    def eos(self) -> int:
        return self.special[EOS]

    @property
    def pad(self) -> int:
        return self.special[PAD]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text, without bos; with `special`, special strings in it become their one token.

        Raises UnicodeEncodeError for half a surrogate pair, which UTF-8 has no bytes for.
        """
        if not special:
            return self.encode_bytes(text.encode())
        ids: list[int] = []
        for i, part in enumerate(self._any_special.split(text)):
            ids += [self.special[part]] if i % 2 else self.encode_bytes(part.encode())
        return ids

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for; nothing for special tokens and for ids past the vocabulary, which a model with
        more rows than its tokenizer may write. Raises ValueError below 0.
        """
        if token < 0:
            raise ValueError(f"token={token}: allowed are 0 and more")
        return self.pieces[token] if token < len(self.pieces) else b""

    def decode_bytes(self, ids: Iterable[int], special: bool = False) -> bytes:
        """The bytes of tokens; special tokens are left out, or with `special` written as their strings."""
        return b"".join(self._written(token, special) for token in ids)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD. Special tokens as in `decode_bytes`."""
        return self.decode_bytes(ids, special).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """`decode`, a piece for each token as it comes and one for the end; a character waits for its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(self._written(token, special))
        yield decoder.decode(b"", final=True)

    def _written(self, token: int, special: bool) -> bytes:
        return self._strings.get(token, b"") if special and token >= self.bos else self.token_bytes(token)

    @cached_property
    def _strings(self) -> dict[int, bytes]:
        return {token: string.encode() for string, token in self.special.items()}

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
