"""Tokenizer compression: token ids whose text differs in case, accents or spacing alone share one canonical id.

Engram hashes canonical ids, so that " The", "the" and "THE" address the same rows; V4.1's 129,280 ids make 99,092
classes. (Engram, arXiv 2601.07372, section 2.2 and appendix C.)
"""

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

REPLACEMENT = "\ufffd"  # what decoding leaves of a piece of a character
SPACES = re.compile(r"[ \t\r\n]+")
LONE_SPACE = "\ue000"  # keeps a space from being stripped
WHITESPACE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace() and not 0x1C <= c <= 0x1F)  # Unicode White_Space


def compress_vocabulary(texts: Sequence[str], tokens: Sequence[str] | None = None) -> tuple[Tensor, int]:
    """The canonical id of every token id, in order of first appearance, and the number of classes.

    Args:
        texts: what each id decodes to, alone and with special tokens kept.
        tokens: the tokenizer's own string of each id; it stands for an id that decodes to a piece of a character, so
            that such pieces keep apart. None: each such id is a class of its own.

    Returns:
        int64 `[len(texts)]`, and how many different values it holds.

    Raises:
        ValueError: `tokens` has another length than `texts`.
    """
    if tokens is not None and len(tokens) != len(texts):
        raise ValueError(f"tokens has {len(tokens)} entries: expected {len(texts)}, one for each text")
    classes: dict[str | int, int] = {}
    lookup = []
    for i, text in enumerate(texts):
        key: str | int = normalise(text) or text
        if REPLACEMENT in text:
            key = i if tokens is None else tokens[i]
        lookup.append(classes.setdefault(key, len(classes)))
    return torch.tensor(lookup, dtype=torch.int64), len(classes)


def normalise(text: str) -> str:
    """Without compatibility forms, accents, case and outer spaces; a text of nothing but spaces becomes one space."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    text = "".join(c.lower() for c in text)  # one by one: a sigma at the end of a word stays a plain sigma
    text = SPACES.sub(" ", text)
    text = LONE_SPACE if text == " " else text
    return text.strip(WHITESPACE).replace(LONE_SPACE, " ")
