"""Under which names checkpoints store V3 and V3.2.

    layout         experts' tensors                                   written by
    official       model.layers.3.mlp.experts.0.gate_proj.weight      DeepSeek, transformers by default, and here
    huggingface    model.layers.3.mlp.experts.gate_up_proj            transformers with its own names, and here

All else has one name. The releases' MTP module, model.layers.61 after 61 layers, is left out.
"""

import re
from collections.abc import Iterable

from .config import LineageConfig

Index = tuple[int | slice, ...]

_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LEAVES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
    **{f"attn.indexer.{part}": f"self_attn.indexer.{part}" for part in ("wq_b", "wk", "k_norm", "weights_proj")},
    "ffn.gate": "mlp.gate",
    "ffn.w2": "mlp.down_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
}


def sources(name: str, config: LineageConfig, layout: str) -> dict[str, Index]:
    """The names under which a layout stores one of our tensors, each with the part of it that it holds."""
    if name in _ENDS:
        return {_ENDS[name]: ()}
    _, layer, leaf = name.split(".", 2)
    stem, width = f"model.layers.{layer}", config.moe_intermediate_size
    if leaf == "ffn.gate.bias":
        return {f"{stem}.mlp.gate.e_score_correction_bias": ()}
    if leaf in ("ffn.w13.weight", "ffn.shared_experts.w13.weight"):
        inner = config.intermediate_size if leaf == "ffn.w13.weight" else width * config.n_shared_experts
        owner = "mlp" if leaf == "ffn.w13.weight" else "mlp.shared_experts"
        return {f"{stem}.{owner}.{part}.weight": (half,) for part, half in _halves(inner).items()}
    if leaf.startswith("ffn.experts."):
        return _experts(f"{stem}.mlp.experts", leaf, config, fused=layout == "huggingface")
    module, _, kind = leaf.rpartition(".")
    return {f"{stem}.{_LEAVES[module]}.{kind}": ()}


def _experts(stem: str, leaf: str, config: LineageConfig, fused: bool) -> dict[str, Index]:
    first = leaf == "ffn.experts.w13"
    if fused:
        return {f"{stem}.{'gate_up_proj' if first else 'down_proj'}": ()}
    experts = range(config.n_routed_experts)
    if first:
        halves = _halves(config.moe_intermediate_size)
        return {f"{stem}.{e}.{part}.weight": (e, half) for e in experts for part, half in halves.items()}
    return {f"{stem}.{e}.down_proj.weight": (e,) for e in experts}


def _halves(width: int) -> dict[str, slice]:
    return {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}


def layout_of(names: Iterable[str]) -> str:
    """The layout in which these tensors are named."""
    return "huggingface" if any(name.endswith("mlp.experts.gate_up_proj") for name in names) else "official"


def is_left_out(name: str, config: LineageConfig) -> bool:
    """Whether a stored tensor belongs to the MTP module, or is a table that follows from the configuration."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return (found is not None and int(found[1]) >= config.num_hidden_layers) or name.endswith("rotary_emb.inv_freq")
