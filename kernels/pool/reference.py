"""The compressor's pooling, each window gathered whole, differentiated by autograd: the definition that every engine is
held against.

Axes: b batch · t tokens · p entries · m ratio · s slots (m, or 2 m with overlap: before | own) · C channels of a
token · D channels of an entry.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulation


def pool(
    kv: Tensor, gate: Tensor, bias: Tensor,
    *, ratio: int, overlap: bool, first: Tensor | None = None, follows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype, (batch, t, _) = accumulation(kv), kv.shape
    if first is None:
        first = torch.arange(0, t // ratio * ratio, ratio, device=kv.device).expand(batch, -1)
        follows = first > 0
    own = torch.arange(ratio, device=kv.device) + first[..., None]  # [b, p, m] tokens of an entry
    windows = [own.where(first[..., None] >= 0, t)]  # token t, a row of zeros: what is not there
    if overlap and follows is not None:
        windows = [(own - ratio).where((follows & (first >= 0))[..., None], t), *windows]
    row = torch.arange(batch, device=kv.device)[:, None, None]

    def slots(x: Tensor) -> Tensor:
        """[b, t, C] as [b, p, s, D]."""
        halves = pad(x.to(dtype), (0, 0, 0, 1)).chunk(len(windows), -1)
        return torch.cat([half[row, tokens] for half, tokens in zip(halves, windows)], 2)

    logits = slots(gate) + torch.cat(bias.to(dtype).chunk(len(windows), 1))
    logits = logits.masked_fill((torch.cat(windows, 2) == t)[..., None], -torch.inf)
    weights = logits.masked_fill((first < 0)[..., None, None], 0).softmax(2)
    return (weights * slots(kv)).sum(2).to(kv.dtype)
