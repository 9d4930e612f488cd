"""The configuration: one frozen dataclass whose field names are the keys of the released config.json.

    layer i has   a kind    sliding_attention | compressed_sparse_attention (CSA) | heavily_compressed_attention (HCA)
                  a ratio   m tokens per compressed entry; 0 in a sliding layer, 4 or 128 in the released models
                  a router  by token id (the first `num_hash_layers`) or by score
    index L = num_hidden_layers is the multi-token-prediction (MTP) block: sliding, routed by score.

Everything is checked at construction, so a model never meets a configuration that contradicts itself. Nothing here
imports torch. Sources: the released configurations and V4 4.2.1.
"""

import json
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from .dialect import BOOKKEEPING, from_huggingface
from .fields import LIST, build, did_you_mean, drop_fixed, means, require, settle, shown, typed, unknown
from .folders import STATE, description, json_object, naming, read_json, using
from .kinds import LAYER_TYPES, SLIDING, kinds_of

DTYPES = ("float64", "float32", "bfloat16", "float16")
MLP_KINDS = ("hash_moe", "moe")
BALANCE_PICKS = ("biased", "unbiased")
BIAS_RULES = ("sign", "quantile")

# Keys of a released config.json that V4 does not vary: read and checked, written back, never stored.
FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "model_type": "deepseek_v4",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

# Keys of quantization_config and what they may say: weights are read by the types in which they are stored.
_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128],),
    "scale_fmt": ("ue8m0", "float"),
    "dequantize": (False, True),
    "modules_to_convert": (None,),
}

_POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim"),
    *("q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk"),
    *("max_position_embeddings", "n_routed_experts", "num_experts_per_tok"),
    *("n_shared_experts", "moe_intermediate_size", "routed_scaling_factor", "swiglu_limit", "hc_sinkhorn_iters"),
    *("hc_eps", "rms_norm_eps", "initializer_range"),
)
_WEIGHTS = ("mtp_loss_weight", "balance_loss_weight", "index_loss_weight", "router_bias_update_speed")
_OBJECTIVE = (*_WEIGHTS, "balance_picks", "router_bias_rule")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN, applied in compressed layers only: slow pairs turn `factor` times slower, without an attention temperature.

    Pairs that turn more than `beta_fast` times over the original context are kept, those below `beta_slow` turns are
    divided by `factor`, a linear ramp lies between.

    Raises:
        TypeError, ValueError: a field of another type, or outside its range; the message names it.
    """

    factor: float = means("how many times slower slow pairs turn")
    original_max_position_embeddings: int = means("context whose turns decide which pairs are slow")
    beta_fast: float = means("pairs with more turns than this over that context are kept", 32.0)
    beta_slow: float = means("pairs with fewer turns than this are divided by factor; a linear ramp lies between", 1.0)
    type: str = means("the one kind there is", "yarn")

    def __post_init__(self) -> None:
        settle(self, "rope_scaling.")
        require(self.type == "yarn", "rope_scaling.type", self.type, "'yarn'")
        require(self.factor >= 1, "rope_scaling.factor", self.factor, "numbers >= 1")
        for name in ("original_max_position_embeddings", "beta_fast", "beta_slow"):
            require(getattr(self, name) > 0, f"rope_scaling.{name}", getattr(self, name), "positive numbers")
        ordered = self.beta_fast > self.beta_slow
        require(ordered, "rope_scaling.beta_fast", self.beta_fast, f"more than beta_slow={self.beta_slow}")

    def arguments(self) -> dict[str, Any]:
        """Those that `rope_frequencies` takes."""
        given = {name: getattr(self, name) for name in ("factor", "beta_fast", "beta_slow")}
        return {**given, "original": self.original_max_position_embeddings}


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Conditional memory: hashed n-gram tables read before the attention of the named layers (Engram, 2601.07372).

    Each order 2..`max_ngram` has `heads` hash heads of width `head_dim`, each with `vocab_size` rows nominally (the
    next unused prime is taken). `kernel_size` is the short convolution's; 0 leaves it out. `canonical_vocab_size` is
    the number of token classes after tokenizer compression (None: no compression; a run works the classes out from its
    tokenizer and says their number where this one differs), `pad_token_id` the token that stands before a document's
    first.

    Raises:
        TypeError, ValueError: a field of another type, or outside its range; the message names it.
    """

    layers: tuple[int, ...] = means("layers before whose attention the tables are read, counted from 0")
    head_dim: int = means("width of a hash head")
    vocab_size: int = means("rows of a head's table; the next unused prime is taken")
    max_ngram: int = means("longest n-gram that is looked up; the shortest has two tokens", 3)
    heads: int = means("hash heads of each order", 8)
    kernel_size: int = means("taps of the short convolution; 0 = none", 4)
    seed: int = means("of the hashes", 0)
    canonical_vocab_size: int | None = means(
        "classes of tokens that share rows, as 'The' and 'the'; none = each its own", None
    )
    pad_token_id: int = means("token that stands before a document's first", 0)

    def __post_init__(self) -> None:
        settle(self, "engram.")
        require(len(self.layers) > 0, "engram.layers", self.layers, "at least one layer (or no engram at all)")
        require(len(set(self.layers)) == len(self.layers), "engram.layers", self.layers, "distinct layers")
        limits = {"head_dim": 1, "vocab_size": 2, "max_ngram": 2, "heads": 1, "kernel_size": 0, "seed": 0}
        for name, least in {**limits, "pad_token_id": 0}.items():
            require(getattr(self, name) >= least, f"engram.{name}", getattr(self, name), f"integers >= {least}")


