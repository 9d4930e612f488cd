"""Sigmoid routing within groups, and the dense layers that come first (V3 2.1.2; DeepSeekMoE).

    s = sigmoid(W_g x)                                   float32
    group score = the two largest of (s + bias) in it    the best `topk_group` groups stay
    chosen = top-k of (s + bias) in those                the bias selects, it never weights
    w = scale s[chosen] / sum s[chosen]                  without the sum unless `norm_topk_prob`

b batch · t tokens · d width · E routed experts · g groups · k experts per token · n expert width
"""

import torch
from torch import Tensor, nn

from ...kernels import Routing, exact_linear, moe_balance, moe_experts, stable_topk, swiglu
from ..kept import KeepingModule
from ..moe import Gate, LoadSignal
from .config import LineageConfig


class GroupGate(KeepingModule):
    """Scores and choice of experts; ties go to the lowest group and the lowest expert."""

    KEPT = ("bias",)

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.counts: Tensor | None = None  # [E] assignments since the last update of the bias

    def forward(self, x: Tensor) -> Routing:
        """Routing of x [n, d]."""
        c = self.config
        scores = exact_linear(x, self.weight).sigmoid()
        with torch.no_grad():
            choice = (scores + self.bias).unflatten(-1, (c.n_group, -1))
            strength = choice.topk(2, -1).values.sum(-1)
            groups = stable_topk(strength, c.topk_group)
            out = torch.ones_like(strength, dtype=torch.bool).scatter_(-1, groups, False)
            chosen = stable_topk(choice.masked_fill(out[..., None], -torch.inf).flatten(-2), c.num_experts_per_tok)
        weights = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores=scores, experts=chosen, weights=weights * c.routed_scaling_factor)

    update_bias = Gate.update_bias


class Dense(nn.Module):
    """W2 (silu(W1 x) * W3 x), without a clamp; w13 is W1 above W3."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(width, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x), None))


class Experts(nn.Module):
    """The routed experts' weights, stacked: w13 [E, 2 n, d] is W1 (gate) above W3 (up), w2 [E, d, n]."""

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        e, n, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.w13 = nn.Parameter(torch.empty(e, 2 * n, d))
        self.w2 = nn.Parameter(torch.empty(e, d, n))


class GroupMoE(nn.Module):
    """x [b, t, d] to [b, t, d]. V3: 256 experts of 2048 in 8 groups, 8 per token out of 4 groups, one shared."""

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        self.gate = GroupGate(config)
        self.experts = Experts(config)
        inner = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = Dense(config.hidden_size, inner) if inner else None

    def forward(self, x: Tensor, real: Tensor | None, learn: bool) -> tuple[Tensor, LoadSignal | None]:
        flat = x.flatten(0, 1)
        routing = self.gate(flat)
        shared = None if self.shared_experts is None else self.shared_experts(flat)
        e = self.experts
        out = moe_experts(flat, routing.experts, routing.weights, e.w13, e.w2, limit=None, shared=shared)
        return out.view(x.shape), self._signal(routing, x.shape[:2], real) if learn else None

    def _signal(self, routing: Routing, shape: torch.Size, real: Tensor | None) -> LoadSignal:
        gate = self.gate
        scores, experts = (x.unflatten(0, shape) for x in (routing.scores, routing.experts))
        found = moe_balance(scores, experts, real)
        counts = found.counts.to(torch.float32)
        if gate.training:
            gate.counts = counts if gate.counts is None else gate.counts + counts
        return LoadSignal(found.loss, counts)
