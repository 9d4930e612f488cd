"""A step in parts: several passes in one process, and a share of the rows in each of several processes.

    L = sum_i (n_i / n) L_i,   dL = sum_i (n_i / n) dL_i        n_i: what a part's loss is a mean over (`model.losses`)

Each part of the loss has its own counts. Those of the whole step come first (they depend on tokens alone: no pass is
needed), then each pass is given its shares, and gradients add up, exactly but for the order of the sums. Router loads
are counts, which the routers add up themselves.

Several processes take part in the same way: each has some rows of the step, `total` (`World.total`) adds the counts of
all before the first pass and the losses after the last, and gradients are summed over processes, not averaged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...model.config import ModelConfig
from ...model.losses import LossShares, loss_counts, loss_shares
from ..data.rows import Batch

Total = Callable[[Tensor], Tensor]


class Pass(NamedTuple):
    """One forward and backward pass: its rows and its shares in the step's means."""

    batch: Batch
    shares: LossShares


def micro_batches(batch: Batch, rows: int) -> list[Batch]:
    """`batch` in parts of `rows` rows, the last one perhaps smaller; 0 = in one part."""
    if not rows:
        return [batch]
    parts = zip(*(tensor.split(rows) for tensor in batch.tensors()))
    return [Batch(*part) for part in parts]


def passes(config: ModelConfig, batch: Batch, rows: int, total: Total | None = None) -> list[Pass]:
    """The passes of a step over this process' `batch`, on the host, `rows` rows at a time."""
    parts = micro_batches(batch, rows)
    counts = [loss_counts(config, part.ids, part.targets, part.documents) for part in parts]
    mine = torch.stack(counts).sum(0)
    whole = total(mine) if total else mine
    return [Pass(part, loss_shares(count, whole)) for part, count in zip(parts, counts)]


def summed(losses: Sequence[dict[str, Tensor]], total: Total | None = None) -> dict[str, Tensor]:
    """The step's losses [], from what its passes add to each."""
    sums = torch.stack([torch.stack([part[name].detach() for part in losses]).sum() for name in losses[0]])
    return dict(zip(losses[0], (total(sums) if total else sums).unbind()))


def mean_metrics(metrics: Sequence[dict[str, Tensor]], rows: Sequence[int]) -> dict[str, Tensor]:
    """The model's measurements of this process' passes, each weighted by its rows."""
    if len(metrics) == 1:
        return metrics[0]
    return {
        name: torch.stack([part[name] * (count / sum(rows)) for part, count in zip(metrics, rows)]).sum(0)
        for name in metrics[0]
    }
