"""The whole model: embedding to n streams, layers, collapse, norm, head (V4 2; spec B.0).

    X = n copies of Embed(ids);  X = Block_l(X) for each layer;  x = norm(hc_head(X));  logits = W_head x in float32

Training objective:  lm + mtp_loss_weight mtp + balance_loss_weight balance + index_loss_weight index.

b batch · t tokens · n streams · d width · v vocabulary · l layers · E experts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cross_entropy, exact_linear
from ..kernels.precision import compute_dtype
from ..kernels.watch import told
from .attention import STAGES
from .block import Block, Signals
from .cache import Cache, FixedStep, Step, continue_layout
from .config import ModelConfig
from .decode import decode
from .hyper import HyperHead, separation, spread
from .layout import Layout, check_reach, make_layout
from .losses import IGNORED, LossShares, has_next, next_targets
from .moe import shares as load_shares
from .moe import update_biases
from .mtp import MTP
from .norm import RMSNorm
from .recompute import recomputed


@dataclass
class Output:
    """What a forward pass gives. The logits are worked out at first use: a training step never holds [b, t, v]."""

    hidden: Tensor  # [b, t, d] after the final norm
    head: Tensor  # [v, d]
    loss: Tensor | None = None  # the weighted sum of `losses`
    losses: dict[str, Tensor] = field(default_factory=dict)  # "lm", "mtp", and, summed over layers, "balance", "index"
    metrics: dict[str, Tensor] = field(default_factory=dict)  # "load" [l, E], "captured" [csa layers], "spread" [l]
    streams: Tensor | None = None  # [b, t, n, d] before the collapse, of a pass with a cache: what `draft` starts from
    _logits: Tensor | None = field(default=None, repr=False)

    @property
    def logits(self) -> Tensor:
        """[b, t, v] float32."""
        if self._logits is None:
            self._logits = exact_linear(self.hidden, self.head)
        return self._logits


class Transformer(nn.Module):
    """DeepSeek-V4 with optional Engram layers; builds under `torch.device("meta")` for the full-size configurations.

    `recompute` layers at a time are worked out again in the backward pass, to save memory (`recompute.py`); 0 = none.
    `attention_stage` says what CSA layers read (V4 4.2.2, V3.2 2.1): "sparse", the default, the indexer's picks;
    "dense", all visible entries, without the indexer; "warmup", all visible entries, from which the indexer learns.
    `fast_decode` lets one token at a time on a CPU run in numpy where that computes the same (`decode.py`); it and the
    environment variable `ABYSSAL_FAST_DECODE=0` turn it off.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = 0
        self.changed_by = ""  # code of somebody's own, which `save_pretrained` cannot write down
        self.fast_decode = True
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
        for weight in (self.embed.weight, self.head.weight):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        shares: LossShares | None = None,
    ) -> Output:
        """Logits of the next token at each position, and the training losses if targets are given.

        Args:
            ids: int64 [b, t] token ids.
            targets: int64 [b, t] the token to predict at each position; -100 = ignored.
            documents: int64 [b, t] which document each token belongs to, -1 = padding, on either side. Documents never
                see each other: attention, compression, n-grams, convolution and MTP stop at their borders.
            logits_to_keep: only the last that many positions' logits; 0 = all.
            cache: what was seen before; the tokens are appended to it, any number in any split. Nothing is
                differentiated then.
            lengths: with a cache, how many of the t tokens are real in each row, from the left; None = all.
            shares: the batch is a part of a step, and these are its shares in the means: the losses are what it adds to
                the step's (`losses.py`); None = it is the whole step.

        Raises:
            ValueError: an empty sequence, ids that are not int64 [b, t], a document of more than
                `max_position_embeddings` tokens, targets or documents of another shape, a cache together with targets
                or documents, a cache that does not fit or would overflow (it is unchanged then).
            IndexError: a token id outside the vocabulary, in ids or in targets.

        Values on a GPU are not looked at, as that would wait for it: `check_batch` looks at them on the host.
        There, such an id ends in an assertion of the device, such a target in a loss of NaN. In compiled code on a CPU
        such values end in a RuntimeError or an IndexError of torch's.
        """
        self._check(ids, targets, logits_to_keep)
        if cache is not None:
            return self._append(ids, cache, lengths, targets, documents, logits_to_keep)
        if lengths is not None:
            raise ValueError("lengths needs a cache; without one, mark padding by documents = -1")
        layout = make_layout(ids, documents)
        check_reach(layout, self.config.max_position_embeddings)
        learn = targets is not None
        streams = self._streams(ids)
        signals: list[Signals] = []
        separations: list[Tensor] = []
        for group in self._groups():
            streams, found, apart = self._run(group, _through, group, streams, ids, layout, learn)
            signals += found
            separations += apart
        hidden = self._hidden(streams)
        out = Output(hidden[:, -logits_to_keep:] if logits_to_keep else hidden, self.head.weight)
        if learn:
            self._learn(out, hidden, streams, ids, targets, layout, signals, shares)
            out.metrics["spread"] = spread(separations)
        return out

    @property
    def attention_stage(self) -> str:
        return self.layers[0].attn.stage

    @attention_stage.setter
    def attention_stage(self, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(f"attention_stage={stage!r}: allowed are {', '.join(STAGES)}")
        for block in (*self.layers, *self.mtp):
            block.attn.stage = stage

    def check_batch(self, ids: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> None:
        """Raises what `forward` raises of such a batch on a CPU: for the host's copy of what goes on to a GPU."""
        self._check(ids, targets, 0)
        check_reach(make_layout(ids, documents), self.config.max_position_embeddings)

    def _groups(self) -> list[Sequence[Block]]:
        """The layers in groups of `recompute`, or all in one."""
        if self.recompute < 0:
            raise ValueError(f"recompute={self.recompute}: allowed are 0 (none) and numbers of layers")
        size = self.recompute or len(self.layers)
        return [self.layers[start : start + size] for start in range(0, len(self.layers), size)]

    def _run(self, blocks: Sequence[Block], run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if not self.recompute:
            return run(*arguments, **options)
        return recomputed(blocks, run, *arguments, **options)

    def new_cache(self, batch_size: int, max_length: int, *, rewind: int = 0, storage: str = "exact") -> Cache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens that can be cut back by up to `rewind`
        of them.

        Args:
            storage: "exact" holds what the model computes, in its dtype. "released" rounds as the release does: window
                keys and compressed entries to E4M3 in groups of 64, their rotary channels to bfloat16, and index keys,
                Hadamard-rotated, to E2M1 in groups of 32. Open compression windows and Engram's state stay exact.

        Raises:
            ValueError: a size that is not positive, `max_length` above `max_position_embeddings`, an unknown storage,
                or "released" where index_head_dim is no power of two.
        """
        longest = self.config.max_position_embeddings
        if max_length > longest:
            raise ValueError(f"max_length={max_length}: the configuration allows max_position_embeddings={longest}")
        return self._cache(range(self.config.num_hidden_layers), batch_size, max_length, rewind, storage)

    def new_draft_cache(self, batch_size: int, max_length: int, *, rewind: int = 0, storage: str = "exact") -> Cache:
        """An empty cache of the MTP block, for `draft`; storage as of `new_cache`.

        Raises:
            ValueError: the model has no MTP module, a size that is not positive, or a storage that is not allowed.
        """
        if not self.mtp:
            raise ValueError("num_nextn_predict_layers=0: this model has no MTP module to draft with")
        return self._cache([self.config.num_hidden_layers], batch_size, max_length, rewind, storage)

    def _cache(self, layers: Sequence[int], batch_size: int, max_length: int, rewind: int, storage: str) -> Cache:
        return Cache(self.config, layers, batch_size, max_length, rewind=rewind, storage=storage, like=self._like())

    def _like(self) -> Tensor:
        """An empty tensor where the model is, in the dtype that a pass computes in now."""
        weight = self.embed.weight.detach()
        return weight.new_empty(0, dtype=weight.dtype if weight.is_meta else compute_dtype(weight))  # no meta autocast

    @torch.no_grad()
    def draft(
        self, streams: Tensor, next_ids: Tensor, cache: Cache, lengths: Tensor | Sequence[int] | None = None
    ) -> Output:
        """Logits of token t + 2 from the streams at t, as a cached pass gives them, and token t + 1 (MTP, spec B.9).

        Positions are appended to `cache` (`new_draft_cache`). The block sees a sliding window only and RoPE is
        relative, so that drafting may begin anywhere in the sequence, a window before the first draft that counts.

        Args:
            streams: [b, t, n, d], `Output.streams`.
            next_ids: int64 [b, t], the token after each position.
            lengths: how many of the t positions are real in each row; None = all.
        """
        self._check(next_ids, None, 0)
        step = cache.begin(self.config, next_ids, lengths, drafts=True)
        layout = continue_layout(step, next_ids.device)
        mtp = self.mtp[0]
        with cache.appending(step):
            hidden, _ = mtp.predict(streams, self._embedded(next_ids), next_ids, layout, cache=cache.layers[0])
        return Output(hidden, self.head.weight)

    @torch.no_grad()
    def _append(
        self,
        ids: Tensor,
        cache: Cache,
        lengths: Tensor | Sequence[int] | None,
        targets: Tensor | None,
        documents: Tensor | None,
        logits_to_keep: int,
    ) -> Output:
        for name, value in (("targets", targets), ("documents", documents)):
            if value is not None:
                raise ValueError(f"{name} cannot be given together with a cache")
        step = cache.begin(self.config, ids, lengths)
        found = decode(self, ids, step, cache, lambda: self._continue(ids, step, cache, 0))
        if found is None:
            with cache.appending(step):
                found = self._continue(ids, step, cache, logits_to_keep)
        hidden, streams = found
        return Output(hidden[:, -logits_to_keep:], self.head.weight, streams=streams)  # -0 keeps all

    def _continue(
        self, ids: Tensor, step: Step | FixedStep, cache: Cache, logits_to_keep: int
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the last tokens and streams of all, by the modules, which append to the layers' caches."""
        layout = continue_layout(step, ids.device)
        streams = self._streams(ids)
        for block, state in zip(self.layers, cache.layers):
            streams, _ = block(streams, ids, layout, cache=state)
        return self._hidden(streams[:, -logits_to_keep:]), streams

    def _streams(self, ids: Tensor) -> Tensor:
        """[b, t, n, d]: n copies of each token's embedding."""
        return self._embedded(ids).unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()

    def _embedded(self, ids: Tensor) -> Tensor:
        """[b, t, d] in the dtype that the model computes in: that of autocast, else of the weights."""
        embedded = self.embed(ids)
        return embedded.to(compute_dtype(embedded))

    def _hidden(self, streams: Tensor) -> Tensor:
        """[b, t, d]: the streams read into one, normalised, as the head takes it."""
        return self.norm(self.hc_head(streams))

    def update_router_bias(self, speed: float | Tensor | None = None) -> None:
        """Moves each score router's bias against the load of the training passes since the last call (spec C.5).

            bias_e += speed sign(mean load - load_e)        or by quantiles of the scores, see `model/moe.py`

        speed: default `config.router_bias_update_speed`, 0.001; as a tensor [] it may be on the device. Call it after
            each optimizer step.
        """
        speed = self.config.router_bias_update_speed if speed is None else speed
        update_biases([block.ffn.gate for block in (*self.layers, *self.mtp)], speed)

    def _learn(
        self,
        out: Output,
        hidden: Tensor,
        streams: Tensor,
        ids: Tensor,
        targets: Tensor,
        layout: Layout,
        signals: list[Signals],
        shares: LossShares | None,
    ) -> None:
        """Fills in loss, losses and metrics."""
        c = self.config
        targets = targets if layout.real is None else targets.masked_fill(~layout.real, IGNORED)
        shares = shares or LossShares(1.0, 1.0, 1.0, 1.0, (1.0,) * len(signals))
        lm = self._cross_entropy(hidden, targets)
        out.losses["lm"] = lm * shares.lm
        weights = {"lm": 1.0, "mtp": c.mtp_loss_weight, "balance": c.balance_loss_weight, "index": c.index_loss_weight}
        for mtp in self.mtp:
            loss, signal = told(self._mtp_loss, mtp)(mtp, streams, ids, targets, layout)
            out.losses["mtp"], signals = loss * shares.mtp, [*signals, signal]
        routers = [s.router for s in signals if s.router is not None]
        index = [s.indexer for s in signals if s.indexer is not None]
        share = [shares.balance] * len(self.layers) + [shares.mtp_balance] * len(self.mtp)
        out.losses["balance"] = torch.stack([r.balance * part for r, part in zip(routers, share)]).sum()
        if index:
            out.losses["index"] = torch.stack([i.loss * part for i, part in zip(index, shares.indexer)]).sum()
        out.loss = sum(weights[name] * part for name, part in out.losses.items())
        out.metrics["load"] = load_shares(torch.stack([r.counts for r in routers]))
        out.metrics["captured"] = torch.stack([i.captured for i in index]) if index else hidden.new_zeros(0)

    def _mtp_loss(
        self, mtp: MTP, streams: Tensor, ids: Tensor, targets: Tensor, layout: Layout
    ) -> tuple[Tensor, Signals]:
        """Position t predicts from token t + 1 the target of position t + 1, if that is of the same document."""
        next_ids, follows = ids.roll(-1, 1), has_next(ids, layout)
        hidden, signals = self._run(
            [mtp], mtp.predict, streams, self._embedded(next_ids), next_ids, layout, learn=True, real=follows
        )
        return self._cross_entropy(hidden, next_targets(targets, follows)), signals

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Products in the hidden states' dtype, logits and loss in float32."""
        head = self.head.weight.to(hidden.dtype)
        return cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), ignore_index=IGNORED)

    def _check(self, ids: Tensor, targets: Tensor | None, logits_to_keep: int) -> None:
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}: it must be int64 [batch, tokens]"
            )
        if ids.numel() == 0:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: at least one sequence of at least one token is needed")
        if not 0 <= logits_to_keep <= ids.shape[1]:
            raise ValueError(
                f"logits_to_keep={logits_to_keep}: allowed are 0 (all) to {ids.shape[1]}, the sequence's length"
            )
        if targets is not None and (targets.shape != ids.shape or targets.dtype != torch.int64):
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}, dtype {targets.dtype}: it must be int64 {list(ids.shape)}"
            )
        if ids.is_cpu and not torch.compiler.is_compiling():
            self._check_range("ids", ids)
            if targets is not None:
                self._check_range("targets", targets.masked_fill(targets == IGNORED, 0))

    def _check_range(self, name: str, ids: Tensor) -> None:
        last = self.config.vocab_size - 1
        lowest, highest = map(int, ids.aminmax())
        if lowest < 0 or highest > last:
            bad = lowest if lowest < 0 else highest
            also = " (and -100 = ignored)" if name == "targets" else ""
            raise IndexError(f"{name} holds token id {bad}: allowed are 0 to {last}{also}")


def _through(
    blocks: Sequence[Block], streams: Tensor, ids: Tensor, layout: Layout, learn: bool
) -> tuple[Tensor, list[Signals], list[Tensor]]:
    """The streams after some layers, what each tells the objective, and how far the streams are apart after each."""
    signals, apart = [], []
    for block in blocks:
        streams, signal = block(streams, ids, layout, learn=learn)
        signals.append(signal)
        if learn:
            apart.append(separation(streams))
    return streams, signals, apart
