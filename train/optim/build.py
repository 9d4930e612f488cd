"""The optimizers of a model, as one: each parameter in the one that its rule names."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..settings import OptimConfig
from .adam import AdamW
from .balanced import Balanced, RowBalanced
from .muon import Muon, Observer
from .rows import RowAdam, RowRule
from .rules import Rule, parameter_rules, parameters_by_name, row_tables_of

GROUPS = ("matrices", "vectors", "tables", "muon", "balanced")

Rules = AdamW | Muon | Balanced | RowRule


class Optimizers:
    """Several optimizers as one, so far as training needs it."""

    def __init__(self, optimizers: Sequence[Rules]) -> None:
        self.optimizers = tuple(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state of every parameter among the weights, to be read or filled; what belongs to a row is in its
        table.
        """
        plain = [optimizer for optimizer in self.optimizers if not isinstance(optimizer, RowRule)]
        groups = [(optimizer, group) for optimizer in plain for group in optimizer.param_groups]
        return {p: optimizer.state[p] for optimizer, group in groups for p in group["params"]}

    @property
    def moments(self) -> dict[Tensor, frozenset[str]]:
        """What the rule of every parameter among the weights keeps of it."""
        return {
            p: optimizer.MOMENTS
            for optimizer in self.optimizers
            if not isinstance(optimizer, RowRule)
            for group in optimizer.param_groups
            for p in group["params"]
        }

    def step(self, observe: Observer | None = None) -> None:
        """One step of each; `observe(parameter, update)` as in `Muon.step`."""
        for optimizer in self.optimizers:
            optimizer.step(observe=observe)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def parameter_groups(model: nn.Module, config: OptimConfig) -> dict[str, dict[str, Tensor]]:
    """Parameters by name in the groups of `rules.Rule`, any of which may be empty.

    The rows that a `RowTable` holds are in none: they are those of a `RowRule`.
    """
    rules = parameter_rules(model, config)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in GROUPS}
    for name, parameter in parameters_by_name(model).items():
        groups[rules[name].group][name] = parameter
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Everything that learns, by its rule; each parameter group carries the `lr_scale` that `set_learning_rate`
    multiplies in.
    """
    groups = parameter_groups(model, config)
    tables = row_tables_of(model)
    muon = _muon(groups["muon"], parameter_rules(model, config), config)
    found = _adamw(groups, config), muon, _balanced(groups, config)
    optimizers: list[Rules] = [optimizer for optimizer in found if optimizer is not None]
    return Optimizers([*optimizers, _row_rule(tables, config)] if tables else optimizers)


def set_learning_rate(optimizer: Optimizers, lr: float | Tensor) -> None:
    """For the steps to come; a tensor [] may be on the device, where no step waits for it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _group(named: dict[str, Tensor], lr_scale: float = 1.0, **settings: Any) -> list[dict[str, Any]]:
    return [{"params": list(named.values()), "lr_scale": lr_scale, **settings}] if named else []


def _adamw(groups: dict[str, dict[str, Tensor]], config: OptimConfig) -> AdamW | None:
    found = _group(groups["matrices"], weight_decay=config.weight_decay)
    found += _group(groups["vectors"], weight_decay=0.0)
    if config.engram_rule == "adam":
        found += _group(groups["tables"], config.engram_lr_scale, weight_decay=0.0)
    return AdamW(found, config.lr, config.betas, config.eps) if found else None


def _muon(named: dict[str, Tensor], rules: dict[str, Rule], config: OptimConfig) -> Muon | None:
    if not named:
        return None
    rows = [rules[name].rows for name in named]
    muon = Muon(list(named.values()), rows, config.lr, config.momentum, config.update_scale, config.weight_decay)
    muon.param_groups[0]["lr_scale"] = 1.0
    return muon


def _balanced(groups: dict[str, dict[str, Tensor]], config: OptimConfig) -> Balanced | None:
    found = _group(groups["balanced"])
    if config.engram_rule == "balanced":
        found += _group(groups["tables"], config.engram_lr_scale)
    return Balanced(found, config.lr, config.momentum, config.update_scale) if found else None


def _row_rule(tables: Any, config: OptimConfig) -> RowRule:
    if config.engram_rule == "balanced":
        return RowBalanced(tables, config.lr, config.momentum, config.update_scale, config.engram_lr_scale)
    return RowAdam(tables, config.lr, config.betas, config.eps, config.engram_lr_scale)
