"""Variants of a built model, for experiments: each replaces or freezes modules, before the optimizer is made.

    as configured         nothing
    plain residual        x + F(norm(x)): one stream without mixing (wants hc_mult = 1)
    static mHC            mixing weights that are learned, but the same for every token: the projection is 0, frozen
    frozen indexer        index queries, weights and keys stay as they were initialised (wants index_loss_weight = 0)
    one-row table         every n-gram looks up the same row of its hash head: Engram without a memory

What a configuration can say (no Engram, window only, no MTP) is an override of the recipe instead.

b batch · t tokens · n streams · d width
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...model import Transformer
from ...model.cache import LayerCache
from ...model.config import EngramConfig, ModelConfig
from ...model.engram import Engram
from ...model.hyper import HyperConnection, HyperHead, Mix
from ...model.kinds import SPARSE
from ...model.layout import Layout
from ...model.tables import make_table
from .. import own


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


VARIANTS: dict[str, Callable[[Transformer], None]] = {
    "as configured": lambda model: None,
    "plain residual": plain_residual,
    "static mHC": static_hyper_connections,
    "frozen indexer": frozen_indexer,
    "one-row table": one_row_table,
}


def variant_of(name: str) -> Callable[[Transformer], None]:
    """One of ours, or a function of one's own by its reference (`train.own`)."""
    return VARIANTS[name] if name in VARIANTS else own.load(name)
