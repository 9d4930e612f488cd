"""Configurations in the keys of transformers, to ours and back: plain tables in, plain tables out.

    V4    each kind of layer has one ratio (`compress_rates`), routers are listed by layer (`mlp_layer_types`) and the
          two rotary bases lie in `rope_parameters`, in a table for each or in a flat one
    V3    dense layers are listed by layer (`mlp_layer_types`), base and YaRN lie in `rope_parameters`

A table in our keys passes through, without what describes the program that wrote it. Of two keys for one thing,
transformers' choice is followed, or they must agree.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .fields import NONE, drop_fixed, require, shown, typed, unknown
from .foreign import refuse_foreign
from .kinds import HEAVY, SLIDING, SPARSE, kinds_of

# How a config.json says that `abyssal.hf` reads it: our names of tensors, and what transformers' own classes lack.
OURS = {"architectures": ["AbyssalForCausalLM"], "model_type": "abyssal"}

# Keys that describe the program that wrote or serves a configuration, or how far a training has come, not the model.
BOOKKEEPING = (
    *(
        "_attn_implementation_autoset",
        "attention_stage",
        "_name_or_path",
        "unsloth_fixed",
        "chunk_size_feed_forward",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
    ),
    *("output_hidden_states", "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef"),
    *("transformers_version", "use_cache"),
)
_THEIRS = ("compress_rates", "mlp_layer_types", "rope_parameters")  # what only transformers writes
_OURS = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")  # what it does not know
_ROPE = ("rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


class NoPlace(ValueError):
    """What transformers' own classes cannot hold."""


def from_huggingface(data: Mapping[str, Any]) -> dict[str, Any]:
    """A V4 configuration in our keys, from those of the release, ours, or the ones that transformers writes.

    Raises:
        TypeError, ValueError: transformers' keys are not all there, contradict each other, or have a value that V4 does
            not; the message names it.
    """
    refuse_foreign("the configuration", data)
    values = _own(data)
    _rotary(values)
    kinds = values.get("mlp_layer_types")
    if kinds is not None:
        values["num_hash_layers"] = typed("mlp_layer_types", kinds, tuple[str, ...]).count("hash_moe")
    if not any(key in data for key in _THEIRS) or ("compress_ratios" in data and "compress_rates" not in data):
        return values
    needed = {
        "layer_types": "compress_ratios",
        "compress_rates": "compress_ratios",
        "mlp_layer_types": "num_hash_layers",
    }
    missing = [key for key, other in needed.items() if not values.get(key) and other not in values]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    drop_fixed(values, {"mlp_bias": False, "router_jitter_noise": 0.0})
    shared = values.get("n_shared_experts", 1)
    require(shared == 1, "n_shared_experts", shared, "1, because transformers has exactly one")
    rates, kinds = values.pop("compress_rates"), values.get("layer_types")
    if kinds is None:
        kinds = kinds_of(typed("compress_ratios", values["compress_ratios"], tuple[int, ...]))
    ratios = _ratios(kinds, rates)
    given = values.setdefault("compress_ratios", ratios)
    same = isinstance(given, list | tuple) and list(given)[: len(ratios)] == ratios
    require(same, "compress_rates", rates, f"those of compress_ratios={shown(given)}")
    return values


