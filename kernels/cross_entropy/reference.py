"""The definition of linear cross-entropy, which every engine is held against: all logits at once, differentiated by
autograd.
"""

import torch
from torch import Tensor

from ..precision import accumulation, without_autocast


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """See `kernels.cross_entropy.cross_entropy`; `chunk` changes nothing."""
    dtype = torch.promote_types(accumulation(x), accumulation(weight))
    valid = targets != ignore_index
    with without_autocast(x):
        logits = x[valid].to(dtype) @ weight.to(dtype).T
        norm = logits.logsumexp(-1)
        losses = norm - logits.gather(1, targets[valid, None]).squeeze(1) + z_loss * norm.square()
    return losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)
