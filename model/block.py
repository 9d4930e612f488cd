"""One layer: attention and mixture of experts, each between its own hyper-connection (V4 2; spec B.0).

    X = Sublayer(X, attention);  X = Sublayer(X, experts)
    Sublayer(X, F):  u, mix = mHC(X);  y = F(RMSNorm(u));  X <- recombine(y, X, mix),  X by way of mix

With Engram, the memory is added to the streams before the attention's hyper-connection.

b batch · t tokens · n streams · d width
"""

from typing import NamedTuple

from torch import Tensor, nn

from .attention import Attention, IndexSignal
from .cache import LayerCache
from .config import ModelConfig
from .engram import Engram
from .hyper import HyperConnection
from .layout import Layout
from .moe import LoadSignal, MoE
from .norm import RMSNorm


class Signals(NamedTuple):
    """What a layer tells the objective; None for a mechanism that it does not have, or if it was not asked to learn."""

    indexer: IndexSignal | None
    router: LoadSignal | None


class Block(nn.Module):
    """Streams [b, t, n, d] to streams. `layer` = num_hidden_layers is the block of the MTP module."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        memory = config.engram
        self.engram = Engram(config, memory, layer) if memory and layer in memory.layers else None
        self.hc_attn = HyperConnection(config, 2 * layer)
        self.attn_norm = RMSNorm(d, eps)
        self.attn = Attention(config, layer)
        self.hc_ffn = HyperConnection(config, 2 * layer + 1)
        self.ffn_norm = RMSNorm(d, eps)
        self.ffn = MoE(config, layer)

    def forward(
        self,
        streams: Tensor,
        ids: Tensor,
        layout: Layout,
        *,
        learn: bool = False,
        real: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Signals]:
        """`learn` asks for the signals of the objective; `real` [b, t] narrows the tokens that count in the balance."""
        if self.engram is not None:
            streams = streams + self.engram(streams, ids, layout, cache)
        u, mix = self.hc_attn(streams)
        y, index = self.attn(self.attn_norm(u), layout, learn, cache)
        streams = self.hc_attn.recombine(y, mix.streams, mix)
        u, mix = self.hc_ffn(streams)
        y, load = self.ffn(self.ffn_norm(u), ids, layout, learn, real)
        return self.hc_ffn.recombine(y, mix.streams, mix), Signals(index, load)
