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

KINDS = ("deepseek_v3", "deepseek_v32")
SHIPPED = ("v3", "v3.2")

# Keys that the generation does not vary: checked and left out.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False, "moe_layer_freq": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "rope_interleave": True,
}  # fmt: skip
# Keys that say how a checkpoint is stored or served, or follow from others.
_IGNORED = (
    *("architectures", "auto_map", "dtype", "ep_size", "expert_dtype", "head_dim", "layer_types", "mlp_layer_types"),
    *("num_key_value_heads", "num_local_experts", "num_nextn_predict_layers", "output_router_logits", "pretraining_tp"),
    *("qk_head_dim", "quantization_config", "transformers_version", "use_cache", "_name_or_path", "return_dict"),
    *("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions", "problem_type"),
    *("output_hidden_states", "seq_aux", "aux_loss_alpha", "router_aux_loss_coef"),
)


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
    rope_scaling: Mapping[str, Any] | None = None
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
        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed is {allowed}")

        require(self.model_type in KINDS, "model_type", " or ".join(map(repr, KINDS)))
        sparse = self.model_type == "deepseek_v32"
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            value = getattr(self, name)
            require((value is not None and value > 0) if sparse else value is None, name, "a size in V3.2, none in V3")
        optional = ("first_k_dense_replace", "n_shared_experts")
        for name in (f.name for f in fields(self) if f.type is int or f.type == "int"):
            least = 0 if name in optional else 1
            require(getattr(self, name) >= least, name, f"an integer of at least {least}")
        require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number")
        require(self.n_routed_experts % self.n_group == 0, "n_group", f"a divisor of {self.n_routed_experts} experts")
        require(self.n_routed_experts // self.n_group >= 2, "n_group", "groups of two experts at least")
        require(self.topk_group <= self.n_group, "topk_group", f"at most n_group={self.n_group}")
        reach = self.topk_group * (self.n_routed_experts // self.n_group)
        require(
            self.num_experts_per_tok <= reach, "num_experts_per_tok", f"at most {reach}, those of the chosen groups"
        )
        if sparse:
            wide = self.index_head_dim is not None and self.index_head_dim >= self.qk_rope_head_dim
            require(wide, "index_head_dim", f"at least qk_rope_head_dim={self.qk_rope_head_dim}")
        yarn = self.rope_scaling
        require(yarn is None or yarn.get("type") == "yarn", "rope_scaling", "none or of type 'yarn'")

    @property
    def sparse(self) -> bool:
        """Whether attention reads what an indexer picks (V3.2)."""
        return self.model_type == "deepseek_v32"

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    @property
    def temperature(self) -> float:
        """YaRN's factor on the logits: (0.1 mscale_all_dim ln factor + 1)^2; V4 has none."""
        yarn = self.rope_scaling or {}
        if yarn.get("factor", 1) <= 1 or not yarn.get("mscale_all_dim"):
            return 1.0
        return (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2

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
        """From the keys of a released config.json, or of the one that transformers writes."""
        values = {key: value for key, value in data.items() if key not in _IGNORED}
        if isinstance(data.get("mlp_layer_types"), list):
            kinds = data["mlp_layer_types"]
            dense = sum(kind == "dense" for kind in kinds)
            if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
                raise ValueError(f"mlp_layer_types={kinds}: allowed are dense layers first, then sparse ones")
            values["first_k_dense_replace"] = dense
        for key, allowed in _FIXED.items():
            if values.pop(key, allowed) != allowed:
                raise ValueError(f"{key}={data[key]!r}: allowed is {allowed!r}")
        rotary = dict(values.pop("rope_parameters", None) or {})
        if rotary:
            values["rope_theta"] = rotary.pop("rope_theta", values.get("rope_theta", 10000.0))
            kind = rotary.pop("rope_type", rotary.pop("type", "default"))
            rotary.pop("type", None)
            values["rope_scaling"] = None if kind == "default" else {"type": kind, **rotary}
        elif values.get("rope_scaling"):
            scaling = dict(values["rope_scaling"])
            values["rope_scaling"] = {"type": scaling.pop("rope_type", scaling.pop("type", None)), **scaling}
        if "dtype" in data:
            values["torch_dtype"] = str(data["dtype"]).removeprefix("torch.")
        if isinstance(values.get("eos_token_id"), list) and len(values["eos_token_id"]) == 1:
            values["eos_token_id"] = values["eos_token_id"][0]
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """In the keys of a released config.json, which transformers reads too."""
        name = "DeepseekV32ForCausalLM" if self.sparse else "DeepseekV3ForCausalLM"
        own = {k: v for k, v in asdict(self).items() if v is not None and k not in _OURS}
        also = {"architectures": [name], "num_key_value_heads": self.num_attention_heads}
        return dict(sorted({**_FIXED, **own, **also}.items()))


_OURS = ("balance_loss_weight", "index_loss_weight", "router_bias_update_speed")
