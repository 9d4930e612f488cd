"""Reading a prompt in chunks: the cache grows with it, nothing else does (V4 3.6).

    chunk = budget / (rows x bytes of one token's temporaries)

The temporaries are those of the layer that needs most: streams before and after it, and what its attention, its experts
or its memory hold at once. They are a function of the configuration; the ops' own blocks, of a fixed number of scores,
come on top.

b batch · t tokens · n streams · d width · v vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import Cache
from ..config import ModelConfig
from ..kinds import SLIDING, SPARSE
from ..lineage.config import LineageConfig
from ..transformer import Output, Transformer

BUDGET = 512 * 2**20
LARGEST = 4096  # tokens of a chunk, all rows together: longer ones gain nothing


@torch.no_grad()
def prefill(
    model: Transformer,
    ids: Tensor,
    cache: Cache,
    lengths: Tensor | Sequence[int] | None = None,
    budget: int = BUDGET,
    *,
    chunk: int | None = None,
    keep_streams: int = 0,
) -> Output:
    """Appends ids [b, t] to the cache and returns logits [b, 1, v], those after each row's last real token.

    Args:
        lengths: how many of the t tokens are real in each row, from the left, at least one; None = all.
        budget: bytes that the temporaries of a chunk may take.
        chunk: tokens per row and pass; None = as many as the budget allows.
        keep_streams: the Output's `streams` hold that many last positions, or all that there are; not with `lengths`.

    Raises:
        ValueError: what the model's pass with a cache raises, a row without tokens, or a size that is not positive.
        IndexError: a token id outside the vocabulary. After an error the cache is as it was.
    """
    model._check(ids, None, 0)
    step = cache.begin(model.config, ids, lengths)
    _check(step.new, lengths, budget, chunk, keep_streams)
    b, t = len(ids), max(step.new)
    hidden = streams = None
    for first, last in _pieces(t, chunk or chunk_tokens(model.config, model.embed.weight.element_size(), b, budget)):
        new = None if lengths is None else [min(max(n - first, 0), last - first) for n in step.new]
        out = model(ids[:, first:last], cache=cache, lengths=new, logits_to_keep=0 if new else 1)
        hidden = _last_real(out.hidden, new, hidden)
        streams = _append_last(streams, out.streams, keep_streams)
        del out
    return Output(hidden, model.head.weight, streams=streams)


def chunk_tokens(config: ModelConfig | LineageConfig, value_bytes: int, rows: int, budget: int = BUDGET) -> int:
    """Tokens of each row that a pass may take: at least one, at most `LARGEST` of all rows together."""
    return max(1, min(LARGEST, budget // bytes_per_token(config, value_bytes)) // rows)


def bytes_per_token(config: ModelConfig | LineageConfig, value_bytes: int) -> int:
    """What one token's temporaries take at most in a pass with a cache, for activations of `value_bytes`."""
    if isinstance(config, LineageConfig):
        return _lineage_bytes(config, value_bytes)
    streams = config.hc_mult * config.hidden_size
    layers = range(config.num_hidden_layers)
    sublayer = max(_attention_bytes(config, layer, value_bytes) for layer in layers)
    sublayer = max(sublayer, _expert_bytes(config, value_bytes), _memory_bytes(config, value_bytes))
    return 2 * streams * value_bytes + sublayer


def _attention_bytes(c: ModelConfig, layer: int, value: int) -> int:
    """Queries before and after norm and rotation, then the output; keys, latents, and the compressors' float32 rows."""
    query = c.num_attention_heads * c.head_dim
    total = value * (4 * query + 3 * c.head_dim + 2 * c.q_lora_rank + 2 * c.hidden_size)
    kind = c.layer_kind(layer)
    if kind == SLIDING:
        return total
    overlap = 2 if kind == SPARSE else 1
    total += 4 * 4 * overlap * c.head_dim
    if kind == SPARSE:
        index = c.index_n_heads * c.index_head_dim
        total += value * 3 * index + 4 * 4 * overlap * c.index_head_dim + 8 * c.index_topk
    return total


def _expert_bytes(c: ModelConfig | LineageConfig, value: int) -> int:
    """Each slot's float32 output and the routing, beside the shared expert's rows."""
    shared = 3 * c.n_shared_experts * c.moe_intermediate_size
    slots = c.num_experts_per_tok * (4 * c.hidden_size + 6 * 8)
    return slots + 3 * 4 * c.n_routed_experts + value * (shared + 4 * c.hidden_size)


def _lineage_bytes(c: LineageConfig, value: int) -> int:
    """Streams, and of the sublayers the larger: queries, absorbed ones and outputs, or experts and dense layers."""
    heads, query = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    wide = heads * (3 * query + 3 * (c.kv_lora_rank + c.qk_rope_head_dim) + c.v_head_dim)
    index = 3 * (c.index_n_heads or 0) * (c.index_head_dim or 0) * value + 8 * (c.index_topk or 0)
    experts = max(_expert_bytes(c, value), 3 * c.intermediate_size * value)
    return 2 * c.hidden_size * value + max(value * (wide + 2 * c.q_lora_rank) + index, experts)


def _memory_bytes(c: ModelConfig, value: int) -> int:
    """Engram's rows, keys and values, and the streams that the gate and the convolution make of them."""
    if c.engram is None:
        return 0
    rows = (c.engram.max_ngram - 1) * c.engram.heads
    streams = c.hc_mult * c.hidden_size
    return rows * (3 * 8 + value * c.engram.head_dim) + value * (7 * streams + c.hidden_size)


def _check(new: list[int], lengths, budget: int, chunk: int | None, keep_streams: int) -> None:
    for name, value, least in (("budget", budget, 1), ("chunk", chunk, 1), ("keep_streams", keep_streams, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: allowed are integers from {least}")
    if min(new) < 1:
        raise ValueError(f"lengths={new}: every row needs at least one token")
    if keep_streams and lengths is not None:
        raise ValueError(f"keep_streams={keep_streams} together with lengths: only rows of one length keep streams")


def _pieces(t: int, chunk: int) -> list[tuple[int, int]]:
    """(first, end) of as few pieces of at most `chunk` as it takes, all about as long."""
    count = -(-t // chunk)
    return [(t * i // count, t * (i + 1) // count) for i in range(count)]


def _last_real(hidden: Tensor, new: list[int] | None, before: Tensor | None) -> Tensor:
    """[b, 1, d] of each row's last real column; of the chunk before where a row has none here."""
    if new is None:
        return hidden[:, -1:]
    last = torch.tensor(new, device=hidden.device)
    here = hidden[torch.arange(len(new), device=hidden.device), last - 1][:, None]
    return here if before is None else torch.where((last > 0)[:, None, None], here, before)


def _append_last(streams: Tensor | None, new: Tensor, keep: int) -> Tensor | None:
    """The last `keep` positions of both; a copy, so that the chunk can be freed."""
    if not keep:
        return None
    new = new[:, -keep:]
    return new.clone() if streams is None else torch.cat([streams, new], 1)[:, -keep:]
