"""From documents to batches: one long stream of tokens, cut into rows, shuffled anew in each epoch.

    stream   bos d0 d0 d0 bos d1 d1 bos d2 ...      a document is its bytes (tokens 0..255) behind one bos (256)
    ids      stream[r T : r T + T]                  row r
    targets  stream[r T + 1 : r T + T + 1]          -100 where the next token belongs to another document, or is missing
    so every byte of every document is a target exactly once, and bos never is

A training batch is a pure function of (seed, step): there is no iterator whose state a checkpoint could lose.

b batch rows · t tokens of a row (T = sequence_length)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .corpus import Corpus, Document
from .tokens import BOS

IGNORED = -100
PADDING = -1  # in `documents`: a token that belongs to none


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets`, `documents`: int64 [b, t]. Documents are numbered from 0 in each row; padding is -1."""

    ids: Tensor
    targets: Tensor
    documents: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.targets.to(device), self.documents.to(device))


class Stream:
    """Documents in the given order as one array of tokens, to be read in rows of `length` tokens."""

    def __init__(self, documents: Sequence[Document], length: int):
        sizes = np.array([1 + len(document.text) for document in documents])
        self.starts = np.concatenate([[0], np.cumsum(sizes)])[:-1]
        self.tokens = np.empty(sizes.sum(), np.uint16)
        for start, document in zip(self.starts, documents):
            self.tokens[start] = BOS
            self.tokens[start + 1 : start + 1 + len(document.text)] = np.frombuffer(document.text, np.uint8)
        self.length = length
        self.rows = -(-len(self.tokens) // length)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows. Raises IndexError for a row that the stream does not have."""
        rows = np.asarray(rows)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows={rows.tolist()}: the stream has rows 0 to {self.rows - 1}")
        position = rows[:, None] * self.length + np.arange(self.length + 1)
        inside = position < len(self.tokens)
        token = np.where(inside, self.tokens[np.minimum(position, len(self.tokens) - 1)], BOS).astype(np.int64)
        document = np.searchsorted(self.starts, position, side="right") - 1
        document = np.where(inside, document - document[:, :1], PADDING)
        continues = inside[:, 1:] & (document[:, 1:] == document[:, :-1])
        targets = np.where(continues, token[:, 1:], IGNORED)
        arrays = (token[:, :-1], targets, document[:, :-1])
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def train_rows(corpus: Corpus, length: int, seed: int, rows: range, stage: int = 0) -> Batch:
    """Rows of `length` tokens, by number, of the shuffled epochs laid end to end; a stage shuffles in its own way."""
    numbers, parts = np.arange(rows.start, rows.stop), []
    per_epoch = _epoch(corpus, length, seed, stage, 0)[0].rows
    for epoch in np.unique(numbers // per_epoch):
        stream, order = _epoch(corpus, length, seed, stage, int(epoch))
        parts.append(stream.batch(order[numbers[numbers // per_epoch == epoch] % per_epoch]))
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "targets", "documents")))


def train_batch(corpus: Corpus, length: int, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of step `step` (from 0) of a run of one stage: rows step·b ... step·b + b - 1."""
    return train_rows(corpus, length, seed, range(step * batch_size, (step + 1) * batch_size))


@lru_cache(maxsize=2)
def _epoch(corpus: Corpus, length: int, seed: int, stage: int, epoch: int) -> tuple[Stream, np.ndarray]:
    """The training documents in a new order, and an order of the rows that this cuts."""
    random = np.random.default_rng([seed, epoch, stage] if stage else [seed, epoch])
    stream = Stream([corpus.train[i] for i in random.permutation(len(corpus.train))], length)
    return stream, random.permutation(stream.rows)


@dataclass(frozen=True)
class HeldOut:
    """The rows on which every evaluation of a run is done: evenly spaced over the held-out documents in name order."""

    stream: Stream
    rows: np.ndarray

    def batches(self, batch_size: int) -> list[Batch]:
        return [self.stream.batch(self.rows[i : i + batch_size]) for i in range(0, len(self.rows), batch_size)]

    def target_positions(self) -> np.ndarray:
        """Where in `stream.tokens` the targets of these rows lie (each byte once, no bos)."""
        start = self.rows[:, None] * self.stream.length + 1
        position = (start + np.arange(self.stream.length)).ravel()
        position = position[position < len(self.stream.tokens)]
        return position[self.stream.tokens[position] != BOS]


def held_out(corpus: Corpus, length: int, rows: int = 0) -> HeldOut:
    """`rows` evenly spaced held-out rows; 0, or more than there are, takes all of them."""
    stream = Stream(corpus.held_out, length)
    count = min(rows, stream.rows) if rows else stream.rows
    return HeldOut(stream, np.arange(count) * stream.rows // count)
