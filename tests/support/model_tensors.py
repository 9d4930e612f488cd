"""Every tensor of the model, written out by hand: the oracle for parameter counts and checkpoint names."""

from abyssal.model.config import ModelConfig
from abyssal.model.kinds import SLIDING, SPARSE


def model_tensors(c: ModelConfig, engram_rows: dict[int, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Name to shape of all parameters and buffers; `engram_rows` gives the table rows of each Engram layer."""
    d, n, wide = c.hidden_size, c.hc_mult, c.hc_mult * c.hidden_size
    tensors = {
        "embed.weight": (c.vocab_size, d),
        "head.weight": (c.vocab_size, d),
        "norm.weight": (d,),
        **_head("hc_head", n, wide),
    }
    for layer in range(c.num_hidden_layers):
        tensors |= {f"layers.{layer}.{name}": shape for name, shape in _block(c, layer).items()}
        if c.engram and layer in c.engram.layers:
            memory = (c.engram.max_ngram - 1) * c.engram.heads * c.engram.head_dim
            fusion = {"table.weight": (engram_rows[layer], c.engram.head_dim), "wkv.weight": (wide + d, memory)}
            fusion |= {"h_norm": (n, d), "k_norm": (n, d), "canonical": (c.vocab_size,)}
            if c.engram.kernel_size:
                fusion |= {"conv_norm": (n, d), "conv": (c.engram.kernel_size, n, d)}
            tensors |= {f"layers.{layer}.engram.{name}": shape for name, shape in fusion.items()}
    if c.num_nextn_predict_layers:
        extra = {"e_proj.weight": (d, d), "h_proj.weight": (d, d), **_head("hc_head", n, wide)}
        extra |= {f"{norm}.weight": (d,) for norm in ("enorm", "hnorm", "norm")}
        block = _block(c, c.num_hidden_layers)
        tensors |= {f"mtp.0.{name}": shape for name, shape in {**block, **extra}.items()}
    return tensors


def is_buffer(name: str) -> bool:
    return name.endswith(("gate.bias", "gate.tid2eid", "engram.canonical"))


def _head(prefix: str, n: int, wide: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.fn": (n, wide), f"{prefix}.base": (n,), f"{prefix}.scale": (1,)}


def _block(c: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    d, n, experts, width = c.hidden_size, c.hc_mult, c.n_routed_experts, c.moe_intermediate_size
    shared, mixes = width * c.n_shared_experts, (c.hc_mult + 2) * c.hc_mult
    shapes = {
        "attn_norm.weight": (d,),
        "ffn_norm.weight": (d,),
        "attn.wq_a.weight": (c.q_lora_rank, d),
        "attn.q_norm.weight": (c.q_lora_rank,),
        "attn.wq_b.weight": (c.num_attention_heads * c.head_dim, c.q_lora_rank),
        "attn.wkv.weight": (c.head_dim, d),
        "attn.kv_norm.weight": (c.head_dim,),
        "attn.wo_a.weight": (c.o_groups * c.o_lora_rank, c.num_attention_heads // c.o_groups * c.head_dim),
        "attn.wo_b.weight": (d, c.o_groups * c.o_lora_rank),
        "attn.attn_sink": (c.num_attention_heads,),
        "ffn.gate.weight": (experts, d),
        "ffn.experts.w13": (experts, 2 * width, d),
        "ffn.experts.w2": (experts, d, width),
        "ffn.shared_experts.w13.weight": (2 * shared, d),
        "ffn.shared_experts.w2.weight": (d, shared),
    }
    for site in ("hc_attn", "hc_ffn"):
        shapes |= {f"{site}.fn": (mixes, n * d), f"{site}.base": (mixes,), f"{site}.scale": (3,)}
    if c.is_hash(layer):
        shapes["ffn.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
    else:
        shapes["ffn.gate.bias"] = (experts,)
    kind, ratio = c.layer_kind(layer), c.compress_ratio(layer)
    if kind != SLIDING:
        shapes |= _compressor("attn.compressor", d, c.head_dim, ratio, kind == SPARSE)
    if kind == SPARSE:
        shapes["attn.indexer.wq_b.weight"] = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        shapes["attn.indexer.weights_proj.weight"] = (c.index_n_heads, d)
        shapes |= _compressor("attn.indexer.compressor", d, c.index_head_dim, ratio, True)
    return shapes


def _compressor(prefix: str, d: int, width: int, ratio: int, overlap: bool) -> dict[str, tuple[int, ...]]:
    channels = 2 * width if overlap else width
    weights = {f"{prefix}.{name}.weight": (channels, d) for name in ("wkv", "wgate")}
    return {**weights, f"{prefix}.ape": (ratio, channels), f"{prefix}.norm.weight": (width,)}
