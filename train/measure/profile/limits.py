"""What every mechanism has to compute and to move in a step: the formulas of `train.measure.roofline`, layer by layer.

A document is a sequence of its own: it is counted by its length. Weights count once a step, in the step's dtype.

n tokens · d width · s bytes of an element
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ....model.accounting import account, engram_sizes
from ....model.config import ModelConfig
from ....model.kinds import HEAVY, SLIDING, SPARSE
from .. import roofline
from ..roofline import Work
from .mechanisms import ATTENTIONS
from .observe import OPTIMIZER

Works = dict[tuple[str, str], list[Work]]  # by phase and mechanism, one for each op
OPTIMIZER_BYTES = 32  # of a parameter: AdamW reads 16 and writes 12, the gradient's norm reads 4


def document_lengths(documents: Tensor) -> list[int]:
    """Tokens of every document of a batch [b, t]; padding, -1, is none."""
    lengths: list[int] = []
    for row in documents:
        ids, counts = torch.unique_consecutive(row, return_counts=True)
        lengths += counts[ids >= 0].tolist()
    return lengths


class _Parts:
    """Collects the work of one phase after the other; with `into`, all of it is that one mechanism's."""

    def __init__(self, into: str = "") -> None:
        self.works: Works = defaultdict(list)
        self.into = into

    def add(self, mechanism: str, forward: Iterable[Work], backward: Iterable[Work] = ()) -> None:
        for phase, works in (("forward", forward), ("backward", backward)):
            self.works[phase, self.into or mechanism] += works

    def product(
        self, mechanism: str, n: int, inputs: int, outputs: int, weights: int, s: int, learns_input: bool = True
    ) -> None:
        """Rows of `inputs` values times `weights` to rows of `outputs`, as if nothing between reached memory."""
        rows = s * n * (inputs + outputs)
        forward = Work(2 * n * weights, rows + s * weights)
        if learns_input:
            backward = Work(4 * n * weights, rows + s * n * inputs + 2 * s * weights)
        else:
            backward = Work(2 * n * weights, rows + s * weights)
        self.add(mechanism, [forward], [backward])


def training_limits(config: ModelConfig, documents: list[int], itemsize: int) -> Works:
    """Of a training step on documents of these lengths."""
    parts, n, d, s = _Parts(), sum(documents), config.hidden_size, itemsize
    _embedding(parts, n, d, s)
    for layer in range(config.num_hidden_layers):
        _layer(parts, config, layer, documents, s)
    _ends(parts, config, n, s)
    if config.num_nextn_predict_layers:
        mtp = _Parts("MTP")
        _embedding(mtp, n, d, s)
        for rows in (n, n * config.hc_mult):
            _norm(mtp, rows * d, s)
            mtp.product("", rows, d, d, d * d, s)
        _layer(mtp, config, config.num_hidden_layers, documents, s)
        _ends(mtp, config, n, s)
        parts.works |= mtp.works
    parts.works[OPTIMIZER, OPTIMIZER] = [Work(0, OPTIMIZER_BYTES * account(config).trainable)]
    return dict(parts.works)


def _embedding(parts: _Parts, n: int, d: int, s: int) -> None:
    rows = roofline.elementwise(n * d, s, s)
    parts.add("embedding", [rows], [rows])


def _norm(parts: _Parts, values: int, s: int) -> None:
    parts.add("norms", [roofline.elementwise(values, s, s)], [roofline.elementwise(values, 2 * s, s)])


def _ends(parts: _Parts, c: ModelConfig, n: int, s: int) -> None:
    """The streams' last collapse, the last norm, head and loss."""
    streams = c.hc_mult * c.hidden_size
    flops, row = 2 * n * streams * (c.hc_mult + 1), s * n * c.hidden_size
    parts.add("mHC", [Work(flops, s * n * streams + row)], [Work(2 * flops, 2 * s * n * streams + row)])
    _norm(parts, n * c.hidden_size, s)
    head = roofline.CrossEntropy(n, c.hidden_size, c.vocab_size, s)
    parts.add("loss and head", [head.forward], [head.backward])


