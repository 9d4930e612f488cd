"""Rules for row tables: what belongs to a row changes in the steps that look it up, and stands still between them.

Adam by row:   n_i ← n_i + 1;   m_i ← β1 m_i + (1-β1) g_i;   v_i ← β2 v_i + (1-β2) g_i²
               w_i ← w_i - η m̂_i / (sqrt(v̂_i) + ε),    m̂_i = m_i / (1 - β1^n_i),   v̂_i = v_i / (1 - β2^n_i)

The first update of a row is as long as any. A step belongs between `begin` and `end` of the tables, whose rows are new
parameters in each step.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.tables import RowTable
from .muon import Observer, descend


class RowRule(ABC):
    """An optimizer of row tables, so far as training needs one; a rule says the direction."""

    def __init__(self, tables: Sequence[RowTable], settings: dict[str, Any]) -> None:
        self.tables, self._group = tables, settings

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        self._group["params"] = [table.rows for table in self.tables]
        return [self._group]

    @torch.no_grad()
    def step(self, observe: Observer | None = None) -> None:
        """Updates the held rows; `observe(rows, update)` is told the update per unit of learning rate."""
        for table in self.tables:
            if table.rows.grad is not None:
                update = self.direction(table.rows.grad, table.columns(), self._group)
                descend(table.rows, update, self._group["lr"])
                if observe:
                    observe(table.rows, update)

    def zero_grad(self) -> None:
        for table in self.tables:
            table.rows.grad = None

    @abstractmethod
    def direction(self, grad: Tensor, columns: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The update of rows with gradient `grad` [u, w], per unit of learning rate; changes `columns` in place."""


class RowAdam(RowRule):
    """Adam for row tables: a row's moments and its count of updates are its own."""

    def __init__(
        self, tables: Sequence[RowTable], lr: float, betas: tuple[float, float], eps: float, lr_scale: float = 1.0
    ) -> None:
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "lr_scale": lr_scale})
        for table in tables:
            for name in ("exp_avg", "exp_avg_sq"):
                table.add_column(name, table.weight.shape[1:], table.weight.dtype)
            table.add_column("updates", (1,), torch.int32)

    def direction(self, grad: Tensor, columns: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        (beta1, beta2), n = group["betas"], columns["updates"].add_(1)
        m = columns["exp_avg"].lerp_(grad, 1 - beta1)
        v = columns["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return m / (1 - beta1**n) / ((v / (1 - beta2**n)).sqrt() + group["eps"])
