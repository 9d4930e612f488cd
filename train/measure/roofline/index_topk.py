"""The indexer's scores and picks.

t tokens · h index heads · d index head dim · p entries · k picks · s bytes of an element
"""

from dataclasses import dataclass

from .attention import entry_pairs
from .device import Work


@dataclass(frozen=True)
class Indexer:
    tokens: int
    heads: int
    dim: int
    ratio: int
    picks: int
    itemsize: int = 2

    @property
    def entries(self) -> int:
        return self.tokens // self.ratio

    @property
    def pairs(self) -> int:
        """Of a query and an entry that it may see."""
        return entry_pairs(self.tokens, self.ratio, None)

    @property
    def picked(self) -> int:
        """Of a query and an entry that it picks."""
        return entry_pairs(self.tokens, self.ratio, self.picks)

    @property
    def inputs(self) -> int:
        """Bytes of queries, weights and keys."""
        t, h, d, s = self.tokens, self.heads, self.dim, self.itemsize
        return s * t * h * d + s * self.entries * d + 4 * t * h

    @property
    def topk(self) -> Work:
        """Scores and picks: the scores never reach memory."""
        return Work(2 * self.heads * self.dim * self.pairs, self.inputs + 4 * self.tokens * self.picks)

    @property
    def selection(self) -> Work:
        """The picks alone, from fp32 scores in memory: reads every entry's score once."""
        return Work(0, 4 * self.pairs + 4 * self.tokens * self.picks)