def _layer(parts: _Parts, c: ModelConfig, layer: int, documents: list[int], s: int) -> None:
    n, d = sum(documents), c.hidden_size
    site = roofline.Hyper(n, d, c.hc_mult, s)
    parts.add("mHC", 2 * [site.pre, site.post], 2 * [site.post_backward, site.pre_backward])
    for _ in range(2):
        _norm(parts, n * d, s)
    if c.engram and layer in c.engram.layers:
        _engram(parts, c, n, s)
    _attention(parts, c, layer, documents, s)
    _experts(parts, c, n, s)


def _engram(parts: _Parts, c: ModelConfig, n: int, s: int) -> None:
    assert c.engram is not None
    e, d = c.engram, c.hidden_size
    heads, streams = (e.max_ngram - 1) * e.heads, c.hc_mult * d
    op, memory = roofline.Engram(n, d, c.hc_mult, s), heads * e.head_dim
    parts.add("Engram", [op.hash(heads), op.lookup(heads, e.head_dim)], [roofline.elementwise(n * memory, s, s)])
    parts.product("Engram", n, memory, streams + d, memory * (streams + d), s)
    parts.add("Engram", [op.gate], [op.gate_backward])
    if e.kernel_size:
        row = n * streams
        parts.add("Engram", [roofline.elementwise(row, s, s)], [roofline.elementwise(row, 2 * s, s)])


def _attention(parts: _Parts, c: ModelConfig, layer: int, documents: list[int], s: int) -> None:
    n, d, kind, ratio = sum(documents), c.hidden_size, c.layer_kind(layer), c.compress_ratio(layer)
    width, dim = c.num_attention_heads * c.head_dim, c.head_dim
    inner = d * c.q_lora_rank + c.q_lora_rank * width + d * dim
    parts.product("projections", n, d, width + dim, inner, s)
    parts.product("projections", n, width, d, width * c.o_lora_rank + c.o_groups * c.o_lora_rank * d, s)
    picks = c.index_topk if kind == SPARSE else None
    ops = [roofline.Attention(t, c.num_attention_heads, dim, c.sliding_window, ratio, picks, s) for t in documents]
    parts.add(ATTENTIONS[kind], [_sum(op.forward for op in ops)], [_sum(op.backward for op in ops)])
    if kind != SLIDING:
        _compressor(parts, "compressor", c, documents, dim, ratio, kind == SPARSE)
    if kind == SPARSE:
        _indexer(parts, c, documents, ops, s)


def _compressor(
    parts: _Parts, mechanism: str, c: ModelConfig, documents: list[int], dim: int, ratio: int, overlap: bool
) -> None:
    """In float32, as in the release. The indexer's reaches nothing behind its input."""
    n, channels = sum(documents), 2 * (2 if overlap else 1) * dim
    parts.product(
        mechanism, n, c.hidden_size, channels, c.hidden_size * channels, 4, learns_input=mechanism != "indexer"
    )
    pools = [roofline.Pool(t, dim, ratio, overlap, 4) for t in documents]
    parts.add(mechanism, [_sum(pool.forward for pool in pools)], [_sum(pool.backward for pool in pools)])


def _indexer(parts: _Parts, c: ModelConfig, documents: list[int], attentions: list[roofline.Attention], s: int) -> None:
    n, heads, dim, ratio = sum(documents), c.index_n_heads, c.index_head_dim, attentions[0].ratio
    parts.product("indexer", n, c.q_lora_rank, heads * dim, c.q_lora_rank * heads * dim, s, learns_input=False)
    parts.product("indexer", n, c.hidden_size, heads, c.hidden_size * heads, s, learns_input=False)
    _compressor(parts, "indexer", c, documents, dim, ratio, overlap=True)
    ops = [roofline.Indexer(t, heads, dim, ratio, c.index_topk, s) for t in documents]
    parts.add("indexer", [_sum(op.topk for op in ops)])
    losses = [roofline.index_loss(op, attention) for op, attention in zip(ops, attentions)]
    parts.add("index loss", [_sum(losses)], [_sum(roofline.index_loss_backward(op) for op in ops)])


