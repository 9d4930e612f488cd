"""The held-out bytes that scores are of: those that the targets of the chosen rows are made of, in their documents.

    stream      bos d0 d0 d0 bos d1 d1 ...      bytes of the documents that the rows touch, each behind its bos
    targets     each a stretch of `widths` bytes of it from `starts` on; none is bos

Whoever is compared with a model is scored on these bytes, whatever the model's tokens are.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .corpus import AnyDocument
from .rows import HeldOut, Stream


class Scored:
    """`documents` that the rows touch, `numbers` of theirs; `starts`, `widths` int64 [targets]: see the module.

    `sizes`: bytes that each token of the held-out stream is made of; None = one, and bos none.
    """

    def __init__(self, documents: Sequence[AnyDocument], held_out: HeldOut, sizes: np.ndarray | None = None):
        stream, targets = held_out.stream, held_out.target_positions()
        self.numbers = np.unique(np.searchsorted(stream.starts, targets, side="right") - 1)
        ends = np.append(stream.starts, stream.size)[1:]
        tokens = np.concatenate([np.arange(stream.starts[i], ends[i]) for i in self.numbers])
        widths = np.ones(len(tokens), np.int64)
        if sizes is not None:
            widths = sizes[tokens].astype(np.int64) + (stream.tokens[tokens] == stream.bos)
        chosen = np.searchsorted(tokens, targets)
        self.documents = [documents[int(i)] for i in self.numbers]
        self.starts, self.widths = (np.cumsum(widths) - widths)[chosen], widths[chosen]

    @property
    def bytes(self) -> int:
        return int(self.widths.sum())

    @cached_property
    def stream(self) -> np.ndarray:
        """uint16: bytes, and bos before each document."""
        return Stream(self.documents, 1).tokens

    @cached_property
    def places(self) -> np.ndarray:
        """Where the scored bytes lie in the stream, int64 [bytes], one target's behind another's."""
        before = np.cumsum(self.widths) - self.widths
        return np.repeat(self.starts - before, self.widths) + np.arange(self.bytes)

    def without(self, marked: np.ndarray) -> np.ndarray:
        """Bool [targets]: no byte of it is marked, bool [stream]; of one that has no bytes, not the one behind it."""
        count = np.append(0, np.cumsum(marked))
        ends = np.minimum(self.starts + np.maximum(self.widths, 1), len(marked))
        return count[ends] == count[self.starts]
