"""The lightning indexer: which compressed entries a query reads (V4 2.3.1 eqs. 13-17; spec B.5).

    q^I = RoPE( W_qb q_latent ),  k^I = Compressor(x),  w = W_w x  d^-1/2 h^-1/2
    I_{t,s} = sum_h w_{t,h} ReLU(<q^I_{t,h}, k^I_s>)

It has its own compressor. Its inputs are detached: the language-model loss does not reach it, it learns from
`index_loss` alone (V3.2; spec C.4). The Hadamard rotation serves FP4 queries and keys: those that the model rounds
(`quantization_aware.index`), and the keys of a cache with released storage. Without them it cancels and is left out.

b batch · t tokens · h index heads · d index head dim · p entries
"""

from typing import NamedTuple

from torch import Tensor, nn

from ..kernels import hadamard, rope
from ..kernels.precision import accumulation
from .cache import CompressorCache
from .compressor import Compressor
from .config import ModelConfig
from .layout import Layout
from .quantization import linear, rounded_index, rounding
from .storage import Coded


class IndexInputs(NamedTuple):
    """What `index_topk` and `index_loss` score with."""

    q: Tensor  # [b, t, h, d]
    weights: Tensor  # [b, t, h]
    keys: Tensor  # [b, p, d]


class Indexer(nn.Module):
    """Index queries, head weights and index keys. Flash: 64 heads of 128, top-512."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.std = config.index_n_heads, config.index_head_dim, config.initializer_range
        self.rounded = rounding(config, "index") is not None
        self.wq_b = linear(config, config.q_lora_rank, self.heads * self.head_dim)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.compressor = Compressor(config, layer, self.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.wq_b.weight, std=self.std)
        nn.init.normal_(self.weights_proj.weight, std=self.std)

    def forward(
        self, x: Tensor, q_latent: Tensor, rotation: Tensor, layout: Layout, cache: CompressorCache | None = None
    ) -> IndexInputs:
        x, q_latent = x.detach(), q_latent.detach()
        q = rope(self.wq_b(q_latent).unflatten(-1, (self.heads, self.head_dim)), rotation)
        weights = self.weights_proj(x)
        weights = weights.to(accumulation(weights)) * (self.head_dim * self.heads) ** -0.5
        keys = self.compressor(x, layout, cache)
        if isinstance(keys, Coded):
            q, keys = rounded_index(q) if self.rounded else hadamard(q), keys.values()
        elif self.rounded:
            q, keys = rounded_index(q), rounded_index(keys)
        return IndexInputs(q, weights, keys)
