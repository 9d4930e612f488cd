"""What a tokenizer is: ids of bytes and back, and special tokens that no bytes can spell.

decode_bytes(encode_bytes(data)) = data            for any bytes, valid UTF-8 or not, where it is `exact`
encode(text, special=True)                         special strings in the text become their ids

Some put a blank before a text, as if a word came before it (`lead`). Decoding takes it away where a text begins, and
leaves what stands there where one goes on (`continues`).
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
    """Text and special tokens; in ours COUNT special ids (some are reserved) end the vocabulary, from bos on."""

    name: str  # as in data.tokenizer
    digest: str  # of everything that decides how a text is encoded
    vocab_size: int  # the highest id and one
    exact = True  # any bytes come back, and the bytes of a text's tokens are those of the text
    lead = b""  # what encoding puts before a text
    leads_again = False  # and behind every special token

    @abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """The tokens of any bytes; never a special one."""

    @cached_property
    @abstractmethod
    def pieces(self) -> tuple[bytes, ...]:
        """What each id stands for, nothing for special tokens; ids from its end on stand for nothing either."""

    def spell(self, data: bytes) -> list[int]:
        """Tokens whose bytes are exactly these, wherever in a text they stand; where the vocabulary has none for some
        of them, those of the bytes before.
        """
        return self.encode_bytes(data)

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[list[int]]:
        """The tokens of a document that comes in pieces."""
        return map(self.encode_bytes, chunks)

    def count_chunks(self, chunks: Iterable[bytes]) -> Iterator[list[int]]:
        """How many of the document's bytes each of these tokens is made of."""
        return ([len(self.token_bytes(token)) for token in ids] for ids in self.encode_chunks(chunks))

    def files(self) -> dict[str, str]:
        """What is kept of it, by file name."""
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
    def least(self) -> int:
        """Rows that a model needs to be trained on text: for its tokens and bos."""
        return max(len(self.pieces), self.bos + 1)

    @property
    def bos(self) -> int:
        """Opens a document."""
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

    def decode_bytes(self, ids: Iterable[int], special: bool = False, continues: bool = False) -> bytes:
        """The bytes of tokens; special tokens are left out, or with `special` written as their strings.

        `continues`: they follow on text, and the lead of their first one is part of it.
        """
        return b"".join(self._written(ids, special, continues))

    def decode(self, ids: Iterable[int], special: bool = False, continues: bool = False) -> str:
        """The text of tokens, as `decode_bytes`; what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, special, continues).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int], special: bool = False, continues: bool = False) -> Iterator[str]:
        """`decode`, a piece for each token as it comes and one for the end; a character waits for its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in self._written(ids, special, continues):
            yield decoder.decode(piece)
        yield decoder.decode(b"", final=True)

    def _written(self, ids: Iterable[int], special: bool, continues: bool) -> Iterator[bytes]:
        begins = not continues
        for token in ids:
            piece = self.token_bytes(token)
            if piece:
                yield piece.removeprefix(self.lead) if begins else piece
                begins = False
            else:
                string = self._strings.get(token, b"")
                yield string if special else b""
                begins = (self.leads_again and bool(string)) or (begins and not (string and special))

    @cached_property
    def _strings(self) -> dict[int, bytes]:
        return {token: string.encode() for string, token in self.special.items()}

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
