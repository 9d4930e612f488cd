"""Engram's look-up and gate.

t tokens · d width · n streams · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


@dataclass(frozen=True)
class Engram:
    """The gate, and the rows of the tables that it opens for."""

    tokens: int
    width: int
    streams: int = 4
    itemsize: int = 2

    def _rows(self, rows: int) -> int:
        return self.itemsize * self.tokens * rows * self.width

    @property
    def gate(self) -> Work:
        """Reads streams, keys and the value, writes what each stream gains."""
        return Work(0, self._rows(3 * self.streams + 1))

    @property
    def gate_backward(self) -> Work:
        """Reads streams, keys, the value and the gradient, writes the gradients of all three."""
        return Work(0, self._rows(5 * self.streams + 2))

    @property
    def kept(self) -> int:
        """Bytes between forward and backward besides the inputs: a product and two norms per token and stream."""
        return 12 * self.tokens * self.streams

    def lookup(self, heads: int, dim: int) -> Work:
        """Hash and gather of `heads` rows of `dim` for each token: reads ids and rows, writes the rows."""
        return Work(0, 8 * self.tokens + 2 * self.itemsize * self.tokens * heads * dim)

    def lookup_backward(self, heads: int, dim: int, rows: int) -> Work:
        """Reads the gradient of what was looked up, writes that of the whole table of `rows`."""
        return Work(0, self.itemsize * (self.tokens * heads + rows) * dim)

    def hash(self, heads: int) -> Work:
        """Reads a token's id, writes `heads` rows' ids, of 8 bytes each: rows of all tables may pass 2^31."""
        return Work(0, 8 * self.tokens * (1 + heads))