@dataclass(frozen=True, kw_only=True)
class QuantizationAware:
    """Quantisation-aware training: families of tensors that the model rounds to a released format wherever it computes.

    `experts` ('fp4' or 'fp8') are the routed experts' weights, `linears` ('fp8') the weights and inputs of the other
    projections that the release stores in FP8, `index` ('fp4') the index queries and keys. None, the default, leaves a
    family exact. Gradients are straight-through. `model/quantization.py` has the blocks.

    Raises:
        TypeError, ValueError: a field of another type, or a format that its family does not have.
    """

    experts: str | None = means("fp4 or fp8: the routed experts' weights; none = exact", None)
    linears: str | None = means("fp8: weights and inputs of the other projections; none = exact", None)
    index: str | None = means("fp4: queries and keys of the indexer; none = exact", None)

    def __post_init__(self) -> None:
        settle(self, "quantization_aware.")
        for name, formats in {"experts": ("fp4", "fp8"), "linears": ("fp8",), "index": ("fp4",)}.items():
            value, allowed = getattr(self, name), " or ".join(map(repr, formats))
            require(value is None or value in formats, f"quantization_aware.{name}", value, f"{allowed}, or none")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's shape and constants; sizes that differ between released models have no default.

    `compress_ratios` and `layer_types` hold one value per layer and are stored with the MTP block's (0 and sliding) at
    the end; both may be given with or without it. `layer_types` may be left out: ratio 0 is sliding, 4 is CSA, any
    other HCA. The first `num_hash_layers` layers are routed by token id, unless `mlp_layer_types` says, layer by layer,
    which these are. `quantization_config` and `expert_dtype` describe a released checkpoint's storage,
    `quantization_aware` what the model itself rounds (nothing by default). The last fields are the training
    objective's.

    Raises:
        TypeError, ValueError: a field of another type, out of range, or in conflict with another; the message names it.
    """

    vocab_size: int = means("tokens that the embedding and the head know")
    hidden_size: int = means("width of a residual stream")
    num_hidden_layers: int = means("blocks, the MTP block not counted")
    num_nextn_predict_layers: int = means(
        "multi-token prediction: 1 = a block that predicts the token after next, 0 = none", 1
    )

    compress_ratios: tuple[int, ...] = means(
        "tokens of a compressed entry, a number a layer: 0 sliding window, 4 CSA, others HCA"
    )
    layer_types: tuple[str, ...] = means("kind of attention of each layer; empty = as compress_ratios says", ())
    sliding_window: int = means("latest tokens that every layer sees as they are")
    num_attention_heads: int = means("query heads")
    head_dim: int = means("width of a query head, and of the one key that is also the value")
    qk_rope_head_dim: int = means("channels of a head that are rotated by position")
    q_lora_rank: int = means("width through which queries are projected")
    o_groups: int = means("groups of heads whose outputs are projected apart")
    o_lora_rank: int = means("width of a group's projected output")
    index_n_heads: int = means("heads of the indexer, which picks entries in CSA layers")
    index_head_dim: int = means("width of an indexer's head")
    index_topk: int = means("compressed entries that a token reads in CSA layers")

    rope_theta: float = means("base of the rotation in sliding layers", 10_000.0)
    compress_rope_theta: float = means("base of the rotation in layers with compressed entries", 160_000.0)
    rope_scaling: RopeScaling | None = means("YaRN, where entries are compressed; none = off", None)  # noqa: RUF009
    max_position_embeddings: int = means("longest text", 1_048_576)

    n_routed_experts: int = means("experts of a layer that a router chooses from")
    num_experts_per_tok: int = means("experts that it chooses for a token")
    n_shared_experts: int = means("experts that every token visits", 1)
    moe_intermediate_size: int = means("hidden width of an expert")
    num_hash_layers: int = means("first layers, whose experts follow from the token's id alone")
    mlp_layer_types: tuple[str, ...] | None = means(
        "hash_moe or moe for each layer; none = the first num_hash_layers are hash_moe", None
    )
    routed_scaling_factor: float = means("what the sum of the chosen experts is multiplied by")
    swiglu_limit: float = means("bound of the experts' gate and linear part", 10.0)

    hc_mult: int = means("residual streams", 4)
    hc_sinkhorn_iters: int = means("rounds that make the streams' mixing doubly stochastic", 20)
    hc_eps: float = means("added in those rounds, against division by 0", 1e-6)
    rms_norm_eps: float = means("added to a mean square before its root", 1e-6)
    initializer_range: float = means("standard deviation of new weights", 0.02)

    bos_token_id: int | None = means("token that starts a text; none = no such token", 0)
    eos_token_id: int | None = means("token that ends a text; none = no such token", 1)
    pad_token_id: int | None = means("token that fills rows up; none = no such token", None)
    torch_dtype: str = means("number format of the weights: float32, bfloat16, float16 or float64", "bfloat16")
    expert_dtype: str | None = means(
        "of a released checkpoint: fp4 or fp8, how the experts are stored; none = as the rest", None
    )
    quantization_config: dict | None = means(  # noqa: RUF009
        "of a released checkpoint: how its weights are stored; none = in torch_dtype", None, hash=False
    )

    engram: EngramConfig | None = means("n-gram memory; none = off", None)  # noqa: RUF009
    quantization_aware: QuantizationAware | None = means(  # noqa: RUF009
        "formats that tensors are rounded to in training; none = exact", None
    )
    mtp_loss_weight: float = means("weight of the multi-token prediction's loss", 0.3)
    balance_loss_weight: float = means("weight of the loss that evens out the experts' load within a text", 1e-4)
    balance_picks: str = means(
        "experts that it counts: biased, those chosen with the routers' biases, or unbiased, the first by score alone",
        "biased",
    )
    index_loss_weight: float = means("weight of the indexer's loss", 1e-2)
    router_bias_update_speed: float = means("step of the routers' biases, which even out the load without a loss", 1e-3)
    router_bias_rule: str = means(
        "how they move: sign, that step against the load, or quantile, that share of the way to those that even it out",
        "sign",
    )

    def __post_init__(self) -> None:
        settle(self)
        _check_sizes(self)
        _store_layers(self)
        _check_layers(self)
        _check_storage(self)

    def layer_kind(self, layer: int) -> str:
        """One of `LAYER_TYPES`; `layer` = num_hidden_layers is the MTP block."""
        return self.layer_types[layer]

    def compress_ratio(self, layer: int) -> int:
        """Tokens per compressed entry, 0 in a sliding layer."""
        return self.compress_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether the layer's experts are chosen by token id instead of by score."""
        kinds = self.mlp_layer_types
        return layer < self.num_hash_layers if kinds is None else kinds[layer : layer + 1] == ("hash_moe",)

    @classmethod
    def load(cls, name_or_path: str | Path) -> "ModelConfig":
        """The configuration that is shipped under a name, or the one at a path.

        A path is a recipe (.toml, its table [model]), a config.json, the folder of a model, or that of a run.

        Raises:
            ValueError: neither; the message lists what is shipped.
        """
        recipe = read_recipe(name_or_path)
        if "model" not in recipe:
            told = f"it has {', '.join(recipe) or 'none'}; a run of it takes that of train.init"
            raise ValueError(f"{name_or_path}: a recipe needs a table [model]; {told}")
        return naming(name_or_path, cls.from_dict, recipe["model"])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """A configuration from released keys, from this project's, or from those that transformers writes.

        Raises:
            TypeError, ValueError: as the class, for an unknown or missing key, or a value that V4 does not vary.
        """
        values = from_huggingface(data)
        drop_fixed(values, FIXED)
        config = build(cls, values, also=(*FIXED, *BOOKKEEPING), see=LIST)
        scaling = values.get("rope_scaling")
        typeless = "model_type" in data and isinstance(scaling, Mapping) and "type" not in scaling
        require(not typeless, "rope_scaling.type", None, "'yarn'")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Released keys and values as JSON has them; our own keys only where they differ from their default.

        `ModelConfig.from_dict(config.to_dict()) == config`.
        """
        values = {**FIXED, **asdict(self)}
        if self.layer_types == kinds_of(self.compress_ratios):
            del values["layer_types"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default and (value is None or f.name in _OBJECTIVE):
                del values[f.name]
        return json.loads(json.dumps(values, sort_keys=True))


def read_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """All tables of a shipped recipe, of the one at a path, or of a run's; a config.json becomes its table "model".

    `base = "toy"` at the top of a recipe, a shipped name or a path beside it, lays its tables over that recipe's: key
    by key, lists as a whole.

    Raises:
        ValueError: no such name or file (the message lists what is shipped), or recipes that are each other's base.
    """
    if str(name_or_path) not in shipped():
        with suppress(FileNotFoundError):
            return using(name_or_path, _of_folder)
    return _over_base(recipe_file(name_or_path), ())


def _of_folder(folder: Path) -> dict[str, Any]:
    recipe = read_json(folder / STATE).get("recipe") if (folder / STATE).is_file() else None
    return recipe if isinstance(recipe, dict) else {"model": description(folder)}


def shipped() -> dict[str, Any]:
    """The file of every recipe and configuration that is shipped, by name; recipes first."""
    files = sorted(resources.files(f"{__package__.rpartition('.')[0]}.configs").iterdir(), key=lambda file: file.name)
    return {
        file.name.removesuffix(end): file for end in (".toml", ".json") for file in files if file.name.endswith(end)
    }


def recipe_file(name_or_path: str | Path, beside: Path = Path()) -> Any:
    """The file that `read_recipe` reads; a relative path starts at the folder `beside`. Raises ValueError: none."""
    known = shipped()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    path = beside / name_or_path
    path = path / "config.json" if path.is_dir() else path
    if path.suffix in (".toml", ".json") and path.is_file():
        return path
    raise ValueError(
        f"{str(name_or_path)!r} is no configuration:{did_you_mean(str(name_or_path), known)} shipped are"
        f" {', '.join(known)}; otherwise give a .toml or .json file that exists, or the folder of a model or of a run"
    )


def _over_base(file: Any, above: tuple[Any, ...]) -> dict[str, Any]:
    """The tables of a file over those of its base; `above` are the files that led here."""
    chain = (*above, file)
    *seen, place = (Path(str(one)).resolve() for one in chain)
    if place in seen:
        raise ValueError(f"base leads back to where it began: {' -> '.join(map(str, chain))}")
    values = naming(file, lambda: _parse(file.read_text("utf-8"), Path(file.name).suffix))
    if "base" not in values:
        return values
    base = values.pop("base")
    require(isinstance(base, str), f"{file}: base", base, "the name or the path of a recipe")
    found = naming(file, recipe_file, base, Path(str(file)).parent)
    return laid_over(_over_base(found, chain), values)


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables, inner ones too, with the values of `above` where both have one."""
    both = {key: laid_over(below[key], value) for key, value in above.items() if _tables(below.get(key), value)}
    return {**below, **above, **both}


