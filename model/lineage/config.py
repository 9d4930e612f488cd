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

from ..config import DTYPES, RopeScaling
from ..dialect import BOOKKEEPING, lineage_from_huggingface
from ..fields import build, drop_fixed, require, settle

KINDS = ("deepseek_v3", "deepseek_v32")
SHIPPED = ("v3", "v3.2")

# Keys that the generation does not vary: checked and left out.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False, "moe_layer_freq": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "rope_interleave": True,
}  # fmt: skip
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
_MAY_BE_0 = ("first_k_dense_replace", "n_shared_experts")
_POSITIVE = ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range")
_OBJECTIVE = ("balance_loss_weight", "index_loss_weight", "router_bias_update_speed")


@dataclass(frozen=True, kw_only=True)
class LineageScaling(RopeScaling):
    """YaRN with a temperature: queries and keys are 0.1 mscale_all_dim ln factor + 1 times as long.

    Raises:
        TypeError, ValueError: as `RopeScaling`, or the rotary part has a temperature of its own (`mscale` is another).
    """

    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mscale_all_dim >= 0, "rope_scaling.mscale_all_dim", self.mscale_all_dim, "numbers >= 0")
        same = self.mscale == self.mscale_all_dim
        require(same, "rope_scaling.mscale", self.mscale, f"mscale_all_dim={self.mscale_all_dim}")


@dataclass(frozen=True, kw_only=True)
class _Elsewhere:
    """Keys of a configuration that are read in another form, or not at all: they have their type nevertheless."""

    architectures: tuple[str, ...] | None = None
    aux_loss_alpha: float | None = None
    ep_size: int | None = None
    expert_dtype: str | None = None
    head_dim: int | None = None
    layer_types: tuple[str, ...] | None = None
    mlp_layer_types: tuple[str, ...] | None = None
    num_key_value_heads: int | None = None
    num_local_experts: int | None = None
    num_nextn_predict_layers: int | None = None
    pretraining_tp: int | None = None
    qk_head_dim: int | None = None
    seq_aux: bool | None = None

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True, kw_only=True)
class LineageConfig:
    """Shape and constants of a V3 or V3.2 model. The indexer's sizes are None in V3.

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
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
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
        _check_experts(self)

    @property
    def sparse(self) -> bool:
        """Whether attention reads what an indexer picks (V3.2)."""
        return self.model_type == "deepseek_v32"

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @property
    def temperature(self) -> float:
        """YaRN's factor on the logits: (0.1 mscale_all_dim ln factor + 1)^2; V4 has none."""
        yarn = self.rope_scaling
        return (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2 if yarn else 1.0

    @classmethod
    def load(cls, name: str | Path) -> "LineageConfig":
        """A shipped configuration ("v3", "v3.2") or a JSON file. Raises FileNotFoundError with the names there are."""
        if str(name) in SHIPPED:
            text = resources.files("abyssal.configs.lineage").joinpath(f"{name}.json").read_text("utf-8")
        elif Path(name).is_file():
            text = Path(name).read_text("utf-8")
        else:
            raise FileNotFoundError(f"{name!r}: allowed are {', '.join(SHIPPED)} or the path of a .json file")
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LineageConfig":
        """From the keys of a released config.json, or of the one that transformers writes.

        Raises:
            TypeError, ValueError: as the class, for an unknown or missing key, or a value that V3 does not vary.
        """
        kinds = _check_read(data).mlp_layer_types
        values = lineage_from_huggingface(data if kinds is None else {**data, "mlp_layer_types": list(kinds)})
        if isinstance(values.get("rope_scaling"), Mapping):
            kind = values["rope_scaling"]["type"]
            require(kind in (None, "yarn"), "rope_scaling.type", kind, "'yarn'")
        drop_fixed(values, _FIXED)
        config = build(cls, values, also=(*_FIXED, *BOOKKEEPING))
        count, layers = len(kinds or ()), config.num_hidden_layers
        require(kinds is None or count == layers, "len(mlp_layer_types)", count, f"num_hidden_layers={layers}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """In the keys of a released config.json, which transformers reads too."""
        name = "DeepseekV32ForCausalLM" if self.sparse else "DeepseekV3ForCausalLM"
        own = {k: v for k, v in asdict(self).items() if v is not None and k not in _OBJECTIVE}
        also = {"architectures": [name], "num_key_value_heads": self.num_attention_heads}
        return dict(sorted({**_FIXED, **own, **also}.items()))


def _check_read(data: Mapping[str, Any]) -> _Elsewhere:
    """What is read in another form, or not at all, in the types that it declares."""
    require(isinstance(data, Mapping), "data", data, "a table of a config.json's keys")
    yarn = ", ".join(f.name for f in fields(LineageScaling))
    tables = {"rope_scaling": yarn, "rope_parameters": f"rope_theta, rope_type, {yarn}"}
    for name, keys in {**tables, "quantization_config": "how weights are stored"}.items():
        value = data.get(name)
        require(isinstance(value, Mapping | LineageScaling | None), name, value, f"a table of {keys}, or none")
    return _Elsewhere(**{f.name: data[f.name] for f in fields(_Elsewhere) if f.name in data})


def _check_sizes(c: LineageConfig) -> None:
    for name in (f.name for f in fields(c) if f.type is int):
        least = 0 if name in _MAY_BE_0 else 1
        require(getattr(c, name) >= least, name, getattr(c, name), f"an integer of at least {least}")
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
        require(holds, name, size, "a size in V3.2, none in V3")
    rotary = c.qk_rope_head_dim
    require(rotary % 2 == 0, "qk_rope_head_dim", rotary, "an even number")
    wide = c.index_head_dim is None or c.index_head_dim >= rotary
    require(wide, "index_head_dim", c.index_head_dim, f"at least qk_rope_head_dim={rotary}")
    require(c.torch_dtype in DTYPES, "torch_dtype", c.torch_dtype, ", ".join(DTYPES))


def _check_experts(c: LineageConfig) -> None:
    experts, groups, chosen = c.n_routed_experts, c.n_group, c.num_experts_per_tok
    require(experts % groups == 0, "n_group", groups, f"a divisor of {experts} experts")
    require(experts // groups >= 2, "n_group", groups, "groups of two experts at least")
    require(c.topk_group <= groups, "topk_group", c.topk_group, f"at most n_group={groups}")
    reach = c.topk_group * (experts // groups)
    require(chosen <= reach, "num_experts_per_tok", chosen, f"at most {reach}, those of the chosen groups")
