"""Induction: after n tokens that stood in the row once before, what followed them then.

    bos x x a b c x x x a b                            target: c at the last b; n = order = 2

Random tokens, in which pieces of n + 1 are copied to a later place (without the last token of the copy, which is the
answer). Unlike in recall, nothing marks a piece or a question, and keys and values are the same tokens. An answer
counts only if its n tokens stand exactly once before, so that there is no other answer.

Tokens: 0 bos · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .task import Row, Task

TRIES = 8  # draws of a place for each answer


class Induction(Task):
    name: ClassVar[str] = "induction"
    options: ClassVar[tuple[str, ...]] = ("density", "nearest", "farthest", "values", "order")

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.vocabulary = 1 + config.values

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, n = Row.blank(draw.integers(1, self.vocabulary, length)), self.config.order
        aimed = self.answers(length)
        free, planted = np.ones(length, bool), []
        apart = self.log_uniform(draw, length - n - 2, TRIES * aimed) + 1  # from a token of the piece to its copy
        for distance, where in zip(apart.tolist(), draw.random(TRIES * aimed).tolist()):
            piece = 1 + int(where * (length - n - distance))
            copy = piece + distance
            if distance >= n and free[piece : piece + n + 1].all() and free[copy : copy + n].all():
                free[piece : piece + n + 1] = free[copy : copy + n] = False
                row.ids[copy : copy + n] = row.ids[piece : piece + n]
                planted.append((copy + n - 1, piece + n))
                if len(planted) == aimed:
                    break
        alone = self._stood_once(row.ids)
        for question, answer in planted:
            if alone[question]:
                row.ask(question, int(row.ids[answer]), question - answer)
        return row

    def _stood_once(self, ids: np.ndarray) -> list[bool]:
        """For each position: the n tokens that end there stood exactly once before."""
        n, seen, found = self.config.order, dict[bytes, int](), [False] * len(ids)
        for end in range(n, len(ids)):
            gram = ids[end - n + 1 : end + 1].tobytes()
            found[end] = seen.get(gram, 0) == 1
            seen[gram] = seen.get(gram, 0) + 1
        return found
