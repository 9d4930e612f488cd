"""A site of mHC.

t tokens · d width · n streams · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


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
