"""The PyTorch engine of the router, right for every finite logit in float32 too; what it computes is defined in
`reference`, the axis letters are those of the package.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import tracked
from ..topk import stable_topk
from .routing import Balance, Permutation, Routing

ASYMPTOTE = -40.0  # below, log1p(exp z) = exp z to fp64 precision; fp32 would underflow from -87 on


def moe_route(
    logits: Tensor, *, top_k: int, scale: float, bias: Tensor | None = None, experts: Tensor | None = None
) -> Routing:
    """See `kernels.moe_route.moe_route`."""
    scores = sqrt_softplus(logits if logits.dtype == torch.float64 else logits.float())
    if experts is None:
        biased = scores.detach() if bias is None else scores.detach() + bias.detach()
        experts = stable_topk(biased, top_k)
    chosen = scores.gather(-1, experts)
    weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale
    return Routing(scores, experts, weights)


def sqrt_softplus(z: Tensor) -> Tensor:
    """`sqrt(log(1 + exp z))`, right in value and slope for every finite `z`."""
    return _SqrtSoftplus.apply(z) if tracked(z) else _sqrt_softplus(z)


def _sqrt_softplus(z: Tensor) -> Tensor:
    return torch.where(z < ASYMPTOTE, torch.exp(z / 2), F.softplus(z, threshold=40).sqrt_())


class _SqrtSoftplus(torch.autograd.Function):
    """Keeps s alone: sigma(z) = 1 - exp(-s^2), so ds/dz = (1 - exp(-s^2)) / (2 s), which tends to s / 2 for small s."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        s = _sqrt_softplus(z)
        ctx.save_for_backward(s)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        return grad * torch.where(s < 1e-8, s / 2, -torch.expm1(-s * s) / (2 * s))


def moe_permutation(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Permutation:
    """See `kernels.moe_route.moe_permutation`."""
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    row = torch.arange(pairs.numel(), device=pairs.device)
    inverse = torch.empty_like(order).scatter_(0, order, row)
    counted = torch.ones_like(experts) if real is None else real[:, None].expand_as(experts).long()
    counts = pairs.new_zeros(num_experts).scatter_add_(0, pairs, counted.flatten())
    return Permutation(order, counts, inverse.view(experts.shape))


def moe_balance(scores: Tensor, experts: Tensor, real: Tensor | None = None) -> Balance:
    """See `kernels.moe_route.moe_balance`; sums experts first: `sum_e f_e P_e = mean_t (f . s_t) / (1 . s_t)`."""
    b, t, e = scores.shape
    real = torch.ones(b, t, dtype=torch.bool, device=scores.device) if real is None else real
    length = real.sum(-1).clamp(min=1).to(scores.dtype)  # [b]
    counted = real[:, :, None].expand_as(experts).flatten(1)
    counts = experts.new_zeros(b, e).scatter_add_(1, experts.flatten(1), counted.long())
    load = counts.to(scores.dtype) * (e / (experts.shape[-1] * length[:, None]))
    share = (scores * load[:, None]).sum(-1) / (scores.sum(-1) + 1e-20)  # [b, t]
    loss = torch.where(real, share, 0.0).sum(-1) / length
    return Balance(loss.sum() / real.any(-1).sum().clamp(min=1), counts.sum(0))
