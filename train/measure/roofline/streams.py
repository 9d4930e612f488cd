"""Ops that pass over memory and multiply little: pooling, norms and rotation, mHC, Engram, number formats.

t tokens · d width or channels · n streams · m ratio · c = 2 with overlap, else 1 · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


def elementwise(values: int, read: int, write: int) -> Work:
    """Each value read and written once, in that many bytes."""
    return Work(0, values * (read + write))


@dataclass(frozen=True)
class Pool:
    """The compressor's pooling of `ratio` tokens into an entry of `dim` channels."""

    tokens: int
    dim: int
    ratio: int
    overlap: bool
    itemsize: int = 2

    @property
    def _inputs(self) -> int:
        """Bytes of values and logits."""
        return 2 * self.itemsize * self.tokens * (2 if self.overlap else 1) * self.dim

    @property
    def _entries(self) -> int:
        return self.itemsize * (self.tokens // self.ratio) * self.dim

    @property
    def forward(self) -> Work:
        return Work(0, self._inputs + self._entries)

    @property
    def backward(self) -> Work:
        """Reads values, logits and the entries' gradient; writes both gradients."""
        return Work(0, 2 * self._inputs + self._entries)


@dataclass(frozen=True)
class Hyper:
    """One mHC site."""

    tokens: int
    width: int
    streams: int = 4
    itemsize: int = 2

    @property
    def _coefficients(self) -> int:
        """Bytes of pre, post and comb."""
        return 4 * self.tokens * (self.streams**2 + 2 * self.streams)

    def _rows(self, rows: int) -> int:
        """Bytes of that many rows of `width` for each token."""
        return self.itemsize * self.tokens * rows * self.width

    @property
    def pre(self) -> Work:
        """Projection, Sinkhorn and collapse: reads the streams once, writes their combination and the coefficients."""
        t, d, n = self.tokens, self.width, self.streams
        return Work(2 * t * n * d * (n * n + 2 * n) + 2 * t * n * d, self._rows(n + 1) + self._coefficients)

    @property
    def post(self) -> Work:
        """Recombination: reads the streams and the sublayer's output, writes the streams."""
        t, d, n = self.tokens, self.width, self.streams
        return Work(2 * t * n * d * (n + 1), self._rows(2 * n + 1) + 4 * t * (n * n + n))

    @property
    def post_backward(self) -> Work:
        """Reads the gradient, the streams and the sublayer's output; writes the gradients of both."""
        t, d, n = self.tokens, self.width, self.streams
        return Work(4 * t * n * d * (n + 1), self._rows(3 * n + 2))

    @property
    def pre_backward(self) -> Work:
        """Reads the streams, the combination's gradient and the gradient from `post`; writes the streams' gradient."""
        t, d, n = self.tokens, self.width, self.streams
        return Work(4 * t * n * d * (n * n + 2 * n), self._rows(3 * n + 1))

    @property
    def kept(self) -> int:
        """Bytes between forward and backward besides inputs and output: the collapsed row and the coefficients."""
        return self._rows(1) + self._coefficients


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
