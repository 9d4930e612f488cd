"""Mixture of experts with hash or score routing and one shared expert (V4 2.1, DeepSeekMoE; spec B.8).

    s = sqrt(softplus(W_g x))                               float32
    chosen = top-k of (s + bias), or tid2eid[token]         the bias selects, it never weights
    w = scale s[chosen] / sum s[chosen]
    y = sum_e W2_e( silu(min(W1_e x, 10)) clamp(W3_e x, -10, 10) w_e )
        + the same form, unweighted, for the shared expert

    balance = mean_b sum_e f_e P_e      f_e = E / (k t) count_e of the sequence, without gradient
                                        P_e = mean_t s_te / sum_e s_te

Which experts are counted is read in two ways (`balance_picks`): "biased" counts those that are chosen (TileKernels'
`aux_fi`), "unbiased" the top-k of s alone (V3, equations 17 to 20; Megatron-LM). Both agree while the bias is zero.

After a step the bias moves by one of two rules (`router_bias_rule`), from the T tokens of the step:

    sign        bias_e += speed sign(mean load - load_e)
    quantile    bias_e += speed (b_e - mean b - bias_e)         b_e = -(q + 1)-th largest over t of s_te - cut_t
                q = floor(k T / E)                              cut_t = (k + 1)-th largest over e of s_te + bias_e

The sign rule is V3's (2.1.2), the other Quantile Balancing (Su, kexue.fm/archives/11619; Kimi K3; Megatron-LM #5349):
with b, at most q tokens score above their cut at each expert, so b evens out the step while the cuts stay. A common
shift of the biases changes no choice. `speed` is a step in score there, a share of the way here: 1 is all of it, 1 -
speed the decay of Megatron's running mean. Passes and processes share b as the mean of theirs by their tokens.

b batch · t tokens · d width · E routed experts · k experts per token · n expert width · v vocabulary
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import Routing, balance_loss, exact_linear, moe_balance, moe_experts, moe_route, stable_topk, swiglu
from .config import ModelConfig
from .kept import KeepingModule
from .layout import Layout
from .quantization import linear, rounded_weight, rounding


class LoadSignal(NamedTuple):
    """What a router tells about the balance of its experts."""

    balance: Tensor  # sequence-wise balance loss, 1 = perfectly even
    counts: Tensor  # [E] assignments of real tokens


def shares(counts: Tensor) -> Tensor:
    """The load [..., E] of counts: each expert's share of the assignments."""
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


