"""Under which names checkpoints store tensors: one function, `sources`, which reading and writing both follow.

    layout         tensor names                                          written by
    official       layers.0.attn.wq_a.weight, mtp.0.*                    DeepSeek, and here
    huggingface    model.layers.0.self_attn.q_a_proj.weight              transformers with its own names, and here
    hybrid         model.layers.0.attn.wq_a.weight                       transformers by default
    abyssal        layers.0.attn.wq_a.weight, layers.0.ffn.experts.w13   here: our own, in checkpoints of runs and for
                                                                         what transformers has no place for

This project's model stacks an expert layer's matrices (w13: W1 above W3, for all experts), the release stores them one
by one; everything else differs in name only. transformers has no place for the MTP block and ignores `mtp.*`: it is
written with its official names.
"""

import re
from collections.abc import Iterable

from ..config import ModelConfig

LAYOUTS = ("huggingface", "official", "abyssal")  # that are written
Index = tuple[int | slice, ...]

_MARKS = {
    "lm_head.weight": "huggingface",
    "model.embed_tokens.weight": "hybrid",
    "hc_head.fn": "abyssal",
    "embed.weight": "official",
}
_SHARED_COPIES = re.compile(r"mtp\.\d+\.(emb\b.*|embed\b.*|head\.weight)$")

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.experts.w13": "mlp.experts.gate_up_proj",
    "ffn.experts.w2": "mlp.experts.down_proj",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{f"hc_{site}.{part}": f"{site}_hc.{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head.{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}


def sources(name: str, config: ModelConfig, layout: str) -> dict[str, Index]:
    """The names under which a layout stores one of our tensors, each with the part of it that it holds.

    Raises:
        ValueError: the layout has no name for it.
    """
    if layout == "abyssal":
        return {name: ()}
    if name.startswith("mtp."):
        layout = "official"
    parts = _parts(name, config, fused=layout == "huggingface")
    return {_RENAME[layout](part): index for part, index in parts.items()}


def _parts(name: str, config: ModelConfig, fused: bool) -> dict[str, Index]:
    """Our tensor, or the matrices that it stacks, under names that `_RENAME` takes further."""
    stem, _, leaf = name.rpartition(".ffn.")
    width = config.moe_intermediate_size
    first, second = slice(0, width), slice(width, 2 * width)
    if leaf == "shared_experts.w13.weight":
        width *= config.n_shared_experts
        halves = {"w1": slice(0, width), "w3": slice(width, 2 * width)}
        return {f"{stem}.ffn.shared_experts.{w}.weight": (half,) for w, half in halves.items()}
    experts = range(config.n_routed_experts)
    if leaf == "experts.w13" and not fused:
        halves = {"w1": first, "w3": second}
        return {f"{stem}.ffn.experts.{e}.{w}.weight": (e, half) for e in experts for w, half in halves.items()}
    if leaf == "experts.w2" and not fused:
        return {f"{stem}.ffn.experts.{e}.w2.weight": (e,) for e in experts}
    return {name: ()}


def _official(name: str) -> str:
    return re.sub(r"\bhc_(attn|ffn|head)\.(fn|base|scale)$", r"hc_\1_\2", name)


def _hybrid(name: str) -> str:
    if name in _ENDS:
        return name if name == "head.weight" else _ENDS[name]
    return "model." + _official(name).replace(".attn.kv_norm.", ".attn.norm.")


def _huggingface(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    layers, layer, leaf = name.split(".", 2)
    if layers != "layers" or leaf not in _BLOCK:
        raise ValueError(f"{name}: the huggingface layout has no name for this tensor; save with layout='official'")
    return f"model.layers.{layer}.{_BLOCK[leaf]}"


_RENAME = {"official": _official, "hybrid": _hybrid, "huggingface": _huggingface}


def layout_of(names: Iterable[str]) -> str:
    """The layout in which these tensors are named. Raises ValueError if it is none."""
    found = set(names)
    for mark, layout in _MARKS.items():
        if mark in found:
            return layout
    raise ValueError(f"the checkpoint has none of {', '.join(_MARKS)}: it has {listed(sorted(found))}")


def is_shared_copy(name: str) -> bool:
    """Whether a stored tensor is the MTP block's copy of the embedding or the head, which it shares."""
    return bool(_SHARED_COPIES.match(name))


def listed(names: Iterable[str], most: int = 10) -> str:
    """The names, at most so many of them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
