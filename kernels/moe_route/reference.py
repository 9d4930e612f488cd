"""The definition of the router, which every engine is held against: scores, selection, weights, expert order, balance.

n tokens · e experts · k experts per token · b sequences · t tokens of a sequence
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation
from .routing import Balance, Permutation, Routing


def moe_route(
    logits: Tensor, *, top_k: int, scale: float, bias: Tensor | None = None, experts: Tensor | None = None
) -> Routing:
    """`s = sqrt(softplus(z))`; the first k by s + bias, NaN last, ties to the lowest id; `w = scale s / sum s`."""
    softplus = torch.logaddexp(logits.double(), logits.new_zeros((), dtype=torch.float64))  # float32 has no exp(-104)
    scores = softplus.sqrt().to(accumulation(logits))
    if experts is None:
        biased = scores.detach() if bias is None else scores.detach() + bias.detach()
        order = biased.masked_fill(biased.isnan(), -torch.inf).argsort(descending=True, stable=True)
        experts = order[:, :top_k]
    chosen = scores.gather(-1, experts)
    return Routing(scores, experts, scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20))


def moe_permutation(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Permutation:
    """Pairs sorted by expert, stably; what is not real has a place in the order and is not counted."""
    order = experts.flatten().argsort(stable=True)
    counted = experts if real is None else experts[real]
    counts = torch.bincount(counted.flatten(), minlength=num_experts)
    return Permutation(order, counts, order.argsort().view(experts.shape))


def moe_balance(scores: Tensor, experts: Tensor, real: Tensor | None = None) -> Balance:
    """`mean_b sum_e f_e P_e`: f the share of the picks, times e; P the mean share of the score."""
    e, k = scores.shape[-1], experts.shape[-1]
    real = torch.ones_like(experts[..., 0], dtype=torch.bool) if real is None else real
    length = real.sum(-1).clamp(min=1)[:, None]  # [b, 1]
    picks = (F.one_hot(experts, e).sum(2) * real[..., None]).sum(1)
    scores = scores.masked_fill(~real[..., None], 0)
    share = (scores / (scores.sum(-1, keepdim=True) + 1e-20)).sum(1) / length  # [b, e], as picks
    loss = (picks * share / length).sum() * (e / k) / real.any(-1).sum().clamp(min=1)
    return Balance(loss, picks.sum(0))
