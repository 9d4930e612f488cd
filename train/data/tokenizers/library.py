"""Any tokenizer of the `tokenizers` library, from its tokenizer.json and what lies beside it (see `layout`).

Bytes that are no UTF-8 come back exactly where each of the 256 has a token; elsewhere each becomes U+FFFD, as does a
character that the vocabulary lacks. What else is lost: what a normaliser takes away (BERT's case, accents, the spacing
around signs; T5's forms that NFKC calls the same; Qwen's that NFC does), a blank at the very start where one would be
put there, and text that spells the token of a byte.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from . import layout
from .base import Tokenizer
from .files import CONFIG, FILE, library
from .special import BOS, EOS, PAD, STRINGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

MAP = "special_tokens_map.json"
BESIDE = (CONFIG, MAP, "chat_template.jinja")
# what each is called in the files, and what it most often is where they do not say
ROLES = {
    "bos": (("bos_token", "cls_token"), (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")),
    "eos": (("eos_token", "sep_token"), (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")),
    "pad": (("pad_token",), (PAD, "<pad>", "<|pad|>", "[PAD]")),
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
ESCAPED = "\udc80-\udcff"  # bytes that are no UTF-8, as Python has them in a text
PARTS, ESCAPE = re.compile(f"[{ESCAPED}]+|[^{ESCAPED}]+"), re.compile(f"[{ESCAPED}]")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of others. Its special tokens are those that its files call so, and the strings of our chat format.

    One without bos (GPT-2, Qwen) has its eos between documents: `bos`, which opens each, is then the same token. The
    token of what the vocabulary lacks is special too, but stands for U+FFFD.

    Args:
        files: tokenizer.json, and those of `BESIDE` that there are.
        name: as in data.tokenizer.

    Raises:
        ValueError: no such file, a decoder that is not known, ids with gaps, or neither bos nor eos.
        ModuleNotFoundError: the `tokenizers` library is not installed.
    """

    exact = False

    def __init__(self, files: Mapping[str, str], name: str) -> None:
        self.name, self._files = name, dict(files)
        read, config = self._json(FILE), self._json(CONFIG)
        try:
            self._added = layout.added_tokens(read, config)
            ids = {**layout.model_tokens(read), **{string: entry["id"] for string, entry in self._added.items()}}
            self._roles = self._find_roles(ids)
            self._special = self._find_special(read, config, ids)
            self._pieces = layout.pieces(read, ids, self._added, self._special)
            self._lead, self._bytes = layout.lead(read), layout.byte_tokens(read, ids)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"tokenizer={name!r}: no file of the tokenizers library: {error!r}") from None
        except ValueError as error:
            raise ValueError(f"tokenizer={name!r}: {error}") from None
        self.vocab_size = len(self._pieces)
        self.lead, self.leads_again = self._lead.text, self._lead.again
        decides = json.dumps([self._files[FILE], self._roles, self._special])
        self.digest = hashlib.sha256(decides.encode()).hexdigest()
        self._plain = self._open()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._files, self.name)

    @cached_property
    def pieces(self) -> tuple[bytes, ...]:
        return self._pieces

    @cached_property
    def special(self) -> dict[str, int]:
        return self._special

    @property
    def bos(self) -> int:
        return self._roles["bos"]

    @property
    def eos(self) -> int:
        return self._roles["eos"]

    @property
    def pad(self) -> int:
        return self._roles["pad"]

    def files(self) -> dict[str, str]:
        return dict(self._files)

    def encode(self, text: str, special: bool = False) -> list[int]:
        plain = text.encode()  # half a surrogate pair is an error
        return _tokens(self._aware, text) if special else self.encode_bytes(plain)

    def encode_bytes(self, data: bytes) -> list[int]:
        return [token for ids in self.encode_chunks([data]) for token in ids]

    def spell(self, data: bytes) -> list[int]:
        ids = [token for part in self._parts([data]) for token in self._part(part, self._within)]
        return ids if b"".join(map(self.token_bytes, ids)) == data else self._longest_first(data)

    def encode_chunks(self, chunks: Iterable[bytes]) -> Iterator[list[int]]:
        opened = self._plain
        for part in self._parts(chunks):
            yield self._part(part, opened)
            opened = self._within

    def count_chunks(self, chunks: Iterable[bytes]) -> Iterator[list[int]]:
        """What lies between two tokens counts for the later one, and what is behind the last one for that."""
        opened, left = self._plain, 0
        for part in self._parts(chunks):
            sizes = widths = _widths(part)
            if not self._is_bytes(part):
                text = ESCAPE.sub(layout.UNKNOWN, part)
                ends = [end for _, end in opened.encode(text, add_special_tokens=False).offsets]
                sizes = np.diff(np.append(0, np.cumsum(widths))[np.maximum.accumulate(np.array(ends, int))], prepend=0)
            rest = int(widths.sum() - sizes.sum())
            if len(sizes):
                sizes[0] += left
                sizes[-1] += rest
            left = 0 if len(sizes) else left + rest
            yield sizes.tolist()
            opened = self._within

    def _parts(self, chunks: Iterable[bytes]) -> Iterator[str]:
        """The chunks as text, with Python's escapes for bytes that are none: apart from it, where bytes have tokens."""
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        for chunk in chain(chunks, [None]):
            text = decoder.decode(chunk or b"", final=chunk is None)
            yield from PARTS.findall(text) if self._bytes else filter(None, [text])

    def _is_bytes(self, part: str) -> bool:
        return bool(self._bytes) and ESCAPE.match(part) is not None

    def _part(self, part: str, opened: "Library") -> list[int]:
        if self._is_bytes(part):
            return [self._bytes[byte] for byte in part.encode("utf-8", "surrogateescape")]
        return _tokens(opened, ESCAPE.sub(layout.UNKNOWN, part))

    def _longest_first(self, data: bytes) -> list[int]:
        """Tokens that spell the data, each the longest that there is."""
        ids, start = [], 0
        while start < len(data):
            stops = range(min(start + self._longest, len(data)), start, -1)
            stop = next((stop for stop in stops if data[start:stop] in self._token_of), None)
            if stop is None:
                break
            ids.append(self._token_of[data[start:stop]])
            start = stop
        return ids

    @cached_property
    def _token_of(self) -> dict[bytes, int]:
        special = {*self._special.values()}
        spelt = [(piece, token) for token, piece in enumerate(self._pieces) if piece and token not in special]
        return dict(reversed(spelt))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._token_of), default=0)

    @cached_property
    def _within(self) -> "Library":
        """The library's tokenizer of text that goes on."""
        return self._open(lead=False) if self._lead.optional else self._plain

    @cached_property
    def _aware(self) -> "Library":
        """The library's tokenizer, looking for special tokens."""
        return self._open(special=True)

    def _open(self, special: bool = False, lead: bool = True) -> "Library":
        make = library().from_str
        read = {**self._json(FILE), **dict.fromkeys(("truncation", "padding", "post_processor"))}
        read["model"] = {**read["model"], "dropout": None}  # which would draw another spelling each time
        names: dict[str, str] = {}
        if not special:
            read["model"], names = layout.hide(read["model"], self._special)
        if not lead:
            read |= {part: layout.without_lead(read.get(part)) for part in ("normalizer", "pre_tokenizer")}
        entries = sorted(self._added.items(), key=lambda each: each[1]["id"])
        read["added_tokens"] = [
            {**FLAGS, **entry, "content": names.get(string, string), "special": string in self._special}
            for string, entry in entries
        ]
        try:
            opened = make(json.dumps(read))
        except BaseException as error:  # the library has no kind of its own, and panics beside Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tokenizer={self.name!r}: {error}") from None
        for string, token in ((entry["content"], entry["id"]) for entry in read["added_tokens"]):
            if opened.token_to_id(string) != token:
                raise ValueError(f"tokenizer={self.name!r}: id {token} of {string!r} is not the next one")
        opened.encode_special_tokens = not special
        return opened

    def _json(self, name: str) -> dict[str, Any]:
        try:
            read = json.loads(self._files.get(name, "{}"))
        except ValueError as error:
            raise ValueError(f"tokenizer={self.name!r}: {name} is no JSON: {error}") from None
        if not isinstance(read, dict):
            raise ValueError(f"tokenizer={self.name!r}: {name} is no table")
        return read

    def _find_roles(self, ids: Mapping[str, int]) -> dict[str, int]:
        """The ids of bos, eos and pad."""
        configs = [self._json(CONFIG), self._json(MAP)]
        found = {role: _find_role(*names, configs, ids) for role, names in ROLES.items()}
        eos = found["bos"] if found["eos"] is None else found["eos"]
        if eos is None:
            raise ValueError(
                f"neither bos nor eos is known: {CONFIG} must name one of its tokens as bos_token or eos_token, which"
                " is to stand between documents"
            )
        return {role: eos if token is None else token for role, token in found.items()}

    def _find_special(self, read: layout.Read, config: layout.Read, ids: Mapping[str, int]) -> dict[str, int]:
        """Special strings in the order of their ids; each is an added token from here on."""
        more = [config.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens")]
        listed = (token for part in more for token in (part.values() if isinstance(part, dict) else part))
        named = {*STRINGS, layout.unknown_token(read), *map(layout.string_of, listed)}
        named |= {string for string, entry in self._added.items() if entry.get("special")}
        roles = {*self._roles.values()}
        special = {string: token for string, token in ids.items() if string in named or token in roles}
        self._added |= {string: {"id": token} for string, token in special.items() if string not in self._added}
        return dict(sorted(special.items(), key=lambda each: each[1]))


def _find_role(
    keys: tuple[str, ...], common: tuple[str, ...], configs: list[dict[str, Any]], ids: Mapping[str, int]
) -> int | None:
    """The token of a role that the files name; a common name where they do not say that there is none."""
    for key, config in ((key, config) for key in keys for config in configs):
        if config.get(key) is not None:
            string = layout.string_of(config[key])
            if string not in ids:
                raise ValueError(f"{key}={string!r} of its files is none of its tokens")
            return ids[string]
    if any(keys[0] in config for config in configs):
        return None
    return next((ids[string] for string in common if string in ids), None)


def _tokens(opened: "Library", text: str) -> list[int]:
    return opened.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _widths(text: str) -> np.ndarray:
    """Bytes of each character of a text, one of each escape."""
    point = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    escape = (point >= 0xDC80) & (point <= 0xDCFF)
    return np.where(escape, 1, 1 + sum((point >= least).astype(int) for least in (0x80, 0x800, 0x10000)))
