"""The language model's head with its loss.

t tokens · d width · v vocabulary · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


@dataclass(frozen=True)
class CrossEntropy:
    """Linear layer and softmax cross-entropy. The logits are counted as never reaching memory."""

    tokens: int
    width: int
    vocabulary: int
    itemsize: int = 2

    @property
    def _inputs(self) -> int:
        return self.itemsize * (self.tokens + self.vocabulary) * self.width

    @property
    def forward(self) -> Work:
        """Reads x, the weight and the targets; writes a number."""
        return Work(2 * self.tokens * self.width * self.vocabulary, self._inputs + 8 * self.tokens)

    @property
    def backward(self) -> Work:
        """Both products of the logits' gradient: reads x and the weight, writes their gradients."""
        return Work(4 * self.tokens * self.width * self.vocabulary, 2 * self._inputs)

    @property
    def kept(self) -> int:
        """Bytes between forward and backward besides the inputs: both gradients, which the forward pass makes."""
        return self._inputs
