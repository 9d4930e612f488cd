"""The opponent that everybody knows: a dense transformer, in the same loop and from the same recipe's keys.

    x = x + W_o softmax(Q K^T / sqrt(c) + causal, within the document) V;   q, k normalised per head and rotated
    x = x + W_2( silu(W_1 x) W_3 x )                                         one network for every token

Multi-head attention over all tokens before, by PyTorch's own kernel; RMSNorm before each sublayer; one residual stream.
Width, layers and heads are the recipe's, the network's inner width is moe_intermediate_size · n_shared_experts. No
window, no compression, no experts, no streams, no Engram.

b batch · t tokens · d width · h heads · c head dim
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import norm_rope
from ...model import Transformer
from ...model.cache import LayerCache
from ...model.config import ModelConfig
from ...model.layout import Layout
from ...model.moe import LoadSignal, SharedExpert
from ...model.rotary import token_rotation


class SelfAttention(nn.Module):
    """x [b, t, d] to [b, t, d]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kind, self.stage = config.layer_kind(layer), "sparse"  # what the loop and its observers look at
        d, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(inner, d, bias=False)
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(
        self, x: Tensor, layout: Layout, learn: bool = False, cache: LayerCache | None = None
    ) -> tuple[Tensor, None]:
        c, rotation = self.config, token_rotation(self.config, self.layer, layout)
        q, k, v = (f(x).unflatten(-1, (-1, c.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (norm_rope(heads, None, c.rms_norm_eps, rotation) for heads in (q, k))
        seen = None if layout.start is None else layout.once("causal", lambda: causal(layout.start))
        q, k, v = (rearrange(heads, "b t h c -> b h t c") for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        return self.o_proj(rearrange(out, "b h t c -> b t (h c)")), None


def causal(start: Tensor) -> Tensor:
    """[b, 1, t, t]: a token sees those from its document's first row, `start` [b, t], up to itself; padding, itself."""
    rows = torch.arange(start.shape[1], device=start.device)
    return ((rows <= rows[:, None]) & (rows >= start.minimum(rows)[..., None]))[:, None]


class NoRouter:
    """In the place of a router: nothing to count, nothing to move."""

    counts = None


class FeedForward(nn.Module):
    """The shared expert alone: x [b, t, d] to [b, t, d]. Its load is that of one expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = NoRouter()
        self.shared_experts = SharedExpert(config)

    def forward(
        self, x: Tensor, ids: Tensor, layout: Layout, learn: bool = False, real: Tensor | None = None
    ) -> tuple[Tensor, LoadSignal | None]:
        signal = LoadSignal(x.new_zeros((), dtype=torch.float32), x.new_ones(1, dtype=torch.float32))
        return self.shared_experts(x.flatten(0, 1)).view(x.shape), signal if learn else None


def dense_networks(model: Transformer) -> None:
    """One network for every token in the place of experts."""
    for block in (*model.layers, *model.mtp):
        block.ffn = FeedForward(model.config)


def dense_attention(model: Transformer) -> None:
    for layer, block in enumerate(model.layers):
        block.attn = SelfAttention(model.config, layer)
