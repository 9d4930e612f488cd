"""The part of the training text that a run has read, as a stream of bytes: what opponents get for equal data.

documents    bos d0 d0 d0 d0 d0 bos d1 d1 d1 bos d2 ...        in their own order
rows read          ------------            -------------       wherever an epoch's order had put them
stream       gap d0 d0 d0 bos d1 gap d1 bos d2 ...             each byte once, however often it was read
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .corpus import Corpus
from .kneser_ney import GAP
from .mapped import Tokenised
from .rows import row_spans, stream
from .tokenizers import BOS, Tokenizer


class Rows(NamedTuple):
    """Rows of one length that a stage of a run has read, by number, and the seed that shuffled them."""

    rows: range
    length: int
    stage: int
    seed: int


def seen(tokens: Corpus | Tokenised, tokenizer: Tokenizer, read: Iterable[Rows], most: int) -> np.ndarray:
    """uint16 stream of bytes, `most` at most, of the rows that were read first; GAP before what begins in a document.

    Raises:
        ValueError: the tokenizer is not exact, so that what its tokens spell is not the text.
    """
    if not tokenizer.exact:
        raise ValueError(f"data.tokenizer={tokenizer.name!r}: allowed are those whose tokens spell the text exactly")
    parts = [np.empty((0, 2), np.int64)]
    left = most
    for rows, length, stage, seed in read:
        rows = rows[: -(-left // length)]
        left -= len(rows) * length
        parts.append(row_spans(tokens, length, seed, rows, stage))
    text = stream(tokens.train, 1)
    spelt = _Spelling(tokenizer, text.bos)
    pieces = [spelt(text.tokens[start:stop]) for start, stop in merged(np.concatenate(parts)).tolist()]
    return np.concatenate([np.empty(0, np.uint16), *pieces])[:most]


def merged(spans: np.ndarray) -> np.ndarray:
    """Spans [n, 2] from and to, as few as cover the same places, sorted."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.flatnonzero(np.append(True, spans[1:, 0] > reach[:-1])[: len(spans)])
    last = np.append(first, len(spans))[1:] - 1
    return np.stack([spans[first, 0], reach[last]], 1)


class _Spelling:
    """Tokens as bytes: those of each token's piece, a bos as BOS; a GAP before them unless they begin with one."""

    def __init__(self, tokenizer: Tokenizer, bos: int) -> None:
        pieces = [np.frombuffer(piece, np.uint8).astype(np.uint16) for piece in tokenizer.pieces]
        pieces += [np.empty(0, np.uint16)] * (bos + 1 - len(pieces))
        pieces[bos] = np.array([BOS], np.uint16)
        self.bos, self.flat, self.width = bos, np.concatenate(pieces), np.array([*map(len, pieces)])
        self.start = np.cumsum(self.width) - self.width

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        width = self.width[ids]
        inside = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
        spelt = self.flat[np.repeat(self.start[ids], width) + inside]
        return spelt if ids[0] == self.bos else np.append(np.uint16(GAP), spelt)