def _tables(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _parse(text: str, suffix: str) -> dict[str, Any]:
    return tomllib.loads(text) if suffix == ".toml" else {"model": json_object(text)}


def _store_layers(c: ModelConfig) -> None:
    """Gives the per-layer tuples their stored form: num_hidden_layers values, then one per MTP block.

    `mlp_layer_types` has none for that block, and is None where the first layers are those routed by token id.
    """
    layers, mtp = c.num_hidden_layers, c.num_nextn_predict_layers
    types = c.layer_types or kinds_of(c.compress_ratios)
    lists = (("compress_ratios", c.compress_ratios, 0), ("layer_types", types, SLIDING))
    for name, values, block in reversed(lists) if c.layer_types else lists:
        if len(values) not in (layers, layers + 1):
            raise ValueError(
                f"{name} has {len(values)} values: allowed are num_hidden_layers={layers}, or one more for MTP"
            )
        require(values[layers:] in ((), (block,)), f"{name}[{layers}]", values[-1], f"{block!r}, the MTP block's")
        object.__setattr__(c, name, values[:layers] + (block,) * mtp)
    kinds = c.mlp_layer_types
    if kinds is not None:
        require(len(kinds) == layers, "len(mlp_layer_types)", len(kinds), f"num_hidden_layers={layers}")
        for i, kind in enumerate(kinds):
            require(kind in MLP_KINDS, f"mlp_layer_types[{i}]", kind, " or ".join(map(repr, MLP_KINDS)))
        hashed = kinds.count("hash_moe")
        require(c.num_hash_layers == hashed, "num_hash_layers", c.num_hash_layers, f"{hashed}, as in mlp_layer_types")
        if "hash_moe" not in kinds[hashed:]:
            object.__setattr__(c, "mlp_layer_types", None)


def _check_sizes(c: ModelConfig) -> None:
    for name in _POSITIVE:
        require(getattr(c, name) > 0, name, getattr(c, name), "positive numbers")
    for name in ("rope_theta", "compress_rope_theta"):
        require(getattr(c, name) > 1, name, getattr(c, name), "positive numbers above 1")
    for name in ("num_hash_layers", *_WEIGHTS):
        require(getattr(c, name) >= 0, name, getattr(c, name), "numbers >= 0")
    for name, words in {"balance_picks": BALANCE_PICKS, "router_bias_rule": BIAS_RULES}.items():
        require(getattr(c, name) in words, name, getattr(c, name), " or ".join(map(repr, words)))
    speed, sign = c.router_bias_update_speed, c.router_bias_rule == "sign"
    require(sign or speed <= 1, "router_bias_update_speed", speed, "a share of the way, up to 1, of router_bias_rule")
    require(c.hc_sinkhorn_iters <= 1000, "hc_sinkhorn_iters", c.hc_sinkhorn_iters, "up to 1000 rounds")
    require(1 <= c.hc_mult <= 8, "hc_mult", c.hc_mult, "1 to 8 residual streams")
    require(c.num_nextn_predict_layers in (0, 1), "num_nextn_predict_layers", c.num_nextn_predict_layers, "0 or 1")
    heads, groups = c.num_attention_heads, c.o_groups
    require(heads % groups == 0, "num_attention_heads", heads, f"a multiple of o_groups={groups}")
    widest = min(c.head_dim, c.index_head_dim)
    even = c.qk_rope_head_dim % 2 == 0 and c.qk_rope_head_dim <= widest
    limits = f"an even number up to head_dim={c.head_dim} and index_head_dim={c.index_head_dim}"
    require(even, "qk_rope_head_dim", c.qk_rope_head_dim, limits)
    experts, chosen = c.n_routed_experts, c.num_experts_per_tok
    require(chosen <= experts, "num_experts_per_tok", chosen, f"up to n_routed_experts={experts}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(c, name)
        require(token is None or 0 <= token < c.vocab_size, name, token, f"0 to vocab_size - 1 = {c.vocab_size - 1}")


def _check_layers(c: ModelConfig) -> None:
    layers = c.num_hidden_layers
    for i, (kind, ratio) in enumerate(zip(c.layer_types, c.compress_ratios)):
        require(kind in LAYER_TYPES, f"layer_types[{i}]", kind, ", ".join(LAYER_TYPES))
        require(ratio >= 0, f"compress_ratios[{i}]", ratio, "integers >= 0")
        allowed = f"{'0' if kind == SLIDING else 'positive'}, because layer_types[{i}] is {kind}"
        require((kind == SLIDING) == (ratio == 0), f"compress_ratios[{i}]", ratio, allowed)
    require(c.num_hash_layers <= layers, "num_hash_layers", c.num_hash_layers, f"up to num_hidden_layers={layers}")
    if c.engram:
        inside = all(0 <= layer < layers for layer in c.engram.layers)
        require(inside, "engram.layers", list(c.engram.layers), f"0 to num_hidden_layers - 1 = {layers - 1}")
        classes, pad = c.engram.canonical_vocab_size, c.engram.pad_token_id
        fits = classes is None or 0 < classes <= c.vocab_size
        require(fits, "engram.canonical_vocab_size", classes, f"1 to vocab_size={c.vocab_size}")
        require(pad < c.vocab_size, "engram.pad_token_id", pad, f"0 to vocab_size - 1 = {c.vocab_size - 1}")


def _check_storage(c: ModelConfig) -> None:
    """The released formats: FP8 groups of 64 without the rotary part, Hadamard and FP4 groups of 32 in the indexer."""
    require(c.torch_dtype in DTYPES, "torch_dtype", c.torch_dtype, ", ".join(DTYPES))
    require(c.expert_dtype in (None, "fp4", "fp8"), "expert_dtype", c.expert_dtype, "'fp4', 'fp8' or none")
    if c.quantization_aware is not None:
        if c.quantization_aware.experts == "fp4":
            _check_fp4_experts(c, "quantization_aware.experts")
        if c.quantization_aware.index is not None:
            _check_fp4_index(c, "quantization_aware.index")
    if c.quantization_config is None:
        return
    check_quantization(c.quantization_config, c.expert_dtype)
    plain = c.head_dim - c.qk_rope_head_dim
    allowed = f"qk_rope_head_dim={c.qk_rope_head_dim} plus a multiple of 64, because quantization_config is given"
    require(plain % 64 == 0, "head_dim", c.head_dim, allowed)
    _check_fp4_index(c, "quantization_config")
    if c.expert_dtype == "fp4":
        _check_fp4_experts(c, "expert_dtype")


def check_quantization(table: Any, expert_dtype: str | None) -> None:
    """Raises ValueError where a checkpoint's weights would be read in another way than the released ones."""
    require(isinstance(table, Mapping), "quantization_config", table, f"a table of {', '.join(_QUANTIZATION)}, or none")
    known = {**_QUANTIZATION, "expert_dtype": (expert_dtype, None)}
    for key, value in table.items():
        if key == "modules_to_not_convert":
            typed(f"quantization_config.{key}", value, tuple[str, ...] | None)
            continue
        if key not in known:
            raise unknown("key", str(key), known, lambda name: shown(f"quantization_config.{name}"))
        allowed = known[key]
        fits = any(value == one and type(value) is type(one) for one in allowed)
        require(fits, f"quantization_config.{key}", value, " or ".join(map(repr, allowed)))


def _check_fp4_index(c: ModelConfig, because: str) -> None:
    width, allowed = c.index_head_dim, f"a power of two and a multiple of 32, because {because} is given"
    require(width % 32 == 0 and width & (width - 1) == 0, "index_head_dim", width, allowed)


def _check_fp4_experts(c: ModelConfig, because: str) -> None:
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(c, name)
        require(size % 32 == 0, name, size, f"a multiple of 32, because {because} is 'fp4'")
