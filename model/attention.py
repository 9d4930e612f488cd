"""Sliding, compressed-sparse and heavily-compressed attention: the layer's ratio decides (V4 2.3; spec B.2 - B.5).

    q_latent = RMSNorm(W_qa x),  q = RoPE( W_qb q_latent / rms per head )
    kv = RoPE( RMSNorm(W_kv x) )                                     one head, K = V
    o = one softmax over window rows, compressed entries and a sink;  o = RoPE^-1(o, at the query)
    out = W_ob concat_g( W_oa[g] o_g )                               heads in groups

b batch · t tokens · h heads · c head dim · g output groups · r output rank · p compressed entries
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..kernels import attention, index_loss, index_topk, norm_rope, rope
from .cache import LayerCache
from .compressor import Compressor
from .config import ModelConfig
from .indexer import Indexer, IndexInputs
from .kept import KeepingModule
from .kinds import HEAVY, SPARSE
from .layout import Layout
from .norm import RMSNorm, norm_then_rope
from .quantization import linear, rounded_input, rounded_weight, rounding
from .rotary import token_rotation
from .storage import picked, values

STAGES = ("dense", "warmup", "sparse")


class IndexSignal(NamedTuple):
    """What a CSA layer tells about its indexer."""

    loss: Tensor  # KL to the attention's own distribution
    captured: Tensor  # share of the attention on visible entries that the picks hold


class Attention(KeepingModule):
    """x [b, t, d] to [b, t, d]. Flash: 64 heads of 512 (64 rotary), latent 1024, 8 groups of rank 1024, window 128."""

    KEPT = ("attn_sink",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.kind, self.ratio = config.layer_kind(layer), config.compress_ratio(layer)
        self.stage = "sparse"  # one of STAGES, see `Transformer.attention_stage`
        self.replayed: Tensor | None = None  # [b, t, k] entries to read instead of choosing (`routing.py`)
        self.recorded: list[Tensor] | None = None  # takes in the picks of each pass
        d, h, c = config.hidden_size, config.num_attention_heads, config.head_dim
        g, r = config.o_groups, config.o_lora_rank
        self.wq_a = linear(config, d, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = linear(config, config.q_lora_rank, h * c)
        self.wkv = linear(config, d, c)
        self.kv_norm = RMSNorm(c, config.rms_norm_eps)
        self.wo_a = linear(config, h // g * c, g * r)
        self.wo_b = linear(config, g * r, d)
        self.attn_sink = nn.Parameter(torch.empty(h, dtype=torch.float32))
        if self.ratio:
            self.compressor = Compressor(config, layer, c)
        if self.kind == SPARSE:
            self.indexer = Indexer(config, layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.wq_a, self.wq_b, self.wkv, self.wo_a, self.wo_b):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.attn_sink)

    def forward(
        self, x: Tensor, layout: Layout, learn: bool = False, cache: LayerCache | None = None
    ) -> tuple[Tensor, IndexSignal | None]:
        """The sublayer's output and, for a CSA layer that is asked to learn, the indexer's loss."""
        rotation = token_rotation(self.config, self.layer, layout)
        q_latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_latent).unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))
        q = norm_rope(q, None, self.config.rms_norm_eps, rotation)
        kv = norm_then_rope(self.kv_norm, self.wkv(x), rotation)
        if cache is not None:
            kv = cache.window.extend(kv, layout.step)
        out, signal = self._attend(x, q_latent, q, kv, rotation, layout, learn, cache)
        return self._project(rope(out, rotation, inverse=True)), signal

    def _attend(
        self,
        x: Tensor,
        q_latent: Tensor,
        q: Tensor,
        kv: Tensor,
        rotation: Tensor,
        layout: Layout,
        learn: bool,
        cache: LayerCache | None,
    ) -> tuple[Tensor, IndexSignal | None]:
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        sliding: dict[str, Any] = {"window": window, "window_start": layout.first_rows(window - 1), "scale": scale}
        if not self.ratio:
            return attention(q, kv, None, self.attn_sink, **sliding)[0], None
        entries = self.compressor.entries(layout)
        compressed = self.compressor(x, layout, cache and cache.compressor)
        visible: dict[str, Any] = {"start": entries.start, "end": entries.end}
        if self.kind == HEAVY:
            return attention(q, kv, values(compressed), self.attn_sink, **sliding, **visible)[0], None
        if self.stage == "dense" and cache is None:
            return attention(q, kv, compressed, self.attn_sink, **sliding, **visible)[0], None
        inputs = self.indexer(x, q_latent, rotation, layout, cache and cache.indexer)
        if self.stage != "sparse":
            return self._attend_densely(inputs, q, kv, values(compressed), sliding, visible, learn)
        compressed, picks = picked(compressed, self._picks(inputs, visible))
        out, lse = attention(q, kv, compressed, self.attn_sink, index=picks, **sliding)
        if not learn:
            return out, None
        learned = index_loss(*inputs, q, compressed, lse, scale=scale, index=picks, **visible)  # type: ignore[call-arg, misc]
        return out, IndexSignal(*learned)

    def _picks(self, inputs: IndexInputs, visible: dict[str, Any]) -> Tensor:
        """[b, t, k] the entries that each query reads, -1 = none."""
        picks = self.replayed
        if picks is None:
            picks = index_topk(*inputs, k=self.config.index_topk, **visible)
        if self.recorded is not None:
            self.recorded.append(picks)
        return picks

    def _attend_densely(
        self,
        inputs: IndexInputs,
        q: Tensor,
        kv: Tensor,
        compressed: Tensor,
        sliding: dict[str, Any],
        visible: dict[str, Any],
        learn: bool,
    ) -> tuple[Tensor, IndexSignal | None]:
        """CSA before it is sparse: all visible entries are read, and the indexer learns from all of them (V3.2 2.1)."""
        out, lse = attention(q, kv, compressed, self.attn_sink, **sliding, **visible)
        if not learn or self.stage == "dense":
            return out, None
        learned = index_loss(*inputs, q, compressed, lse, scale=sliding["scale"], **visible)  # type: ignore[call-arg, misc]
        return out, IndexSignal(*learned)

    def _project(self, out: Tensor) -> Tensor:
        """Grouped low-rank output: each group of heads to rank r, then all groups to d, with nothing between."""
        groups = self.config.o_groups
        grouped = rearrange(out, "b t (g h) c -> b t g (h c)", g=groups)
        if not isinstance(self.wo_a, nn.Linear):  # an adapter around it: what it makes of each group, for all of them
            every = self.wo_a(grouped).unflatten(-1, (groups, -1))
            return self.wo_b(every.diagonal(dim1=2, dim2=3).transpose(-1, -2).flatten(2))
        weight, format = self.wo_a.weight, rounding(self.config, "linears")
        if format is not None:
            grouped, weight = rounded_input(grouped), rounded_weight(weight, format)
        wo_a = rearrange(weight, "(g r) i -> g r i", g=groups)
        return self.wo_b(torch.einsum("btgi,gri->btgr", grouped, wo_a).flatten(2))
