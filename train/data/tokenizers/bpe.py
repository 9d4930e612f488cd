"""Byte pairs: the 256 bytes, then the commonest pair of tokens merged into a new one, again and again (Sennrich 2016).

    tokens   0 .. 255 bytes · 256 .. bos - 1 merges in the order they were learnt · special tokens

Training, merging and the cut into words are those of the `tokenizers` library (the regular expression of GPT-2). It
reads text only, so bytes that are no UTF-8 are left out of the words and become byte tokens: any bytes come back
exactly. Its files are those that the library reads, so that others can read them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from .base import Tokenizer
from .files import BYTE_OF, BYTES, CONFIG, FILE, SPELLING, config, library, written
from .special import COUNT, STRINGS

CHUNK = 1 << 20  # bytes that the library gets at once, so that its memory stays small
NOT_UTF8 = re.compile("[\udc80-\udcff]+")


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
        self._library = library().from_str(contents)
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
        return {FILE: self._contents, CONFIG: config()}

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
    tokenizer = library()
    from tokenizers import models, pre_tokenizers, trainers

    learner = tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_texts(documents), trainer)
    merges = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    spelt = list(dict.fromkeys([*SPELLING, *map("".join, merges)]))
    if len(spelt) < room:
        raise ValueError(f"vocab_size={vocab_size}: the documents have pairs for {len(spelt) + COUNT} tokens only")
    return BPETokenizer(written({token: i for i, token in enumerate(spelt)}, merges, words=True))


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
