"""The configuration of V3 and V3.2; field names are the keys of their released config.json.

Sources: V3 (arXiv 2412.19437) 4.2, V3.2 (arXiv 2512.02556), the released configurations; spec A.2.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..config import DTYPES, RopeScaling, check_quantization
from ..dialect import BOOKKEEPING, first_kinds, lineage_from_huggingface
from ..fields import build, drop_fixed, require, settle, shown
from ..folders import naming, read_json

KINDS = ("deepseek_v3", "deepseek_v32")
SHIPPED = ("v3", "v3.2")

# Keys that the generation does not vary: checked and left out.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False, "moe_layer_freq": 1,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "rope_interleave": True,
}  # fmt: skip
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
_MAY_BE_0 = ("first_k_dense_replace", "n_shared_experts")
_POSITIVE = ("routed_scaling_factor", "rms_norm_eps", "initializer_range")
_OBJECTIVE = ("balance_loss_weight", "index_loss_weight", "router_bias_update_speed")


@dataclass(frozen=True, kw_only=True)
class LineageScaling(RopeScaling):
    """YaRN with temperatures: of the logits, and of the rotary channels of queries and keys.

    logits             (0.1 mscale_all_dim ln factor + 1)^2 times as large; once, if `mscale_all_dim` is 0
    rotary channels    `attention_factor` times as long; if that is None, as long as (0.1 mscale ln factor + 1) /
                       (0.1 mscale_all_dim ln factor + 1), or 0.1 ln factor + 1 where one of both is 0

    Raises:
        TypeError, ValueError: as `RopeScaling`, or a negative temperature.
    """

    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True  # the ramp's ends to whole pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            require((getattr(self, name) or 0) >= 0, f"rope_scaling.{name}", getattr(self, name), "numbers >= 0")

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "truncate": self.truncate}

    @property
    def logits(self) -> float:
        return self._length(self.mscale_all_dim) ** 2

    @property
    def rotary(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._length(self.mscale) / self._length(self.mscale_all_dim)
        return self._length(1.0)

    def _length(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1


@dataclass(frozen=True, kw_only=True)
class _Elsewhere:
    """Keys of a configuration that follow from others, or that say how it was trained or is stored: never kept."""

    architectures: tuple[str, ...] | None = None
    auto_map: dict | None = None
    aux_loss_alpha: float | None = None
    ep_size: int | None = None
    expert_dtype: str | None = None
    head_dim: int | None = None
    layer_types: tuple[str, ...] | None = None
    num_key_value_heads: int | None = None
    num_local_experts: int | None = None
    num_mtp_layers: int | None = None
    num_nextn_predict_layers: int | None = None
    pretraining_tp: int | None = None
    qk_head_dim: int | None = None
    seq_aux: bool | None = None

    def __post_init__(self) -> None:
        settle(self)
        require(self.expert_dtype in (None, "fp8"), "expert_dtype", self.expert_dtype, "'fp8' or none")

    def check(self, c: "LineageConfig") -> None:
        """Raises ValueError where a key does not follow from the configuration."""
        kinds, layers = self.layer_types or (), c.num_hidden_layers
        require(len(kinds) in (0, layers), "len(layer_types)", len(kinds), f"num_hidden_layers={layers}")
        follows = {
            "architectures": ((c.architecture,), "that of model_type"),
            "head_dim": (c.qk_rope_head_dim, "qk_rope_head_dim"),
            "layer_types": (("indexed_attention" if c.sparse else "full_attention",) * len(kinds), "all alike"),
            "num_local_experts": (c.n_routed_experts, "n_routed_experts"),
            "qk_head_dim": (c.qk_nope_head_dim + c.qk_rope_head_dim, "qk_nope_head_dim + qk_rope_head_dim"),
        }
        for name, (value, why) in follows.items():
            require(getattr(self, name) in (None, value), name, getattr(self, name), f"{shown(value)}, {why}, or none")
        heads, least = self.num_key_value_heads, c.num_attention_heads  # transformers writes 128, however few there are
        require(heads is None or heads >= least, "num_key_value_heads", heads, f"num_attention_heads={least}, or none")


@dataclass(frozen=True, kw_only=True)
class LineageConfig:
    """Shape and constants of a V3 or V3.2 model. The indexer's sizes are None in V3.

    The first `first_k_dense_replace` layers are dense, unless V3.2's `mlp_layer_types` says, layer by layer, which are;
    it is None where it says the same.

    Raises:
        TypeError, ValueError: a key is missing, unknown, out of range or at odds with another; the message names it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    mlp_layer_types: tuple[str, ...] | None = None
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    index_n_heads: int | None = None
    index_head_dim: int | None = None
    index_topk: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: LineageScaling | None = None
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    torch_dtype: str = "bfloat16"
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None
    balance_loss_weight: float = 1e-4
    index_loss_weight: float = 1e-2
    router_bias_update_speed: float = 1e-3

    def __post_init__(self) -> None:
        settle(self)
        require(self.model_type in KINDS, "model_type", self.model_type, " or ".join(map(repr, KINDS)))
        _check_sizes(self)
        _check_layers(self)
        _check_experts(self)

    @property
    def sparse(self) -> bool:
        """Whether attention reads what an indexer picks (V3.2)."""
        return self.model_type == "deepseek_v32"

    @property
    def architecture(self) -> str:
        return "DeepseekV32ForCausalLM" if self.sparse else "DeepseekV3ForCausalLM"

    def is_dense(self, layer: int) -> bool:
        kinds = self.mlp_layer_types
        return layer < self.first_k_dense_replace if kinds is None else kinds[layer] == "dense"

    @property
    def dense_layers(self) -> int:
        """How many there are."""
        kinds = self.mlp_layer_types
        return min(self.first_k_dense_replace, self.num_hidden_layers) if kinds is None else kinds.count("dense")

    @property
    def temperature(self) -> float:
        """YaRN's factor on the logits; V4 has none."""
        return self.rope_scaling.logits if self.rope_scaling else 1.0

    @classmethod
    def load(cls, name: str | Path) -> "LineageConfig":
        """A shipped configuration ("v3", "v3.2") or a JSON file. Raises FileNotFoundError with the names there are."""
        if str(name) in SHIPPED:
            path = Path(str(resources.files("abyssal.configs.lineage").joinpath(f"{name}.json")))
        elif Path(name).is_file():
            path = Path(name)
        else:
            raise FileNotFoundError(f"{str(name)!r}: allowed are {', '.join(SHIPPED)} or the path of a .json file")
        return naming(name, cls.from_dict, read_json(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LineageConfig":
        """From the keys of a released config.json, or of the one that transformers writes.

        Raises:
            TypeError, ValueError: as the class, for an unknown or missing key, or a value that V3 does not vary.
        """
        values = lineage_from_huggingface(data)
        elsewhere = _Elsewhere(**{f.name: values.pop(f.name) for f in fields(_Elsewhere) if f.name in values})
        stored = values.pop("quantization_config", None)
        check_quantization({} if stored is None else stored, "fp8")
        drop_fixed(values, _FIXED)
        config = build(cls, values, also=(*_FIXED, *BOOKKEEPING))
        elsewhere.check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """In the keys of a released config.json, which transformers reads too."""
        own = {k: v for k, v in asdict(self).items() if v is not None and k not in _OBJECTIVE}
        also = {"architectures": [self.architecture], "num_key_value_heads": self.num_attention_heads}
        if self.rope_scaling:
            own["rope_scaling"] = {k: v for k, v in own["rope_scaling"].items() if v is not None}
        return json.loads(json.dumps({**_FIXED, **own, **also}, sort_keys=True))


def _check_sizes(c: LineageConfig) -> None:
    for name in (f.name for f in fields(c) if f.type is int):
        least = 0 if name in _MAY_BE_0 else 1
        require(getattr(c, name) >= least, name, getattr(c, name), f"an integer of at least {least}")
    require(c.rope_theta > 1, "rope_theta", c.rope_theta, "positive numbers above 1")
    for name in _POSITIVE:
        require(getattr(c, name) > 0, name, getattr(c, name), "positive numbers")
    for name in _OBJECTIVE:
        require(getattr(c, name) >= 0, name, getattr(c, name), "numbers >= 0")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(c, name)
        require(token is None or 0 <= token < c.vocab_size, name, token, f"0 to vocab_size - 1 = {c.vocab_size - 1}")
    for name in _INDEXER:
        size = getattr(c, name)
        holds = (size is not None and size > 0) if c.sparse else size is None
        require(holds, name, size, f"a size in V3.2, none in V3, and model_type is {c.model_type!r}")
    rotary = c.qk_rope_head_dim
    require(rotary % 2 == 0, "qk_rope_head_dim", rotary, "an even number")
    wide = c.index_head_dim is None or c.index_head_dim >= rotary
    require(wide, "index_head_dim", c.index_head_dim, f"at least qk_rope_head_dim={rotary}")
    require(c.torch_dtype in DTYPES, "torch_dtype", c.torch_dtype, ", ".join(DTYPES))


def _check_layers(c: LineageConfig) -> None:
    kinds, layers = c.mlp_layer_types, c.num_hidden_layers
    if kinds is None:
        return
    require(len(kinds) == layers, "len(mlp_layer_types)", len(kinds), f"num_hidden_layers={layers}")
    for i, kind in enumerate(kinds):
        require(kind in ("dense", "sparse"), f"mlp_layer_types[{i}]", kind, "'dense' or 'sparse'")
    first, said = first_kinds(kinds, "dense"), c.first_k_dense_replace
    agrees = min(said, layers) == first and (c.sparse or "dense" not in kinds[first:])
    allowed = f"dense layers first, first_k_dense_replace={said} of them, in V3, and as many of them in V3.2"
    require(agrees, "mlp_layer_types", kinds, allowed)
    if "dense" not in kinds[first:]:
        object.__setattr__(c, "mlp_layer_types", None)


def _check_experts(c: LineageConfig) -> None:
    experts, groups, chosen = c.n_routed_experts, c.n_group, c.num_experts_per_tok
    require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts={experts}")
    require(experts // groups >= 2, "n_group", groups, f"groups of two experts at least of n_routed_experts={experts}")
    require(c.topk_group <= groups, "topk_group", c.topk_group, f"at most n_group={groups}")
    reach = c.topk_group * (experts // groups)
    require(chosen <= reach, "num_experts_per_tok", chosen, f"at most {reach}, those of topk_group={c.topk_group}")
