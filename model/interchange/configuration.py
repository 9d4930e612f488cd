"""The configuration in transformers' keys, and back.

There each kind of layer has one ratio (`compress_rates`), routers are listed by layer (`mlp_layer_types`) and the two
rotary bases lie in `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..config import HEAVY, SLIDING, SPARSE, ModelConfig


def config_from_huggingface(data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that transformers writes for `deepseek_v4`, in our keys.

    There each kind of layer has one ratio (`compress_rates`), routers are listed by layer (`mlp_layer_types`) and the
    two rotary bases lie in `rope_parameters`.

    Raises:
        ValueError: a key is missing, or a value that V4 does not have; the message names it.
    """
    values = {key: value for key, value in data.items() if key not in _HF_IGNORED}
    missing = [key for key in ("layer_types", "compress_rates", "mlp_layer_types") if values.get(key) is None]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    for key, allowed in (("mlp_bias", False), ("router_jitter_noise", 0.0)):
        if values.pop(key, allowed) != allowed:
            raise ValueError(f"{key}={data[key]!r}: allowed is {allowed!r}")
    kinds, rates = values["layer_types"], values.pop("compress_rates")
    unknown = [kind for kind in kinds if kind != SLIDING and kind not in rates]
    if unknown:
        raise ValueError(f"layer_types has {unknown[0]!r}: compress_rates has {', '.join(rates)}")
    values["compress_ratios"] = [0 if kind == SLIDING else rates[kind] for kind in kinds]
    values["num_hash_layers"] = _hash_layers(values.pop("mlp_layer_types"))
    values.update(_rotary(values.pop("rope_parameters", None) or {}))
    partial = values.pop("partial_rotary_factor", None)
    if partial is not None:
        values.setdefault("qk_rope_head_dim", round(partial * values["head_dim"]))
    if "dtype" in values:
        values["torch_dtype"] = str(values.pop("dtype")).removeprefix("torch.")
    if isinstance(values.get("eos_token_id"), list) and len(values["eos_token_id"]) == 1:
        values["eos_token_id"] = values["eos_token_id"][0]
    return values


def config_to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """The configuration in the keys of transformers' `DeepseekV4Config`; `config_from_huggingface` inverts it.

    Raises:
        ValueError: what transformers cannot hold: Engram, two ratios for one kind of layer, several shared experts.
    """
    layers, heads = config.num_hidden_layers, config.head_dim
    if config.engram is not None:
        raise ValueError("the huggingface layout has no Engram: save with layout='official'")
    if config.n_shared_experts != 1:
        raise ValueError(f"n_shared_experts={config.n_shared_experts}: the huggingface layout has exactly one")
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_HF}
    values |= {"dtype": config.torch_dtype, "layer_types": list(config.layer_types[:layers])}
    values["compress_rates"] = {SPARSE: _one_ratio(config, SPARSE, 4), HEAVY: _one_ratio(config, HEAVY, 128)}
    values["mlp_layer_types"] = ["hash_moe" if config.is_hash(i) else "moe" for i in range(layers)]
    partial = config.qk_rope_head_dim / heads
    while int(partial * heads) < config.qk_rope_head_dim:  # transformers truncates the product
        partial = math.nextafter(partial, 1.0)
    values["partial_rotary_factor"] = partial
    yarn: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling:
        scaling = config.to_dict()["rope_scaling"]
        yarn = {"rope_type": scaling.pop("type"), **scaling, "attention_factor": 1.0}
    values["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": partial},
        "compress": {**yarn, "rope_theta": config.compress_rope_theta, "partial_rotary_factor": partial},
    }
    return dict(sorted(values.items()))


_NOT_HF = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
_HF_IGNORED = (
    *("_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef"),
)


def _hash_layers(kinds: list[str]) -> int:
    count = sum(kind == "hash_moe" for kind in kinds)
    if list(kinds) != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise ValueError(f"mlp_layer_types={list(kinds)}: allowed are hash_moe layers first, then moe layers")
    return count


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `compress_rope_theta` and `rope_scaling` out of transformers' nested `rope_parameters`."""
    values: dict[str, Any] = {}
    for branch, theta in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        table = dict(parameters.get(branch) or {})
        table.pop("partial_rotary_factor", None)
        kind, also = table.pop("rope_type", "default"), table.pop("type", None)
        if "rope_theta" in table:
            values[theta] = table.pop("rope_theta")
        if kind not in (("default",) if branch == "main" else ("default", "yarn")) or also not in (None, kind):
            raise ValueError(
                f"rope_parameters.{branch}.rope_type={kind!r}: allowed is 'default', or 'yarn' in compress"
            )
        if table.pop("attention_factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters.{branch}.attention_factor: V4 has no attention temperature, only 1.0")
        if kind == "yarn":
            values["rope_scaling"] = {"type": "yarn", **table}
    return values


def _one_ratio(config: ModelConfig, kind: str, default: int) -> int:
    ratios = {ratio for k, ratio in zip(config.layer_types, config.compress_ratios) if k == kind}
    if len(ratios) > 1:
        raise ValueError(f"{kind} layers have the ratios {sorted(ratios)}: the huggingface layout has one for all")
    return ratios.pop() if ratios else default
