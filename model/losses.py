"""What each part of the objective is a mean over, and the share that a batch has in the mean of a larger one.

    lm        targets                          balance   rows that hold a token, in each score-routed layer
    mtp       targets of the MTP module        index     queries that see an entry, in each CSA layer

The mean over a whole batch is the sum of its parts' means, each times its share (its count over the whole one's):

    L = sum_i (n_i / n) L_i        and so are the gradients

A batch that is read in parts, one after another or by several processes, needs the counts of all parts before the first
backward pass. They depend on tokens alone.

b batch · t tokens
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .kinds import SPARSE
from .layout import Layout, make_layout

IGNORED = -100


class LossShares(NamedTuple):
    """Of a batch in the means of the step that it is a part of; each between 0 and 1."""

    lm: float
    mtp: float
    balance: float  # of the layers
    mtp_balance: float  # of the MTP module's router
    indexer: tuple[float, ...]  # of each CSA layer


def loss_counts(config: ModelConfig, ids: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
    """int64 [4 + CSA layers] on the host: targets, targets of the MTP module, rows with a token, rows of the MTP module
    with one, and for each CSA layer the queries that see an entry. Counts of parts add up to those of the whole.

    ids, targets, documents are [b, t] as given to the model.
    """
    layout = make_layout(ids, documents)
    follows = has_next(ids, layout)
    real = torch.ones_like(follows) if layout.real is None else layout.real
    targets = targets.masked_fill(~real, IGNORED)
    counts = [targets != IGNORED, next_targets(targets, follows) != IGNORED, real.any(-1), follows.any(-1)]
    for layer in range(config.num_hidden_layers):
        if config.layer_kind(layer) == SPARSE:
            entries = layout.entries(config.compress_ratio(layer))
            counts.append((entries.end > entries.start).expand(ids.shape))
    return torch.stack([count.sum() for count in counts]).cpu()


def loss_shares(part: Tensor, whole: Tensor) -> LossShares:
    """Of a part with counts `part` in a step with counts `whole`, as `loss_counts` gives them; 0 of 0 is 0."""
    lm, mtp, balance, mtp_balance, *indexer = (part.double() / whole.clamp_min(1)).tolist()
    return LossShares(lm, mtp, balance, mtp_balance, tuple(indexer))


def has_next(ids: Tensor, layout: Layout) -> Tensor:
    """bool [b, t]: the next token belongs to the same document, so that the MTP module predicts from here."""
    follows = torch.ones_like(ids, dtype=torch.bool)
    follows[:, -1] = False
    if layout.start is not None and layout.real is not None:
        follows &= layout.real & (layout.start == layout.start.roll(-1, 1))
    return follows


def next_targets(targets: Tensor, follows: Tensor) -> Tensor:
    """[b, t] what the MTP module predicts at each position: the target of the next one."""
    return targets.roll(-1, 1).masked_fill(~follows, IGNORED)
