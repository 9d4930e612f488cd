"""V3 and V3.2 whole: plain residuals, latent attention, dense layers first, then mixtures of experts.

    x = Embed(ids);  x += Attention(norm(x)), x += FFN(norm(x)) for each layer;  logits = W_head norm(x) in float32

Training objective:  lm + balance_loss_weight balance + index_loss_weight index. The MTP module of the releases is not
part of it: checkpoints' tensors of it are left out.

b batch · t tokens · d width · v vocabulary · l layers
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels import cross_entropy, rope_rotation
from ..cache import Step, sent
from ..layout import check_reach, make_layout
from ..moe import shares, update_biases
from ..norm import RMSNorm
from ..rotary import scaled_frequencies
from ..transformer import IGNORED, Output, Transformer
from .attention import IndexSignal, LatentAttention, Reach
from .cache import LatentCache
from .config import LineageConfig
from .moe import Dense, GroupMoE, LoadSignal


class LineageBlock(nn.Module):
    """One layer; those that `config.is_dense` have a dense feed-forward."""

    def __init__(self, config: LineageConfig, layer: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm = RMSNorm(d, eps)
        self.attn = LatentAttention(config)
        self.ffn_norm = RMSNorm(d, eps)
        self.ffn = Dense(d, config.intermediate_size) if config.is_dense(layer) else GroupMoE(config)

    def forward(self, x: Tensor, real: Tensor | None, learn: bool, *where) -> tuple[Tensor, tuple]:
        y, index = self.attn(self.attn_norm(x), *where, learn)
        x = x + y
        if isinstance(self.ffn, Dense):
            return x + self.ffn(self.ffn_norm(x)), (index, None)
        y, load = self.ffn(self.ffn_norm(x), real, learn)
        return x + y, (index, load)


class LineageTransformer(nn.Module):
    """DeepSeek-V3 or V3.2; the interface of `Transformer`."""

    mtp = ()  # nothing to draft with
    _check, _check_range = Transformer._check, Transformer._check_range
    check_batch, _embedded, _like = Transformer.check_batch, Transformer._embedded, Transformer._like

    def __init__(self, config: LineageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LineageBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        logits_to_keep: int = 0,
        cache: LatentCache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Output:
        """Logits of the next token at each position, and the training losses if targets are given.

        Arguments as those of `Transformer.forward`.

        Raises:
            ValueError, IndexError: as `Transformer.forward`.
        """
        self._check(ids, targets, logits_to_keep)
        if cache is not None and (targets is not None or documents is not None):
            raise ValueError("targets and documents cannot be given together with a cache")
        if cache is None and lengths is not None:
            raise ValueError("lengths needs a cache; without one, mark padding by documents = -1")
        if cache is not None:
            return self._append(ids, cache, lengths, logits_to_keep)
        layout = make_layout(ids, documents)
        check_reach(layout, self.config.max_position_embeddings)
        rows = torch.arange(ids.shape[1], device=ids.device)[None]
        start = torch.zeros_like(rows) if layout.start is None else layout.start.minimum(rows)  # padding sees itself
        reach = self._reach(layout.positions, start, rows + 1, layout.start is None)
        x, signals = self._layers(self._embedded(ids), layout.real, targets is not None, reach, None, None)
        out = Output(x[:, -logits_to_keep:] if logits_to_keep else x, self.head.weight)
        if targets is not None:
            self._learn(out, x, targets if layout.real is None else targets.masked_fill(~layout.real, IGNORED), signals)
        return out

    def new_cache(self, batch_size: int, max_length: int, *, rewind: int = 0, storage: str = "exact") -> LatentCache:
        """An empty cache. It can be cut back by any number of tokens, whatever `rewind` is.

        Raises:
            ValueError: a size below 1 or above max_position_embeddings, or another storage than "exact".
        """
        if storage != "exact":
            raise ValueError(f"storage={storage!r}: {self.config.model_type} has 'exact' only")
        longest = self.config.max_position_embeddings
        if max_length > longest:
            raise ValueError(f"max_length={max_length}: the configuration allows max_position_embeddings={longest}")
        return LatentCache(self.config, batch_size, max_length, self._like())

    def update_router_bias(self, speed: float | Tensor | None = None) -> None:
        """Moves each router's bias against the load of the training passes since the last call (V3 2.1.2)."""
        speed = self.config.router_bias_update_speed if speed is None else speed
        update_biases([block.ffn.gate for block in self.layers if isinstance(block.ffn, GroupMoE)], speed)

    @torch.no_grad()
    def _append(self, ids, cache: LatentCache, lengths, logits_to_keep) -> Output:
        step = cache.begin(self.config, ids, lengths)
        positions = sent(step.past, ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        end = (positions + 1).clamp_max(cache.max_length)  # padding may lie behind it
        reach = self._reach(positions, torch.zeros_like(positions), end, False, max(step.past))
        x, _ = self._layers(self._embedded(ids), None, False, reach, cache, step)
        cache.past = [past + new for past, new in zip(step.past, step.new)]
        return Output(x[:, -logits_to_keep:], self.head.weight)  # -0 keeps all

    def _layers(self, x, real, learn, reach: Reach, cache, step: Step | None) -> tuple[Tensor, list[tuple]]:
        signals = []
        for layer, block in enumerate(self.layers):
            x, signal = block(x, real, learn, reach, layer, cache, step)
            signals.append(signal)
        return self.norm(x), signals

    def _reach(self, positions, start, end, causal: bool, past: int = 0) -> Reach:
        c = self.config
        frequencies = scaled_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling, positions.device)
        rotation = rope_rotation(positions, frequencies)
        if c.rope_scaling:
            rotation = rotation * c.rope_scaling.rotary
        return Reach(positions, start, end, causal, rotation, past)

    def _learn(self, out: Output, x, targets, signals: list[tuple[IndexSignal | None, LoadSignal | None]]) -> None:
        c = self.config
        lm = cross_entropy(x.flatten(0, 1), self.head.weight.to(x.dtype), targets.flatten(), ignore_index=IGNORED)
        index, loads = ([s[i] for s in signals if s[i] is not None] for i in (0, 1))
        out.losses = {"lm": lm}
        if loads:
            out.losses["balance"] = torch.stack([s.balance for s in loads]).sum()  # type: ignore[union-attr]
            out.metrics["load"] = shares(torch.stack([s.counts for s in loads]))  # type: ignore[union-attr]
        if index:
            out.losses["index"] = torch.stack([s.loss for s in index]).sum()  # type: ignore[union-attr]
            out.metrics["captured"] = torch.stack([s.captured for s in index])  # type: ignore[union-attr]
        weights = {"lm": 1.0, "balance": c.balance_loss_weight, "index": c.index_loss_weight}
        out.loss = sum(weights[name] * part for name, part in out.losses.items())  # type: ignore[assignment]
