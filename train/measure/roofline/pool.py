"""The compressor's pooling.

t tokens · d channels · m ratio · c = 2 with overlap, else 1 · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


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
