"""Configurations in the keys of transformers, to ours and back: plain tables in, plain tables out.

    V4    each kind of layer has one ratio (`compress_rates`), routers are listed by layer (`mlp_layer_types`) and the
          two rotary bases lie in `rope_parameters`
    V3    dense layers are listed by layer (`mlp_layer_types`), base and YaRN lie in `rope_parameters`

A table in our keys passes through, without what describes the program that wrote it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .fields import drop_fixed
from .kinds import HEAVY, SLIDING, SPARSE, kinds_of

# Keys that describe the program that wrote or serves a configuration, not the model.
BOOKKEEPING = (
    *("_name_or_path", "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef"),
    *("transformers_version", "use_cache"),
)
# Keys of V3's configurations that say how a checkpoint is stored or trained, or follow from others.
_LINEAGE_IGNORED = (
    *("architectures", "auto_map", "aux_loss_alpha", "ep_size", "expert_dtype", "head_dim", "layer_types"),
    *("num_key_value_heads", "num_local_experts", "num_nextn_predict_layers", "pretraining_tp", "qk_head_dim"),
    *("quantization_config", "seq_aux"),
)
_THEIRS = ("compress_rates", "mlp_layer_types", "rope_parameters")  # what only transformers writes
_OURS = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")  # what it does not know


def from_huggingface(data: Mapping[str, Any]) -> dict[str, Any]:
    """A V4 configuration in our keys, from those of the release, ours, or the ones that transformers writes.

    Raises:
        ValueError: transformers' keys are not all there, or have a value that V4 does not; the message names it.
    """
    values = _own(data)
    if not any(key in data for key in _THEIRS):
        return values
    missing = [key for key in ("layer_types", "compress_rates", "mlp_layer_types") if values.get(key) is None]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    drop_fixed(values, {"mlp_bias": False, "router_jitter_noise": 0.0})
    kinds, rates = values["layer_types"], values.pop("compress_rates")
    strange = [kind for kind in kinds if kind != SLIDING and kind not in rates]
    if strange:
        raise ValueError(f"layer_types has {strange[0]!r}: compress_rates has {', '.join(rates)}")
    values["compress_ratios"] = [0 if kind == SLIDING else rates[kind] for kind in kinds]
    values["num_hash_layers"] = _first(values.pop("mlp_layer_types"), "hash_moe", "moe")
    values.update(_rotary(values.pop("rope_parameters", None) or {}))
    partial = values.pop("partial_rotary_factor", None)
    if partial is not None:
        values.setdefault("qk_rope_head_dim", round(partial * values["head_dim"]))
    return values


def to_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig.to_dict()` in the keys of transformers' `DeepseekV4Config`; `from_huggingface` inverts it.

    Raises:
        ValueError: what transformers cannot hold: Engram, two ratios for one kind of layer, several shared experts.
    """
    if "engram" in values:
        raise ValueError("the huggingface layout has no Engram: save with layout='official'")
    if values["n_shared_experts"] != 1:
        raise ValueError(f"n_shared_experts={values['n_shared_experts']}: the huggingface layout has exactly one")
    layers, hashed, ratios = values["num_hidden_layers"], values["num_hash_layers"], values["compress_ratios"]
    kinds = values.get("layer_types") or kinds_of(ratios)
    theirs = {key: value for key, value in values.items() if key not in _OURS}
    theirs |= {"dtype": values["torch_dtype"], "layer_types": list(kinds[:layers])}
    theirs["compress_rates"] = {
        kind: _one_ratio(kind, kinds, ratios, default) for kind, default in ((SPARSE, 4), (HEAVY, 128))
    }
    theirs["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    partial = _share(values["qk_rope_head_dim"], values["head_dim"])
    theirs["partial_rotary_factor"] = partial
    yarn: dict[str, Any] = {"rope_type": "default"}
    if "rope_scaling" in values:
        scaling = dict(values["rope_scaling"])
        yarn = {"rope_type": scaling.pop("type"), **scaling, "attention_factor": 1.0}
    theirs["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": values["rope_theta"], "partial_rotary_factor": partial},
        "compress": {**yarn, "rope_theta": values["compress_rope_theta"], "partial_rotary_factor": partial},
    }
    return dict(sorted(theirs.items()))


def lineage_from_huggingface(data: Mapping[str, Any]) -> dict[str, Any]:
    """A V3 or V3.2 configuration in our keys, from those of the release, ours, or the ones that transformers writes.

    Raises:
        ValueError: dense layers among the sparse ones.
    """
    values = {key: value for key, value in _own(data).items() if key not in _LINEAGE_IGNORED}
    kinds = values.pop("mlp_layer_types", None)
    if isinstance(kinds, list):
        values["first_k_dense_replace"] = _first(kinds, "dense", "sparse")
    rotary = dict(values.pop("rope_parameters", None) or {})
    if "rope_theta" in rotary:
        values["rope_theta"] = rotary.pop("rope_theta")
    scaling = rotary or values.get("rope_scaling")
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type", scaling.get("type", "default" if rotary else None))
        given = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
        values["rope_scaling"] = None if kind == "default" else {"type": kind, **given}
    return values


def _own(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without bookkeeping, with the dtype and the end token under our keys."""
    values = {key: value for key, value in data.items() if key not in BOOKKEEPING}
    if "dtype" in values:
        values["torch_dtype"] = str(values.pop("dtype")).removeprefix("torch.")
    if isinstance(values.get("eos_token_id"), list) and len(values["eos_token_id"]) == 1:
        values["eos_token_id"] = values["eos_token_id"][0]
    return values


def _first(kinds: list[str], first: str, then: str) -> int:
    """How many layers of the kind `first` there are, all of them before those of the kind `then`."""
    count = sum(kind == first for kind in kinds)
    if list(kinds) != [first] * count + [then] * (len(kinds) - count):
        raise ValueError(f"mlp_layer_types={list(kinds)}: allowed are {first} layers first, then {then} layers")
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


def _share(rotary: int, width: int) -> float:
    """`rotary` / `width`, which times `width` is not below `rotary`: transformers truncates the product."""
    share = rotary / width
    while int(share * width) < rotary:
        share = math.nextafter(share, 1.0)
    return share


def _one_ratio(kind: str, kinds: Sequence[str], ratios: Sequence[int], default: int) -> int:
    found = {ratio for k, ratio in zip(kinds, ratios) if k == kind}
    if len(found) > 1:
        raise ValueError(f"{kind} layers have the ratios {sorted(found)}: the huggingface layout has one for all")
    return found.pop() if found else default
