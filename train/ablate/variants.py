"""Variants of a built model, for experiments: each replaces or freezes modules, before the optimizer is made.

    as configured         nothing
    plain residual        x + F(norm(x)): one stream without mixing (wants hc_mult = 1)
    static mHC            mixing weights that are learned, but the same for every token: the projection is 0, frozen
    identity mixing       mHC whose streams never mix on their way past a sublayer: C = 1
    frozen indexer        index queries, weights and keys stay as they were initialised (wants index_loss_weight = 0)
    one-row table         every n-gram looks up the same row of its hash head: Engram without a memory
    n-gram logits         Engram's table, but added to the last hidden state: hashed n-grams in the logits
    dense networks        one network in the place of experts (`dense.py`)
    dense transformer     plain residual, plain attention, dense networks (wants hc_mult = 1, compress_ratios of 0)

What a configuration can say (no Engram, window only, no MTP) is an override of the recipe instead.

b batch · t tokens · n streams · d width
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import Coefficients, hyper_recombine
from ...model import Transformer
from ...model.cache import LayerCache
from ...model.config import EngramConfig, ModelConfig
from ...model.engram import Engram
from ...model.hyper import HyperConnection, HyperHead, Mix
from ...model.kinds import SPARSE
from ...model.layout import Layout
from ...model.tables import make_table
from .. import own
from .dense import dense_attention, dense_networks


class PlainResidual(nn.Module):
    """In the place of a hyper-connection of one stream: the sublayer reads x, and its output is added to x."""

    def forward(self, streams: Tensor) -> tuple[Tensor, Mix]:
        one = streams.new_ones(*streams.shape[:-2], 1)
        return streams[..., 0, :], Mix(one, one, one[..., None], streams)

    def recombine(self, output: Tensor, streams: Tensor, _: Mix) -> Tensor:
        return streams + output.unsqueeze(-2)


class PlainHead(nn.Module):
    """In the place of the final collapse: the one stream."""

    def forward(self, streams: Tensor) -> Tensor:
        return streams[..., 0, :]


class OneRow(Engram):
    """Engram whose hash heads have one row each: gate, projections and convolution without anything to remember."""

    def __init__(self, config: ModelConfig, memory: EngramConfig, layer: int) -> None:
        super().__init__(config, memory, layer)
        self.heads = (memory.max_ngram - 1) * memory.heads
        self.table = make_table(self.heads, memory.head_dim)
        nn.init.normal_(self.table.weight, std=self.std)

    def _hash(self, ids: Tensor, canonical: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        return torch.arange(self.heads, device=ids.device).expand(*ids.shape, self.heads)


class IdentityMixing(HyperConnection):
    """Each stream goes past the sublayer as it is; what the sublayer reads and writes is learned as ever."""

    def recombine(self, output: Tensor, streams: Tensor, coefficients: Mix | Coefficients) -> Tensor:
        identity = torch.eye(self.streams, device=streams.device, dtype=coefficients.comb.dtype)
        return hyper_recombine(output, streams, coefficients.post, identity + 0 * coefficients.comb)


class NgramLogits(nn.Module):
    """In the place of the final norm: norm(x) + W e_t, e_t the rows of the token's n-grams [b, t, m]."""

    def __init__(self, model: Transformer, memory: EngramConfig) -> None:
        super().__init__()
        self.norm, self.engram = model.norm, Engram(model.config, memory, memory.layers[0])
        for name in ("h_norm", "k_norm", "conv_norm", "conv"):
            if hasattr(self.engram, name):
                delattr(self.engram, name)
        self.engram.wkv = nn.Linear(self.engram.wkv.in_features, model.config.hidden_size, bias=False)
        nn.init.normal_(self.engram.wkv.weight, std=model.config.initializer_range)
        model.layers[0].register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.ids, self.layout = arguments[1], arguments[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.engram.wkv(self.engram.table(self.engram.rows(self.ids, self.layout)))


def plain_residual(model: Transformer) -> None:
    if model.config.hc_mult != 1:
        raise ValueError(f"model.hc_mult={model.config.hc_mult}: allowed is 1 for the plain residual")
    model.hc_head = PlainHead()
    for block in (*model.layers, *model.mtp):
        block.hc_attn, block.hc_ffn = PlainResidual(), PlainResidual()
    for mtp in model.mtp:
        mtp.hc_head = PlainHead()


def static_hyper_connections(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            nn.init.zeros_(module.fn)
            module.fn.requires_grad_(False)
            module.scale.requires_grad_(False)


def identity_mixing(model: Transformer) -> None:
    for site, block in enumerate((*model.layers, *model.mtp)):
        block.hc_attn = IdentityMixing(model.config, 2 * site)
        block.hc_ffn = IdentityMixing(model.config, 2 * site + 1)


def frozen_indexer(model: Transformer) -> None:
    if model.config.index_loss_weight:
        raise ValueError(f"model.index_loss_weight={model.config.index_loss_weight:g}: allowed is 0, it is frozen")
    for block in model.layers:
        if block.attn.kind == SPARSE:
            block.attn.indexer.requires_grad_(False)


def one_row_table(model: Transformer) -> None:
    if model.config.engram is None:
        raise ValueError("model.engram is not there: there is no table to cut down")
    device = model.embed.weight.device
    for layer, block in enumerate(model.layers):
        if block.engram is not None:
            block.engram = OneRow(model.config, model.config.engram, layer).to(device)


def ngram_logits(model: Transformer) -> None:
    memory = model.config.engram
    if memory is None:
        raise ValueError("model.engram is not there: there is no table to put into the logits")
    for block in model.layers:
        block.engram = None
    model.norm = NgramLogits(model, memory)


def dense_transformer(model: Transformer) -> None:
    if any(model.config.compress_ratios) or model.config.engram is not None:
        raise ValueError("model.compress_ratios and model.engram: allowed are zeros and none for a dense transformer")
    plain_residual(model)
    dense_attention(model)
    dense_networks(model)


VARIANTS: dict[str, Callable[[Transformer], None]] = {
    "as configured": lambda model: None,
    "plain residual": plain_residual,
    "static mHC": static_hyper_connections,
    "identity mixing": identity_mixing,
    "frozen indexer": frozen_indexer,
    "one-row table": one_row_table,
    "n-gram logits": ngram_logits,
    "dense networks": dense_networks,
    "dense transformer": dense_transformer,
}


def variant_of(name: str) -> Callable[[Transformer], None]:
    """One of ours, or a function of one's own by its reference (`train.own`)."""
    return VARIANTS[name] if name in VARIANTS else own.load(name)
