"""Induction: after n tokens that stood in the row once before, what followed them then.

    bos x x a b c x x x a b                            target: c at the last b; n = order = 2

Random tokens, in which pieces of n + 1 are copied to a later place (without the last token of the copy, which is the
answer). Unlike in recall, nothing marks a piece or a question, and keys and values are the same tokens. An answer
counts only if its n tokens stand exactly once before, so that there is no other answer. More pieces are copied where
chance repeats some, until a row has density · t answers; it is an error where that is never so.

Tokens: 0 bos · values
"""

from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ...settings import PlantedConfig
from .blind import readers
from .task import Guesses, Row, Task

TRIES = 8  # draws of a place for each answer
ROWS = 20  # draws of a row


class Induction(Task):
    name: ClassVar[str] = "induction"
    options: ClassVar[tuple[str, ...]] = ("density", "nearest", "farthest", "values", "order", "eval_nearest")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.vocabulary = 1 + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        asked = copies = self.answers(length)
        for _ in range(ROWS):
            row = Row.blank(draw.integers(1, self.vocabulary, length))
            planted = self._copy(draw, row.ids, copies)
            alone = self._stood_once(row.ids)
            found = [(question, answer) for question, answer in planted if alone[question]]
            if len(found) >= asked:
                for question, answer in found[:asked]:
                    row.ask(question, int(row.ids[answer]), question - answer)
                return row
            copies += 2 * (asked - len(found))
        c = self.config
        raise ValueError(
            f"planted.density={c.density}: {len(found)} of {asked} answers stand alone or find a place in rows of"
            f" {length} tokens; allowed are fewer, a larger planted.values ({c.values}) or planted.order ({c.order})"
        )

    def _copy(self, draw: np.random.Generator, ids: np.ndarray, copies: int) -> list[tuple[int, int]]:
        """Copies up to so many pieces to later places; positions of the questions and of their answers."""
        length, n = len(ids), self.config.order
        free, planted = np.ones(length, bool), []
        apart = self.distances(draw, length - n - 2, TRIES * copies) + 1  # from a token of the piece to its copy
        for distance, where in zip(apart.tolist(), draw.random(TRIES * copies).tolist()):
            piece = 1 + int(where * (length - n - distance))
            copy = piece + distance
            if distance >= n and free[piece : piece + n + 1].all() and free[copy : copy + n].all():
                free[piece : piece + n + 1] = free[copy : copy + n] = False
                ids[copy : copy + n] = ids[piece : piece + n]
                planted.append((copy + n - 1, piece + n))
                if len(planted) == copies:
                    break
        return planted

    def blind(self, row: Row) -> dict[str, Guesses]:
        return readers(row, np.arange(1, len(row.ids)), self.config.nearest)

    def _stood_once(self, ids: np.ndarray) -> np.ndarray:
        """For each position: the n tokens that end there stood exactly once before, bos not counted."""
        n = self.config.order
        which = np.unique(sliding_window_view(ids[1:], n), axis=0, return_inverse=True)[1].ravel()
        order = np.argsort(which, kind="stable")
        first = np.searchsorted(which[order], which[order])
        found = np.zeros(len(ids), bool)
        found[n + order] = np.arange(len(order)) - first == 1
        return found
