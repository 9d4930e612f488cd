"""Multi-token prediction, depth 1: from the streams at token t and the embedding of token t + 1 to token t + 2 (V4 2.4;
spec B.9).

    e  = enorm(Embed(token t + 1))
    X' = W_e e  broadcast over the streams  +  W_h hnorm(X), per stream;   X = the streams before the final collapse
    logits = Head( norm( hc_head( Block(X') ) ) )

Embedding and head are the main model's. The block is a sliding-window layer with a score router.

b batch · t tokens · n streams · d width
"""

from typing import Any

from torch import Tensor, nn

from .block import Block, Signals
from .config import ModelConfig
from .hyper import HyperHead
from .layout import Layout
from .norm import RMSNorm
from .quantization import linear


class MTP(Block):
    """A whole block with its own way in and its own collapse; tensors are named as in the release (mtp.0.*)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.num_hidden_layers)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = RMSNorm(d, eps), RMSNorm(d, eps), RMSNorm(d, eps)
        self.e_proj, self.h_proj = linear(config, d, d), linear(config, d, d)
        self.hc_head = HyperHead(config)
        for module in (self.e_proj, self.h_proj):
            nn.init.normal_(module.weight, std=config.initializer_range)

    def predict(
        self, streams: Tensor, next_embedding: Tensor, next_ids: Tensor, layout: Layout, **options: Any
    ) -> tuple[Tensor, Signals]:
        """Hidden states [b, t, d], ready for the head: position t predicts token t + 2. Options as of `Block`."""
        entering = self.e_proj(self.enorm(next_embedding)).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        streams, signals = self(entering, next_ids, layout, **options)
        return self.norm(self.hc_head(streams)), signals