class Gate(KeepingModule):
    """Scores and choice of experts. `bias` moves against the load after each step; a hash gate has none."""

    KEPT = ("bias", "tid2eid")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.is_hash = config.is_hash(layer)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if self.is_hash:
            self.register_buffer(
                "tid2eid", torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
            )
        else:
            self.register_buffer("bias", torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.counts: Tensor | None = None  # [E] assignments since the last update of the bias; quantile: [2, E], below
        # them the biases that even out each pass, times its assignments
        self.replayed: Tensor | None = None  # [n, k] experts to take instead of choosing (`routing.py`)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.initializer_range)
        if not self.is_hash:
            nn.init.zeros_(self.bias)
        elif not self.tid2eid.is_meta:
            c = self.config
            table = hash_table(c.vocab_size, c.n_routed_experts, c.num_experts_per_tok, seed=self.layer)
            self.tid2eid.copy_(table)

    def forward(self, x: Tensor, ids: Tensor) -> Routing:
        """Routing of x [n, d], the tokens ids [n]."""
        logits = exact_linear(x, self.weight)
        c = self.config
        given = self.tid2eid[ids] if self.is_hash and self.replayed is None else self.replayed
        choice = {"bias": self.bias} if given is None else {"experts": given}
        return moe_route(logits, top_k=c.num_experts_per_tok, scale=c.routed_scaling_factor, **choice)

    @torch.no_grad()
    def count(self, counts: Tensor, scores: Tensor, real: Tensor | None) -> None:
        """Adds a training pass to what the bias will move by: counts [E], scores [b, t, E], real [b, t]."""
        c = self.config
        if c.router_bias_rule == "quantile":
            none = torch.zeros_like(counts)
            even = none if self.is_hash else even_bias(scores, self.bias, c.num_experts_per_tok, real)
            counts = torch.stack([counts, torch.where(counts.any(), counts.sum() * even, none)])
        self.counts = counts if self.counts is None else self.counts + counts

    def update_bias(self, speed: float | Tensor) -> None:
        """As `update_biases`, of this gate."""
        update_biases([self], speed)


@torch.no_grad()
def update_biases(gates: Sequence[Any], speed: float | Tensor) -> None:
    """Moves the biases by the rule of the page, from what each gate has counted since the last call."""
    counted = [gate for gate in gates if gate.counts is not None and hasattr(gate, "bias")]
    if counted:
        counts, biases = torch.stack([gate.counts for gate in counted]), [gate.bias for gate in counted]
        ways = _against(counts) if counts.ndim == 2 else _towards_even(counts, torch.stack(biases))
        torch._foreach_add_(biases, list((speed * ways).unbind()))
    for gate in gates:
        gate.counts = None


def _against(loads: Tensor) -> Tensor:
    return torch.sign(loads.mean(-1, keepdim=True) - loads)


def _towards_even(counts: Tensor, biases: Tensor) -> Tensor:
    """From biases [g, E] to those asked for [g, 2, E], the latter weighted; a gate that asks for no number stays."""
    load, asked = counts.unbind(1)
    even = asked / load.sum(-1, keepdim=True)
    way = even - even.mean(-1, keepdim=True) - biases
    return torch.where(way.isfinite(), way, 0.0)


@torch.no_grad()
def even_bias(scores: Tensor, bias: Tensor, top_k: int, real: Tensor | None = None) -> Tensor:
    """The bias b [E] that evens out the load of scores [..., E] while each token's cut stays; of `real` tokens [...].

    Where every expert is chosen, `bias` itself.
    """
    scores, e = scores.flatten(0, -2), scores.shape[-1]
    if top_k == e:
        return bias
    cut = (scores + bias).topk(top_k + 1, -1).values[:, -1:]
    above = scores - cut if real is None else (scores - cut).masked_fill(~real.flatten()[:, None], -torch.inf)
    tokens = real.sum() if real is not None else torch.full((), len(scores), device=scores.device)
    return -above.sort(0, descending=True).values.index_select(0, (top_k * tokens // e).view(1))[0]


class Experts(nn.Module):
    """The routed experts' weights, stacked: w13 [E, 2n, d] is W1 (gate) above W3 (up), w2 [E, d, n]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, n, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit, self.std = config.swiglu_limit, config.initializer_range
        self.format = rounding(config, "experts")
        self.w13 = nn.Parameter(torch.empty(e, 2 * n, d))
        self.w2 = nn.Parameter(torch.empty(e, d, n))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w13, std=self.std)
        nn.init.normal_(self.w2, std=self.std)

    def forward(self, x: Tensor, routing: Routing, shared: Tensor) -> Tensor:
        """What the chosen experts make of x [n, d], and the shared one's output, which is added."""
        w13, w2 = rounded_weight(self.w13, self.format, parts=2), rounded_weight(self.w2, self.format)
        return moe_experts(x, routing.experts, routing.weights, w13, w2, limit=self.limit, shared=shared)


class SharedExpert(nn.Module):
    """The expert of every token, clamped like the routed ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, d = config.moe_intermediate_size * config.n_shared_experts, config.hidden_size
        self.limit, self.std = config.swiglu_limit, config.initializer_range
        self.w13 = linear(config, d, 2 * n, parts=2)
        self.w2 = linear(config, n, d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w13.weight, std=self.std)
        nn.init.normal_(self.w2.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w13(x), self.limit))


class MoE(nn.Module):
    """x [b, t, d] to [b, t, d]. Flash: 256 routed experts of width 2048, 6 per token, one shared."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = Gate(config, layer)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(
        self, x: Tensor, ids: Tensor, layout: Layout, learn: bool = False, real: Tensor | None = None
    ) -> tuple[Tensor, LoadSignal | None]:
        """The sublayer's output and, if asked to learn, the router's balance over the `real` tokens [b, t]."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat, ids.flatten())
        out = self.experts(flat, routing, self.shared_experts(flat)).view(x.shape)
        return out, self._balance(routing, x.shape[:2], layout.real if real is None else real) if learn else None

    def _balance(self, routing: Routing, shape: torch.Size, real: Tensor | None) -> LoadSignal:
        """Hash layers are fixed by their table: their balance loss is left out of the objective (zero)."""
        gate = self.gate
        scores, experts = (x.unflatten(0, shape) for x in (routing.scores, routing.experts))
        real = None if real is None else real.expand(shape)
        loss, counts = moe_balance(scores, experts, real)
        counts = counts.to(torch.float32)
        if gate.training:
            gate.count(counts, scores, real)
        if gate.is_hash:
            loss = scores.new_zeros(())
        elif gate.config.balance_picks == "unbiased":
            loss = balance_loss(scores, stable_topk(scores, experts.shape[-1]), real)
        return LoadSignal(loss, counts)


def hash_table(vocabulary: int, experts: int, per_token: int, seed: int) -> Tensor:
    """A balanced table int64 [v, k] of distinct experts per token id; the released one is not documented (spec H.1).

    A block of E / gcd(E, k) consecutive ids deals a random permutation of the experts out, k to an id, going round
    k / gcd times: every expert gets the same number of ids of a block, and neighbouring ids, which tokenizers give to
    pieces of similar frequency, get different experts.
    """
    generator = torch.Generator().manual_seed(seed)
    block = experts // math.gcd(experts, per_token)
    blocks = -(-vocabulary // block)
    order = torch.rand(blocks, experts, generator=generator, device="cpu").argsort(-1)  # wherever the model is built
    deal = torch.arange(block * per_token, device="cpu") % experts
    return order[:, deal].reshape(-1, per_token)[:vocabulary].contiguous()
