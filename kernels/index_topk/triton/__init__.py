"""The indexer's choice in Triton, as one operator that torch.compile, checkpointing and CUDA graphs see whole.

`kernels` holds the kernels, `launch` their order and blocks. The picks are those of a stable sort of the
scores over the visible entries; a NaN score ranks with -inf. Products are made in the dtype of q, as autocast would.

b batch · t queries · h index heads · d index head dim · p compressed entries · k picks
"""

import torch
from torch import Tensor

from . import launch

__all__ = ["index_topk"]


def index_topk(q: Tensor, weights: Tensor, keys: Tensor, *, k: int, start: Tensor, end: Tensor) -> Tensor:
    """See `kernels.index_topk.index_topk`."""
    return _index_topk(q.detach(), weights.detach(), keys.detach(), k, start, end)


@torch.library.custom_op("abyssal::index_topk", mutates_args=())
def _index_topk(q: Tensor, weights: Tensor, keys: Tensor, k: int, start: Tensor, end: Tensor) -> Tensor:
    return launch.index_topk(q, weights, keys, k, start, end)


@_index_topk.register_fake
def _(q: Tensor, weights: Tensor, keys: Tensor, k: int, start: Tensor, end: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], min(k, keys.shape[1]), dtype=torch.int64)
