"""What differs between the generations: configuration, model, names, and how a quantised matrix's scales are stored."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import ModelConfig
from ..dialect import OURS, to_huggingface
from ..lineage import LineageConfig, LineageTransformer
from ..lineage import names as lineage_names
from ..lineage.config import KINDS
from ..transformer import Transformer
from . import formats, names

Config = Any  # ModelConfig or LineageConfig


class Family(NamedTuple):
    """One generation's side of reading and writing."""

    load: Callable[[Mapping[str, Any], Iterable[str]], Config]  # config.json's keys, and the tensors that are stored
    model: Callable[[Config], Any]
    written: Callable[
        [Config, str, str, str], dict[str, Any]
    ]  # config.json in a layout, with these weights, this dtype
    sources: Callable[[str, Config, str], dict[str, names.Index]]
    layout_of: Callable[[Iterable[str]], str]
    is_left_out: Callable[[str, Config], bool]
    scale_name: Callable[[str], str]
    scales: str  # safetensors' dtype


def family_of(description: Mapping[str, Any]) -> Family:
    """That of a config.json's keys."""
    return LINEAGE if description.get("model_type") in KINDS else V4


def family_of_model(model: Any) -> Family:
    return LINEAGE if isinstance(model.config, LineageConfig) else V4


def _load_v4(description: Mapping[str, Any], stored: Iterable[str]) -> ModelConfig:
    """Without MTP tensors the model has no MTP block."""
    config = ModelConfig.from_dict(description)
    return config if any(name.startswith("mtp.") for name in stored) else replace(config, num_nextn_predict_layers=0)


def _written_v4(config: ModelConfig, layout: str, weights: str, dtype: str) -> dict[str, Any]:
    values = replace(config, torch_dtype=dtype, **formats.described(weights)).to_dict()
    if layout == "abyssal":
        return {**values, **OURS, "dtype": dtype}
    return to_huggingface(values) if layout == "huggingface" else values


def _load_lineage(description: Mapping[str, Any], stored: Iterable[str]) -> LineageConfig:
    return LineageConfig.from_dict(description)


def _written_lineage(config: LineageConfig, layout: str, weights: str, dtype: str) -> dict[str, Any]:
    if weights != "exact":
        raise ValueError(f"weights={weights!r}: {config.model_type} is written with exact weights only")
    if layout == "abyssal":
        raise ValueError(f"layout='abyssal': allowed for {config.model_type} are 'huggingface' and 'official'")
    return replace(config, torch_dtype=dtype).to_dict()


V4 = Family(
    _load_v4, Transformer, _written_v4, names.sources, names.layout_of,
    lambda name, config: names.is_shared_copy(name), formats.scale_name, formats.SCALES,
)  # fmt: skip
LINEAGE = Family(
    _load_lineage, LineageTransformer, _written_lineage, lineage_names.sources, lineage_names.layout_of,
    lineage_names.is_left_out, lambda name: name + "_scale_inv", "F32",
)  # fmt: skip
