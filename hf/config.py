"""`ModelConfig` as a configuration of transformers: the same keys, as attributes."""

from dataclasses import MISSING, fields
from typing import Any

from transformers import PreTrainedConfig

from ..model.config import ModelConfig
from ..model.dialect import OURS

# What a config.json may leave out. The dtype has another place in transformers, which takes quantization for its own.
DEFAULTS = {field.name: field.default for field in fields(ModelConfig) if field.default is not MISSING}
for _name in ("layer_types", "quantization_config", "torch_dtype"):
    del DEFAULTS[_name]


class AbyssalConfig(PreTrainedConfig):
    """The keys of a config.json in the layout "abyssal". They are checked when a model is made of them."""

    model_type = str(OURS["model_type"])
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (as transformers has it)
    rope_scaling = None  # a key like the others, where transformers has a property that rewrites it

    def __post_init__(self, **keys: Any) -> None:
        keys = {**DEFAULTS, **keys}
        scaling = keys.pop("rope_scaling")
        super().__post_init__(**keys)
        self.rope_scaling = scaling

    def validate_layer_type(self) -> None:
        """`ModelConfig` does that; its list has the MTP block's too."""

    def ours(self) -> ModelConfig:
        """The configuration of `Transformer`. Raises TypeError or ValueError, as `ModelConfig.from_dict`."""
        return ModelConfig.from_dict({**self.to_diff_dict(), **OURS})
