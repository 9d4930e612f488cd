"""The compressor: m tokens become one entry by a softmax over time, per channel (V4 2.3.1 eqs. 9-12, 2.3.2; spec B.3).

    k_t = W_kv x_t,  z_t = W_gate x_t + ape[t mod m]
    c_i = RoPE( RMSNorm( sum_j softmax_j(z_j) k_j ), at i m )

Without overlap (HCA) j runs over the m tokens of window i. With overlap (CSA) every token has two of each: the second
half of its channels goes into its own window's entry, the first half into the next one's, and c_i pools 2m slots.
Projection, softmax and pooling are in float32, as in the release.

b batch · t tokens · m ratio · c head dim · p entries
"""

import torch
from torch import Tensor, nn

from ..kernels import exact_linear, pool
from .cache import CompressorCache, unfinished_tokens
from .config import ModelConfig
from .kept import KeepingModule
from .kinds import SPARSE
from .layout import Entries, Layout
from .norm import RMSNorm, norm_then_rope
from .rotary import entry_rotation
from .storage import Coded


class ExactLinear(nn.Linear):
    """A linear map without bias, in float32 whatever x is kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return exact_linear(x, self.weight)


class Compressor(KeepingModule):
    """x [b, t, d] to entries [b, p, c], normed and rotated to their first token. Flash: c = 512 (index keys: 128)."""

    KEPT = ("ape",)

    def __init__(self, config: ModelConfig, layer: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.ratio = config.compress_ratio(layer)
        self.overlap = config.layer_kind(layer) == SPARSE
        self.keep = unfinished_tokens(self.ratio, self.overlap)
        channels = (2 if self.overlap else 1) * head_dim
        self.wkv = ExactLinear(config.hidden_size, channels, bias=False)
        self.wgate = ExactLinear(config.hidden_size, channels, bias=False)
        self.ape = nn.Parameter(torch.empty(self.ratio, channels, dtype=torch.float32))
        self.norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.wkv.weight, std=self.config.initializer_range)
        nn.init.normal_(self.wgate.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.ape)

    def entries(self, layout: Layout) -> Entries:
        """Where the entries of this call come from, and who sees them."""
        return layout.entries(self.ratio, self.keep)

    def forward(self, x: Tensor, layout: Layout, cache: CompressorCache | None = None) -> Tensor | Coded:
        """The entries of the call; with a cache, all entries so far, as it stores them."""
        entries = self.entries(layout)
        k, z = self.wkv(x), self.wgate(x)
        if cache is None:
            return self._pool(k, z, layout, x.dtype)
        k, z = cache.tail.extend(torch.cat([k, z], -1), layout.step).chunk(2, -1)
        if entries.positions.shape[1]:
            cache.store.write(self._pool(k, z, layout, x.dtype), layout.step, self.ratio)
        return cache.store.seen(layout.step, self.ratio)

    def _pool(self, k: Tensor, z: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        entries = self.entries(layout)
        pooled = pool(
            k, z, self.ape, ratio=self.ratio, overlap=self.overlap, first=entries.first, follows=entries.follows
        )
        return norm_then_rope(self.norm, pooled.to(dtype), entry_rotation(self.config, self.layer, layout, entries))
