"""Multi-head latent attention (MLA, V3 2.1.1) and sparse attention over raw tokens (DSA, V3.2 2.1).

    c_q = RMSNorm(W_qa x)     q_h = [ q_nope | RoPE(q_rope) ] = W_qb c_q
    c, k_rope = W_kva x       latent  [ RMSNorm(c) | RoPE(k_rope) ],  all that is remembered of a token
    k_h = [ W_kb c | k_rope ]     v_h = W_vb c

*Expanded*: keys and values of all heads, 2 (n + r + v) FLOPs per pair and head. *Absorbed*: W_kb moves to the query,
<W_kb^T q_nope, c> + <q_rope, k_rope>, and W_vb behind the sum, so that the latent itself is key and value of one shared
head: 2 (2 c + r) FLOPs a pair, but nothing is expanded. Both compute the same. Few queries, and sparse ones, are
absorbed.

DSA: the indexer scores raw tokens, I_s = sum_h w_h ReLU(<q_h, k_s>), and each query attends to its top-k alone. It
learns from the KL to the attention's own probabilities on them, detached from all else.

b batch · t queries · s rows · h heads · n r v c widths of nope, rope, value, latent
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import attention, index_loss, index_topk, rope
from ...kernels.precision import accumulation
from ..cache import Step
from ..kept import KeepingModule
from ..norm import RMSNorm
from .cache import LatentCache
from .config import LineageConfig

EPS = 1e-6  # of the norms of both latents, whatever rms_norm_eps is
BLOCK = 512  # queries whose mask and scores are held at once


class Reach(NamedTuple):
    """Which rows each query sees: [start, end), with its own row last. `causal`: all before it, no mask needed."""

    positions: Tensor  # [b|1, t] in its document
    start: Tensor  # [b|1, t]
    end: Tensor  # [b|1, t]
    causal: bool
    rotation: Tensor  # complex [b|1, t, r / 2]
    past: int = 0  # the most that any row of a cache holds


class IndexSignal(NamedTuple):
    """What a DSA layer tells about its indexer: KL, and the share of the attention that it picked."""

    loss: Tensor
    captured: Tensor


class LayerNorm(KeepingModule, nn.LayerNorm):
    """(x - mean) / std over the last axis, weighed and shifted in float32, as in the release."""

    KEPT = ("weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        return super().forward(x.to(wide)).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer of V3.2: one key per token, by LayerNorm; RoPE on the first r channels, half-split.

    A rotation of channels that queries and keys share leaves their products alone: the rotary channels are put last and
    interleaved, where `rope` turns them.
    """

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        self.heads, self.width, self.rotary = (
            config.index_n_heads or 0,
            config.index_head_dim or 0,
            config.qk_rope_head_dim,
        )
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = LayerNorm(self.width, eps=1e-6, dtype=torch.float32)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [b, t, h, w], head weights [b, t, h] and keys [b, t, w]."""
        q = self._turned(rearrange(self.wq_b(q_latent), "b t (h w) -> b t h w", h=self.heads), rotation)
        k = self._turned(self.k_norm(self.wk(x)), rotation)
        weights = self.weights_proj(x)
        return q, weights.to(accumulation(weights)) * (self.heads * self.width) ** -0.5, k

    def _turned(self, x: Tensor, rotation: Tensor) -> Tensor:
        rotary = rearrange(x[..., : self.rotary], "... (half pair) -> ... (pair half)", half=2)
        return rope(torch.cat([x[..., self.rotary :], rotary], -1), rotation)


class LatentAttention(nn.Module):
    """x [b, t, d] to [b, t, d]. V3: 128 heads of 128 + 64, values of 128, query rank 1536, latent 512 + 64."""

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        self.config = config
        d, h = config.hidden_size, config.num_attention_heads
        n, r, v, c = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank
        self.scale = (n + r) ** -0.5 * config.temperature
        self.wq_a = nn.Linear(d, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, EPS)
        self.wq_b = nn.Linear(config.q_lora_rank, h * (n + r), bias=False)
        self.wkv_a = nn.Linear(d, c + r, bias=False)
        self.kv_norm = RMSNorm(c, EPS)
        self.wkv_b = nn.Linear(c, h * (n + v), bias=False)
        self.wo = nn.Linear(h * v, d, bias=False)
        self.indexer = Indexer(config) if config.sparse else None
        # expanding s latents costs c (n + v) s, absorbing t queries 2 c + r - (n + r + v) more per pair
        self.few = c * (n + v) / max(2 * c - n - v, 1)

    def forward(
        self, x: Tensor, reach: Reach, layer: int, cache: LatentCache | None, step: Step | None, learn: bool
    ) -> tuple[Tensor, IndexSignal | None]:
        """`step` is what is appended to the cache."""
        c = self.config
        q_latent = self.q_norm(self.wq_a(x))
        q = rope(rearrange(self.wq_b(q_latent), "b t (h w) -> b t h w", h=c.num_attention_heads), reach.rotation)
        latent, k_rope = self.wkv_a(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = rope(torch.cat([self.kv_norm(latent), k_rope], -1), reach.rotation)
        index, keys = None, latent[..., :0]
        if self.indexer is not None:
            *index, keys = self.indexer(x.detach(), q_latent.detach(), reach.rotation)
        if cache is not None and step is not None:
            latent, keys = cache.append(layer, step, latent, keys)
        signal = None
        if index is not None:
            out, signal = self._sparse(q, latent, (*index, keys), reach, learn)
        elif x.shape[1] < self.few:
            out, _, _ = self._absorbed(q, latent, reach, None)
        else:
            out = self._expanded(q, latent, reach)
        return self.wo(out.flatten(2)), signal

    def _sparse(self, q, latent, index, reach: Reach, learn: bool) -> tuple[Tensor, IndexSignal | None]:
        seen = {"start": reach.start, "end": reach.end}
        picks = index_topk(*index, k=self.config.index_topk or 0, **seen)
        out, absorbed, lse = self._absorbed(q, latent, reach, picks)
        if not learn:
            return out, None
        index_q, weights, keys = index
        learned = index_loss(
            index_q, weights, keys, absorbed, latent, lse,
            scale=self.scale, start=reach.start, end=reach.end, index=picks,
        )  # fmt: skip
        return out, IndexSignal(*learned)

    def _absorbed(self, q, latent, reach: Reach, picks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [b, t, h, v], the queries that saw latents, [b, t, h, c + r], and their log-sum-exp.

        One shared head over latents is the op of V4 without a window and without a sink.
        """
        c = self.config
        w_k, w_v = self._weights()
        nope, rotary = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        absorbed = torch.cat([torch.einsum("bthn,hnc->bthc", nope, w_k), rotary], -1)
        t, room = q.shape[1], latent.shape[1]
        rows = latent[:, :t] if t <= room else F.pad(latent, (0, 0, 0, t - room))  # columns of padding alone
        no_sink = q.new_full((c.num_attention_heads,), -torch.inf, dtype=torch.float32)
        none = torch.full_like(reach.end, t)  # the window begins after the last of its rows
        out, lse = attention(
            absorbed, rows, latent, no_sink,
            window=1, window_start=none, scale=self.scale, start=reach.start, end=reach.end, index=picks,
        )  # fmt: skip
        return torch.einsum("bthc,hvc->bthv", out[..., : c.kv_lora_rank], w_v), absorbed, lse

    def _expanded(self, q, latent, reach: Reach) -> Tensor:
        c = self.config
        w_k, w_v = self._weights()
        plain, rotary = latent.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        k = torch.einsum("bsc,hnc->bhsn", plain, w_k)
        k = torch.cat([k, rotary[:, None].expand(*k.shape[:3], -1)], -1)
        v = torch.einsum("bsc,hvc->bhsv", plain, w_v)
        q = q.transpose(1, 2)
        if reach.causal and k.shape[2] == q.shape[2]:
            return self._dot_product(q, k, v, None).transpose(1, 2)
        blocks = []
        for first in range(0, q.shape[2], BLOCK):
            block = slice(first, first + BLOCK)
            start, end = reach.start[:, block, None], reach.end[:, block, None]
            last = min(reach.past + first + BLOCK, k.shape[2])
            row = torch.arange(last, device=q.device)
            seen = ((row >= start) & (row < end))[:, None]
            blocks.append(self._dot_product(q[:, :, block], k[:, :, :last], v[:, :, :last], seen))
        return torch.cat(blocks, 2).transpose(1, 2)

    def _dot_product(self, q, k, v, seen: Tensor | None) -> Tensor:
        """torch's attention, whose kernels want equal widths."""
        wide, narrow = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=self.scale)
        return out[..., :narrow]

    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_kb [h, n, c] and W_vb [h, v, c]."""
        c = self.config
        both = rearrange(self.wkv_b.weight, "(h w) c -> h w c", h=c.num_attention_heads)
        return both.split([c.qk_nope_head_dim, c.v_head_dim], 1)
