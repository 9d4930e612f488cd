"""Balanced momentum: rows and columns of an update of equal length, for tables, embedding and head (V4.1 2.5).

M ← β M + (1-β) G       X = β M + (1-β) G       W ← W - γ η sqrt(w) U

U is X with rows and columns divided by their lengths in turn, eleven times, rows first and last (Sinkhorn's scheme): it
is diag(r) X diag(c), so only r and c change. Rows of X that are at most a thousandth as long as the mean row stand
still. Every other row moves by γ in the root mean square, however rare its token. No decay.

dense     all rows, each step: a row without gradient goes on at full length until its momentum is a thousandth of the
          mean, 135 steps at β = 0.95 if the mean stays
touched   rows that a step looks up, by themselves: mean, columns and momentum know no others

r rows · w their width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.tables import RowTable
from .muon import Observer, descend
from .rows import RowRule

ROUNDS = 11
STILL = 1e-3


def balance(x: Tensor) -> Tensor:
    """`sqrt(w) U` of x [r, w]: rows of unit rms, columns of about equal length; rows far below the mean are zero.

    The published epsilon of 1e-20 only keeps zeros from dividing; here a row or column of zeros stays as it is. A NaN
    spreads over all rows.
    """
    size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    u = torch.where(size <= STILL * size.mean(), 0.0, x / size)
    squares, rows, columns = u.square(), x.new_ones(len(x)), x.new_ones(x.shape[1])
    for _ in range(ROUNDS // 2):
        columns = _over(squares.mT @ rows)
        rows = _over(squares @ columns)
    return u.mul_(rows.sqrt()[:, None]).mul_(columns.sqrt() * x.shape[1] ** 0.5)


def _over(squares: Tensor) -> Tensor:
    """1 / squares, and 1 for a zero."""
    return torch.where(squares < torch.finfo(squares.dtype).tiny, 1.0, 1.0 / squares)


def _direction(grad: Tensor, average: Tensor, momentum: float) -> Tensor:
    return balance(grad.lerp(average.lerp_(grad, 1 - momentum), momentum))


class Balanced(torch.optim.Optimizer):
    """The dense form over parameters [r, w].

    Args:
        params: groups or parameters, as for any optimizer.
        lr: η.
        momentum: β in [0, 1).
        scale: γ, the rms of an update per unit of learning rate.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    MOMENTS = frozenset({"exp_avg"})

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, scale: float = 0.18) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "scale": scale})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"a parameter {tuple(parameter.shape)}: the balanced rule takes [rows, width]")

    @torch.no_grad()
    def step(self, closure: None = None, observe: Observer | None = None) -> None:  # type: ignore[override]
        """As `Muon.step`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update = _direction(parameter.grad, state["exp_avg"], group["momentum"]).mul_(group["scale"])
                descend(parameter, update, group["lr"])
                if observe:
                    observe(parameter, update)


class RowBalanced(RowRule):
    """The touched form for row tables: of a step's rows, with momentum that stands still between their look-ups."""

    def __init__(
        self,
        tables: Sequence[RowTable],
        lr: float,
        momentum: float = 0.95,
        scale: float = 0.18,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(tables, {"lr": lr, "momentum": momentum, "scale": scale, "lr_scale": lr_scale})
        for table in tables:
            table.add_column("exp_avg", table.weight.shape[1:], table.weight.dtype)

    def direction(self, grad: Tensor, columns: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return _direction(grad, columns["exp_avg"], group["momentum"]).mul_(group["scale"])
