"""Byte pairs: the 256 bytes, then the commonest pair of tokens merged into a new one, again and again (Sennrich 2016).

    tokens   0 .. 255 bytes · 256 .. bos - 1 merges in the order they were learnt · special tokens

Training, merging and the cut into words are those of the `tokenizers` library (the regular expression of GPT-2). It
reads text only, so bytes that are no UTF-8 are left out of the words and become byte tokens: any bytes come back
exactly. `tokenizer.json` is the library's own file, so that others can read it; `tokenizer_config.json` says which of
its special tokens open, end and pad.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Tokenizer
from .special import BOS, COUNT, EOS, PAD, STRINGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTES = 256
CHUNK = 1 << 20  # bytes that the library gets at once, so that its memory stays small
NOT_UTF8 = re.compile("[\udc80-\udcff]+")


def _spelling() -> list[str]:
    """The character by which the library's files spell each byte: itself if it prints, else one above 255."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(BYTES)]


SPELLING = _spelling()
BYTE_OF = {character: byte for byte, character in enumerate(SPELLING)}


class BPETokenizer(Tokenizer):
    """A trained vocabulary, from the contents of its tokenizer.json.

    Raises:
        ValueError: it is no byte-level BPE in our order of tokens.
        ModuleNotFoundError: the `tokenizers` library is not installed.
    """

    def __init__(self, contents: str, name: str = "bpe") -> None:
        self.name, self._contents = name, contents
        merges, self._spelt = _read(contents, name)
        self.vocab_size = len(self._spelt) + COUNT
        self.digest = hashlib.sha256(json.dumps(merges).encode()).hexdigest()
        self._library = _library().from_str(contents)
        self._library.encode_special_tokens = True  # special strings are text here; `encode` looks for them

    def encode_bytes(self, data: bytes) -> list[int]:
        ids: list[int] = []
        for chunk in _chunks(data):
            text, start = chunk.decode("utf-8", "surrogateescape"), 0
            for other in NOT_UTF8.finditer(text):
                ids += self._words(text[start : other.start()])
                ids += other[0].encode("utf-8", "surrogateescape")
                start = other.end()
            ids += self._words(text[start:])
        return ids

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        return tuple(bytes(BYTE_OF[character] for character in spelt) for spelt in self._spelt)

    def files(self) -> dict[str, str]:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
            "clean_up_tokenization_spaces": False,
        }
        return {FILE: self._contents, CONFIG: json.dumps(config, ensure_ascii=False, indent=1) + "\n"}

    def _words(self, text: str) -> list[int]:
        return self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids if text else []


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """Learns a vocabulary of `vocab_size` tokens, bytes and special ones included, from documents read once.

    Raises:
        ValueError: a size that leaves no room for merges, or documents too few for so many.
        ModuleNotFoundError: the `tokenizers` library is not installed.
    """
    room = vocab_size - COUNT
    if room <= BYTES:
        raise ValueError(f"vocab_size={vocab_size}: allowed is above {BYTES + COUNT}, bytes and special tokens")
    library = _words_only(_library())
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(_texts(documents), trainer)
    merges = [(first, second) for first, second in json.loads(library.to_str())["model"]["merges"]]
    spelt = list(dict.fromkeys([*SPELLING, *map("".join, merges)]))
    if len(spelt) < room:
        raise ValueError(f"vocab_size={vocab_size}: the documents have pairs for {len(spelt) + COUNT} tokens only")
    return BPETokenizer(_contents(spelt, merges))


def read_bpe(path: Path, name: str = "") -> BPETokenizer:
    """The tokenizer of a folder or of a tokenizer.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of ours.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer={str(path)!r}: no such file, and no folder with {FILE} in it")
    return BPETokenizer(file.read_text("utf-8"), name or str(path))


def _contents(spelt: list[str], merges: list[tuple[str, str]]) -> str:
    """tokenizer.json of our order of tokens."""
    from tokenizers import AddedToken, decoders, models

    vocabulary = {token: i for i, token in enumerate(spelt)}
    library = _words_only(_library(), models.BPE(vocab=vocabulary, merges=merges))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(string, special=True, normalized=False) for string in STRINGS])
    return library.to_str(pretty=True)


def _words_only(library: "type[Library]", model: Any = None) -> "Library":
    """A tokenizer of the library that cuts text into words and merges their bytes."""
    from tokenizers import models, pre_tokenizers

    made = library(model or models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return made


def _read(contents: str, name: str) -> tuple[list[Any], list[str]]:
    """Merges, and how the tokens before the special ones are spelt, of a tokenizer.json."""
    wrong = f"tokenizer={name!r}: no byte-level BPE whose tokens are bytes, merges and our special tokens in our order"
    try:
        read = json.loads(contents)
        vocabulary, merges = read["model"]["vocab"], read["model"]["merges"]
        spelt, special = sorted(vocabulary, key=vocabulary.get), read["added_tokens"]
        ids = [*(vocabulary[token] for token in spelt), *(token["id"] for token in special)]
        whole = (*spelt[:BYTES], *(token["content"] for token in special)) == (*SPELLING, *STRINGS)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(wrong) from None
    if not whole or ids != list(range(len(ids))) or not all(map(BYTE_OF.keys().__ge__, map(set, spelt))):
        raise ValueError(wrong)
    return merges, spelt


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    for document in documents:
        for chunk in _chunks(document):
            yield chunk.decode("utf-8", "ignore")


def _chunks(data: bytes) -> Iterator[bytes]:
    """The data in pieces of about CHUNK bytes, cut behind a line's end where there is one."""
    start = 0
    while len(data) - start > CHUNK:
        stop = data.rfind(b"\n", start, start + CHUNK) + 1 or start + CHUNK
        yield data[start:stop]
        start = stop
    yield data[start:]


def _library() -> "type[Library]":
    try:
        from tokenizers import Tokenizer as Library
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "trained tokenizers need the tokenizers library: pip install 'abyssal[text]'", name="tokenizers"
        ) from None
    return Library
