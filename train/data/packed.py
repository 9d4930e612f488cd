"""Rows of packed talks: documents of which some tokens are learnt, several in a row, none of which sees another.

row        bos q0 a0 eos | bos q1 a1 eos q2 a2 eos | padding      a document is a talk
targets    -100 before and between answers, the next token on them       (an opening's last token has the first)
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .rows import IGNORED, PADDING, Batch

Columns = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class Talk:
    """Tokens of a conversation, and which of them are learnt, that is are targets."""

    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def pack(talks: Sequence[Talk], length: int, pad: int) -> Columns:
    """Ids, targets and documents of a row of `length` tokens. Raises ValueError where they do not fit."""
    ids, targets, documents = [], [], []
    for number, talk in enumerate(talks):
        ids += talk.ids
        targets += [token if learnt else IGNORED for token, learnt in zip(talk.ids[1:], talk.learnt[1:])] + [IGNORED]
        documents += [number] * len(talk)
    left = length - len(ids)
    if left < 0:
        raise ValueError(f"conversations of {len(ids)} tokens do not fit into a row of {length}")
    return ids + [pad] * left, targets + [IGNORED] * left, documents + [PADDING] * left


def stack(rows: Iterable[Columns]) -> Batch:
    return Batch(*(torch.tensor(column, dtype=torch.int64) for column in zip(*rows)))


def fill(sizes: Sequence[int], order: Iterable[int], length: int) -> list[list[int]]:
    """Numbers of documents in rows of `length` tokens: each in turn goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each row, sorted
    for number in order:
        place = bisect_left(room, (sizes[number], 0))
        if place == len(room):
            left, row = length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(number)
        insort(room, (left - sizes[number], row))
    return rows


@dataclass(frozen=True)
class PackedRows:
    """Rows that are held out: the talks of each."""

    rows: list[list[Talk]]
    length: int
    pad: int

    def learnt(self) -> int:
        """Tokens that are targets."""
        return sum(sum(talk.learnt) for row in self.rows for talk in row)

    def batches(self, batch_size: int) -> list[Batch]:
        packed = [pack(row, self.length, self.pad) for row in self.rows]
        return [stack(packed[i : i + batch_size]) for i in range(0, len(packed), batch_size)]