def _experts(parts: _Parts, c: ModelConfig, n: int, s: int) -> None:
    d, width = c.hidden_size, c.moe_intermediate_size
    m = roofline.MoE(n, d, width, c.n_routed_experts, c.num_experts_per_tok, s)
    learned = Work(4 * n * d * m.experts, 2 * s * n * d + 8 * d * m.experts + 4 * n * m.experts)
    routing = [roofline.moe_logits(m), roofline.moe_permutation(m)]
    parts.add("router", routing, [roofline.moe_route_backward(m), learned])
    up = [roofline.moe_up_backward(m), roofline.moe_combine(m), roofline.moe_up_weight(m)]
    parts.add(
        "experts",
        [roofline.moe_up(m), roofline.moe_down(m), roofline.moe_combine(m, shared=True)],
        [roofline.moe_down_backward(m), roofline.moe_down_weight(m), *up],
    )
    parts.product("shared expert", n, d, d, 3 * d * width * c.n_shared_experts, s)


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work(0, 0))


# decoding ------------------------------------------------------------------------------------------------------------


class _Token:
    """Collects the work of one token of each of `batch` sequences: a weight is read once, a key once a sequence."""

    def __init__(self, batch: int, itemsize: int) -> None:
        self.works: Works = defaultdict(list)
        self.batch, self.itemsize = batch, itemsize

    def product(self, mechanism: str, weights: int) -> None:
        self.works["decode", mechanism].append(Work(2 * self.batch * weights, self.itemsize * weights))

    def reads(self, mechanism: str, values: int, flops: int = 0) -> None:
        """`values` and `flops` of each sequence."""
        self.works["decode", mechanism].append(Work(self.batch * flops, self.itemsize * self.batch * values))


def decode_limits(config: ModelConfig, batch: int, length: int, itemsize: int) -> Works:
    """Of one token of each of `batch` sequences of `length` tokens: weights that are used and keys that are seen."""
    token, c = _Token(batch, itemsize), config
    streams = c.hc_mult * c.hidden_size
    for layer in range(c.num_hidden_layers):
        for _ in range(2):
            token.product("mHC", (c.hc_mult + 2) * c.hc_mult * streams)
            token.reads("mHC", 0, 2 * streams * (c.hc_mult + 2))
            token.reads("norms", c.hidden_size)
        _attention_token(token, c, layer, length)
        _experts_token(token, c)
    if c.engram:
        token.product("Engram", engram_sizes(c)[1])
        token.reads("Engram", (c.engram.max_ngram - 1) * c.engram.heads * c.engram.head_dim * len(c.engram.layers))
    token.product("mHC", c.hc_mult * streams)
    token.reads("norms", c.hidden_size)
    token.reads("embedding", c.hidden_size)
    token.product("loss and head", c.hidden_size * c.vocab_size)
    return dict(token.works)


def _attention_token(token: _Token, c: ModelConfig, layer: int, length: int) -> None:
    """A compressor reads the m tokens (2m with overlap) of an entry every m tokens: one or two of them a token."""
    d, kind, ratio = c.hidden_size, c.layer_kind(layer), c.compress_ratio(layer)
    width, index = c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim
    token.product("projections", d * c.q_lora_rank + c.q_lora_rank * width + d * c.head_dim)
    token.product("projections", width * c.o_lora_rank + c.o_groups * c.o_lora_rank * d)
    entries = length // ratio if ratio else 0
    keys = min(length, c.sliding_window) + (min(c.index_topk, entries) if kind == SPARSE else entries)
    token.reads(ATTENTIONS[kind], keys * c.head_dim + 2 * width, 4 * width * keys)
    overlap = 2 if kind == SPARSE else 1
    if kind in (SPARSE, HEAVY):
        token.product("compressor", d * 2 * overlap * c.head_dim)
        token.reads("compressor", overlap * 2 * overlap * c.head_dim)
    if kind == SPARSE:
        token.product("indexer", c.q_lora_rank * index + d * c.index_n_heads + d * 2 * overlap * c.index_head_dim)
        token.reads("indexer", entries * c.index_head_dim, 2 * index * entries)


def _experts_token(token: _Token, c: ModelConfig) -> None:
    expert, chosen = 3 * c.hidden_size * c.moe_intermediate_size, c.num_experts_per_tok
    visited = min(token.batch * chosen, c.n_routed_experts)
    token.product("router", c.hidden_size * c.n_routed_experts)
    flops = 2 * token.batch * chosen * expert
    token.works["decode", "experts"].append(Work(flops, token.itemsize * visited * expert))
    token.product("shared expert", expert * c.n_shared_experts)
