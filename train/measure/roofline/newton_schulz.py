"""The orthogonalisation of Muon's updates.

a x b a matrix, a <= b · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


@dataclass(frozen=True)
class NewtonSchulz:
    """`steps` rounds of X <- a X + (b A + c A^2) X with A = X X^T, on `count` matrices."""

    count: int
    rows: int
    columns: int
    steps: int
    itemsize: int = 2

    @property
    def forward(self) -> Work:
        """Three products a round, each reading its factors and writing its result once."""
        a, b = sorted((self.rows, self.columns))
        flops = 4 * a * a * b + 2 * a**3
        moved = self.itemsize * (3 * a * b + 3 * a * a)
        return Work(self.count * self.steps * flops, self.count * self.steps * moved)
