"""AdamW in parameter groups, and the learning-rate schedule.

m ← β1 m + (1-β1) g     v ← β2 v + (1-β2) g²     w ← w (1 - η λ) - η m̂ / (sqrt(v̂) + ε)

λ > 0   matrices: every projection, the experts, the gates, the mixing maps `fn` of mHC, the output head
λ = 0   embedding and Engram tables (a row that is not read must not shrink), norm weights, `base` and `scale`
        of mHC, sinks, `ape` (a bias by its role), the short convolution
Engram tables learn `engram_lr_scale` times faster (Engram: Adam, learning rate x 5, no decay), in one of two ways
(`engram_rows`):

all       like everything else: a row without gradient goes on along its old momentum, about six steps' worth after
          its last look-up, and every row is read and written in every step
touched   n_i ← n_i + 1;  m_i, v_i ← as above;  w_i ← w_i - η m̂_i / (sqrt(v̂_i) + ε)    for rows i that a step looks up
          m̂_i = m_i / (1 - β1^n_i),  v̂_i = v_i / (1 - β2^n_i);   a row's moments stand still between its look-ups

lr(s) = peak · (s + 1) / warmup                               s < warmup
        peak                                                  until the tail begins, at steps · (1 - decay_share)
        final + (peak - final) · (1 + cos(π p)) / 2           p from 0 to 1 over the tail (V4 4.2.2)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.tables import RowTable
from .recipe import OptimConfig

TABLES = ("embed", "table", "tables")
NOT_MATRICES = ("ape", "base", "scale", "attn_sink", "conv")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) in a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    tail = round(config.decay_share * steps)
    progress = max(0.0, (step + 1 - (steps - tail)) / tail) if tail else 0.0
    share = config.final_lr_share
    return config.lr * min(warm, share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters by name in the groups "matrices", "vectors" and "tables" (of Engram); a group may be empty.

    The rows that a `RowTable` holds are in none: they are those of `RowAdam`.
    """
    groups: dict[str, dict[str, Tensor]] = {"matrices": {}, "vectors": {}, "tables": {}}
    held = {table.rows for table in _row_tables(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in held:
            groups[_group(name, parameter)][name] = parameter
    return groups


class RowAdam:
    """Adam for row tables: a row's moments and its count of updates are its own, and change when it is looked up.

    The first update of a row is as long as any. `step` belongs between `begin` and `end` of the tables, whose rows are
    new parameters in each step.
    """

    def __init__(
        self, tables: Sequence[RowTable], lr: float, betas: tuple[float, float], eps: float, lr_scale: float = 1.0
    ) -> None:
        self.tables = tables
        self._group: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "lr_scale": lr_scale}
        for table in tables:
            for name in ("exp_avg", "exp_avg_sq"):
                table.add_column(name, table.weight.shape[1:], table.weight.dtype)
            table.add_column("updates", (1,), torch.int32)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        self._group["params"] = [table.rows for table in self.tables]
        return [self._group]

    @torch.no_grad()
    def step(self) -> None:
        for table in self.tables:
            if table.rows.grad is not None:
                _update_rows(table.rows, table.rows.grad, table.columns(), self._group)

    def zero_grad(self) -> None:
        for table in self.tables:
            table.rows.grad = None


def _update_rows(rows: Tensor, grad: Tensor, columns: dict[str, Tensor], group: dict[str, Any]) -> None:
    (beta1, beta2), n = group["betas"], columns["updates"].add_(1)
    m = columns["exp_avg"].lerp_(grad, 1 - beta1)
    v = columns["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    rows.sub_(m / (1 - beta1**n) / ((v / (1 - beta2**n)).sqrt() + group["eps"]) * group["lr"])


class Optimizers:
    """Both optimizers as one, so far as training needs it."""

    def __init__(self, adam: torch.optim.Optimizer, rows: RowAdam) -> None:
        self.optimizers = adam, rows

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """Of the parameters among the weights; what belongs to a row is in its table."""
        return self.optimizers[0].state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW | Optimizers:
    """AdamW over `parameter_groups`, and `RowAdam` for row tables where there are any; each group carries `lr_scale`,
    which `set_learning_rate` multiplies in.
    """
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "tables": 0.0}
    scale = {"matrices": 1.0, "vectors": 1.0, "tables": config.engram_lr_scale}
    groups = [
        {"params": list(named.values()), "weight_decay": decay[kind], "lr_scale": scale[kind]}
        for kind, named in parameter_groups(model).items()
        if named
    ]
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    tables = _row_tables(model)
    if not tables:
        return adam
    return Optimizers(adam, RowAdam(tables, config.lr, config.betas, config.eps, config.engram_lr_scale))


def set_learning_rate(optimizer: torch.optim.Optimizer | Optimizers, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _row_tables(model: nn.Module) -> list[RowTable]:
    return [module for module in model.modules() if isinstance(module, RowTable)]


def _group(name: str, parameter: Tensor) -> str:
    words = name.split(".")
    if "engram" in words and any(word in TABLES for word in words):
        return "tables"
    vector = parameter.ndim < 2 or any(word in NOT_MATRICES or word in TABLES or "norm" in word for word in words)
    return "vectors" if vector else "matrices"