def to_huggingface(values: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig.to_dict()` in the keys of transformers' `DeepseekV4Config`; `from_huggingface` inverts it.

    Raises:
        NoPlace: what transformers cannot hold: Engram, two ratios for one kind of layer, several shared experts.
    """
    if "engram" in values:
        raise NoPlace("transformers has no Engram: save with layout='abyssal' or 'official'")
    if values["n_shared_experts"] != 1:
        raise NoPlace(f"n_shared_experts={values['n_shared_experts']}: transformers has exactly one")
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

    Of V3.2's dense layers `mlp_layer_types` decides, where it is given, of V3's `first_k_dense_replace`.

    Raises:
        TypeError, ValueError: a table of another type, or keys that contradict each other; the message names them.
    """
    values = _own(data)
    kinds = values.get("mlp_layer_types")
    if kinds is not None and values.get("model_type") == "deepseek_v32":
        values["first_k_dense_replace"] = first_kinds(typed("mlp_layer_types", kinds, tuple[str, ...]), "dense")
    name, table = _rope_table(values)
    if table is None:
        return values
    given = dict(table)
    kind = _rope_type(name, given, "default" if name == "rope_parameters" else None)
    if "rope_theta" in given:
        values["rope_theta"] = given.pop("rope_theta")
    values["rope_scaling"] = _scaling(name, kind, given)
    return values


def first_kinds(kinds: Sequence[str], first: str) -> int:
    """How many layers of the kind `first` there are before any other."""
    return next((layer for layer, kind in enumerate(kinds) if kind != first), len(kinds))


def _own(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without bookkeeping, with the dtype and the end token under our keys."""
    require(isinstance(data, Mapping), "data", data, "a table of a config.json's keys")
    values = {key: None if value == NONE else value for key, value in data.items() if key not in BOOKKEEPING}
    if values.get("model_type") == OURS["model_type"]:
        drop_fixed(values, OURS)
    dtype = values.pop("dtype", None)
    if dtype is not None:
        values["torch_dtype"] = (dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.")
    stored = values.get("quantization_config")
    if isinstance(stored, Mapping) and stored.get("expert_dtype") is not None:
        values.setdefault("expert_dtype", stored["expert_dtype"])
    end = values.get("eos_token_id")
    if isinstance(end, list):
        one = "int, the one token that ends a text; what else is to end it, give to `generate` as `stop`"
        require(len(end) == 1, "eos_token_id", end, one)
        values["eos_token_id"] = end[0]
    return values


def _ratios(kinds: Any, rates: Any) -> list[int]:
    """Each layer's tokens per entry, out of one number for each kind of layer."""
    kinds = typed("layer_types", kinds, tuple[str, ...])
    require(isinstance(rates, Mapping), "compress_rates", rates, f"a table of {SPARSE} and {HEAVY}")
    for kind in rates:
        if kind not in (SPARSE, HEAVY):
            raise unknown("key", str(kind), (SPARSE, HEAVY), lambda name: shown(f"compress_rates.{name}"))
    strange = [kind for kind in kinds if kind != SLIDING and kind not in rates]
    if strange:
        raise ValueError(f"layer_types has {shown(strange[0])}: compress_rates has {', '.join(rates)}")
    sizes = {kind: typed(f"compress_rates.{kind}", rate, int) for kind, rate in rates.items()}
    for kind, rate in sizes.items():
        require(rate > 0, f"compress_rates.{kind}", rate, "positive numbers")
    return [0 if kind == SLIDING else sizes[kind] for kind in kinds]


def _rope_table(values: dict[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """The one rotary table that is given, taken out, with its key: transformers' new or the release's."""
    tables = {key: values.pop(key, None) for key in ("rope_parameters", "rope_scaling")}
    for key, table in tables.items():
        keys = _ROPE if key == "rope_parameters" else _ROPE[2:]
        require(isinstance(table, Mapping | None), key, table, f"a table of {', '.join(keys)}, or none")
    given = {key: table for key, table in tables.items() if table}
    require(len(given) < 2, "rope_parameters", tables["rope_parameters"], "none where rope_scaling is given")
    return next(iter(given.items()), ("rope_scaling", None))


def _rope_type(name: str, table: dict[str, Any], default: str | None) -> Any:
    """Takes the type out of a table, under its new name or its old one."""
    kind = table.pop("rope_type", table.get("type", default))
    require(table.pop("type", kind) == kind, f"{name}.rope_type", kind, f"what {name}.type says")
    return kind


def _scaling(name: str, kind: Any, rest: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of a type and the table's other keys, of which the default type has none."""
    if kind == "default":
        for key, value in rest.items():
            require(False, f"{name}.{key}", value, f"none, because {name}.rope_type is 'default'")
        return None
    require(kind in ("yarn", None), f"{name}.{'type' if name == 'rope_scaling' else 'rope_type'}", kind, "'yarn'")
    return {"type": kind, **rest}


def _rotary(values: dict[str, Any]) -> None:
    """`rope_theta`, `compress_rope_theta`, `rope_scaling` and `qk_rope_head_dim` out of a table of either form.

    transformers has a table for each branch, `main` without and `compress` with a compressor, or a flat one of the
    latter, whose base is `compress_rope_theta` all the same.
    """
    name, table = _rope_table(values)
    shares = {"partial_rotary_factor": values.pop("partial_rotary_factor", None)}
    if table is not None and {"main", "compress"} & set(table):
        shares |= _branches(name, table, values, shares["partial_rotary_factor"])
    elif table is not None:
        given = dict(table)
        shares[f"{name}.partial_rotary_factor"] = given.pop("partial_rotary_factor", None)
        theta = values.get("rope_theta", 10_000.0)
        require(given.pop("rope_theta", theta) == theta, f"{name}.rope_theta", table.get("rope_theta"), shown(theta))
        _no_temperature(name, given)
        typeless = name == "rope_scaling" and not {"type", "rope_type"} & set(given)
        values["rope_scaling"] = given if typeless else _scaling(name, _rope_type(name, given, "default"), given)
    _settle_width(values, shares)


def _branches(name: str, tables: Mapping[str, Any], values: dict[str, Any], share: Any) -> dict[str, Any]:
    """Puts the bases and `rope_scaling` into `values`; the branches' rotary shares, `share` where they have none."""
    found: dict[str, dict[str, Any]] = {}
    for key, table in tables.items():
        if key not in ("main", "compress"):
            raise unknown("key", str(key), ("main", "compress"), lambda key: shown(f"{name}.{key}"))
        require(isinstance(table, Mapping), f"{name}.{key}", table, f"a table of {', '.join(_ROPE)}")
        found[key] = dict(table)
    kinds = {key: _rope_type(f"{name}.{key}", table, "default") for key, table in found.items()}
    for key, kind in kinds.items():
        allowed = ("default",) if key == "main" else ("default", "yarn")
        require(kind in allowed, f"{name}.{key}.rope_type", kind, "'default', or 'yarn' in compress")
    compress = found.get("compress", {})
    needed = ("rope_theta", "factor", "original_max_position_embeddings", "attention_factor")
    missing = [f"{name}.{key}" for key in ("main", "compress") if key not in found]
    missing += [
        f"{name}.compress.{key}" for key in needed[: 4 if kinds.get("compress") == "yarn" else 1] if key not in compress
    ]
    _no_temperature(f"{name}.compress", compress)
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    shares = {
        f"{name}.{key}.partial_rotary_factor": table.pop("partial_rotary_factor", share) for key, table in found.items()
    }
    for key, value in shares.items():
        require(value is not None, key, value, "a share of head_dim")
    main = found["main"]
    if "rope_theta" in main:
        values["rope_theta"] = main.pop("rope_theta")
    _scaling(f"{name}.main", "default", main)
    values["compress_rope_theta"] = compress.pop("rope_theta")
    values["rope_scaling"] = _scaling(f"{name}.compress", kinds["compress"], compress)
    return shares


def _no_temperature(name: str, table: dict[str, Any]) -> None:
    factor = table.pop("attention_factor", 1.0)
    require(factor == 1.0, f"{name}.attention_factor", factor, "only 1.0, because V4 has no attention temperature")


def _settle_width(values: dict[str, Any], shares: Mapping[str, Any]) -> None:
    """`qk_rope_head_dim` from the shares of `head_dim` that are given, which agree with each other and with it."""
    for key, share in shares.items():
        if share is None:
            continue
        share, head = typed(key, share, float), typed("head_dim", values.get("head_dim"), int)
        require(0 < share <= 1, key, share, "above 0, up to 1")
        if values.get("qk_rope_head_dim") is None:
            values["qk_rope_head_dim"] = int(share * head)
        width = values["qk_rope_head_dim"]
        require(int(share * head) == width, key, share, f"qk_rope_head_dim={shown(width)} of head_dim={head} channels")


def _share(rotary: int, width: int) -> float:
    """`rotary` / `width`, which times `width` is not below `rotary`: transformers truncates the product."""
    share = rotary / width
    while int(share * width) < rotary:
        share = math.nextafter(share, 1.0)
    return share


def _one_ratio(kind: str, kinds: Sequence[str], ratios: Sequence[int], default: int) -> int:
    found = {ratio for k, ratio in zip(kinds, ratios) if k == kind}
    if len(found) > 1:
        raise NoPlace(f"{kind} layers have the ratios {sorted(found)}: transformers has one for all")
    return found.pop() if found else default
