"""From documents to batches: one long stream of tokens, cut into rows, shuffled anew in each epoch.

    stream   bos d0 d0 d0 bos d1 d1 bos d2 ...      a document is its tokens (bytes: 0..255) behind one bos (256)
    ids      stream[r T : r T + T]                  row r
    targets  stream[r T + 1 : r T + T + 1]          -100 where the next token belongs to another document, or is missing
    so every token of every document is a target exactly once, and bos never is

Bytes are laid out anew in memory for each epoch; tokens of a trained tokenizer stay in a file that is mapped into
memory (`mapped.py`), and an epoch is an order in which its documents are looked up. Both cut the same rows.

A training batch is a pure function of (seed, step): there is no iterator whose state a checkpoint could lose.

b batch rows · t tokens of a row (T = sequence_length)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .corpus import AnyDocument, Corpus
from .mapped import TokenFile, Tokenised
from .tokenizers import BOS

IGNORED = -100
PADDING = -1  # in `documents`: a token that belongs to none


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets`, `documents`: int64 [b, t]. Documents are numbered from 0 in each row; padding is -1."""

    ids: Tensor
    targets: Tensor
    documents: Tensor

    def to(self, device: torch.device) -> "Batch":
        """On the device, without waiting for it."""
        return Batch(*(pinned(x, device).to(device, non_blocking=True) for x in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.targets, self.documents


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """`x` in memory that the device reads by itself: copies from there need no host that waits."""
    return x.pin_memory() if x.is_cpu and device.type != "cpu" else x


class Stream:
    """Documents in the given order as one array of tokens, to be read in rows of `length` tokens."""

    bos = BOS

    def __init__(self, documents: Sequence[AnyDocument], length: int):
        self.starts, self.size = _starts([document.size for document in documents])
        self.tokens = np.empty(self.size, np.uint16)
        for start, document in zip(self.starts, documents):
            self.tokens[start] = BOS
            self.tokens[start + 1 : start + 1 + document.size] = np.frombuffer(document.text, np.uint8)
        self.length, self.rows = length, -(-self.size // length)

    def at(self, position: np.ndarray) -> np.ndarray:
        """The tokens at these positions of the stream."""
        return self.tokens[position]

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows. Raises IndexError for a row that the stream does not have."""
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows={rows.tolist()}: the stream has rows 0 to {self.rows - 1}")
        position = rows[:, None] * self.length + np.arange(self.length + 1)
        inside = position < self.size
        token = np.where(inside, self.at(np.minimum(position, self.size - 1)), self.bos).astype(np.int64)
        document = np.searchsorted(self.starts, position, side="right") - 1
        document = np.where(inside, document - document[:, :1], PADDING)
        continues = inside[:, 1:] & (document[:, 1:] == document[:, :-1])
        targets = np.where(continues, token[:, 1:], IGNORED)
        arrays = (token[:, :-1], targets, document[:, :-1])
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


class MappedStream(Stream):
    """As `Stream`, of documents whose tokens lie in a file, in the given order: tokens are read where they are."""

    def __init__(self, file: TokenFile, order: np.ndarray, length: int):
        self.bos, self.tokens = file.bos, file.tokens
        self.starts, self.size = _starts(np.diff(file.starts)[order] - 1)
        self._there = file.starts[:-1][order]  # where each document begins in the file
        self.length, self.rows = length, -(-self.size // length)

    def at(self, position: np.ndarray) -> np.ndarray:
        document = np.searchsorted(self.starts, position, side="right") - 1
        return self.tokens[self._there[document] + position - self.starts[document]]


def _starts(sizes: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    """Where documents of these sizes begin, each behind its bos, and where the last one ends."""
    ends = np.cumsum(np.asarray(sizes, np.int64) + 1)
    return np.concatenate([[0], ends])[:-1], int(ends[-1])


def stream(documents: Sequence[AnyDocument] | TokenFile, length: int, order: np.ndarray | None = None) -> Stream:
    """Documents, or those of a file, in the given order (None = as they are)."""
    order = np.arange(len(documents)) if order is None else order
    if isinstance(documents, TokenFile):
        return MappedStream(documents, order, length)
    return Stream([documents[int(i)] for i in order], length)


def train_rows(corpus: Corpus | Tokenised, length: int, seed: int, rows: range, stage: int = 0) -> Batch:
    """Rows of `length` tokens, by number, of the shuffled epochs laid end to end; a stage shuffles in its own way."""
    numbers, parts = np.arange(rows.start, rows.stop), []
    per_epoch = _epoch(corpus, length, seed, stage, 0)[0].rows
    for epoch in np.unique(numbers // per_epoch):
        shuffled, _, order = _epoch(corpus, length, seed, stage, int(epoch))
        parts.append(shuffled.batch(order[numbers[numbers // per_epoch == epoch] % per_epoch]))
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets", "documents")))


def row_spans(corpus: Corpus | Tokenised, length: int, seed: int, rows: range, stage: int = 0) -> np.ndarray:
    """Where the tokens of such rows, targets too, lie in the stream of the training documents in their own order.

    int64 [spans, 2], from and to: one for each document that a row has a part of.
    """
    own, numbers = stream(corpus.train, length), np.arange(rows.start, rows.stop)
    parts = [np.empty((0, 2), np.int64)]
    for epoch in np.unique(numbers // own.rows):
        shuffled, documents, order = _epoch(corpus, length, seed, stage, int(epoch))
        start = order[numbers[numbers // own.rows == epoch] % own.rows] * length
        stop = np.minimum(start + length + 1, shuffled.size)
        first, last = (np.searchsorted(shuffled.starts, place, side="right") - 1 for place in (start, stop - 1))
        count = last - first + 1
        document = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        begins, ends = shuffled.starts[document], np.append(shuffled.starts, shuffled.size)[document + 1]
        span = np.stack([np.maximum(np.repeat(start, count), begins), np.minimum(np.repeat(stop, count), ends)], 1)
        parts.append(span + (own.starts[documents[document]] - begins)[:, None])
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _epoch(
    corpus: Corpus | Tokenised, length: int, seed: int, stage: int, epoch: int
) -> tuple[Stream, np.ndarray, np.ndarray]:
    """The training documents in a new order, this order, and one of the rows that it cuts."""
    random = np.random.default_rng([seed, epoch, stage] if stage else [seed, epoch])
    documents = random.permutation(len(corpus.train))
    shuffled = stream(corpus.train, length, documents)
    return shuffled, documents, random.permutation(shuffled.rows)


@dataclass(frozen=True)
class HeldOut:
    """The rows on which every evaluation of a run is done: evenly spaced over the held-out documents in name order."""

    stream: Stream
    rows: np.ndarray

    def batches(self, batch_size: int) -> list[Batch]:
        return [self.stream.batch(self.rows[i : i + batch_size]) for i in range(0, len(self.rows), batch_size)]

    def target_positions(self) -> np.ndarray:
        """Where in `stream.tokens` the targets of these rows lie (each token once, no bos)."""
        start = self.rows[:, None] * self.stream.length + 1
        position = (start + np.arange(self.stream.length)).ravel()
        position = position[position < self.stream.size]
        return position[self.stream.tokens[position] != self.stream.bos]


def held_out(corpus: Corpus | Tokenised, length: int, rows: int = 0) -> HeldOut:
    """`rows` evenly spaced held-out rows; 0, or more than there are, takes all of them."""
    kept = stream(corpus.held_out, length)
    count = min(rows, kept.rows) if rows else kept.rows
    return HeldOut(kept, np.arange(count) * kept.rows // count)
