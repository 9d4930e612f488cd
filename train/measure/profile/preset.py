"""What is profiled: a recipe, or a released configuration, as a whole or cut down to fewer layers and experts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ....model.accounting import account
from ....model.config import ModelConfig, read_recipe
from ...recipe import Recipe, apply
from ...run.schedule import Phase, Schedule
from ..roofline import DTYPES

STATE = 16  # bytes of a parameter in training: float32 weight, gradient and two moments


@dataclass(frozen=True)
class Preset:
    recipe: Recipe
    dtype: str
    decode_length: int
    decode_batch: int
    reads_text: bool  # a recipe, whose text is profiled; otherwise random tokens are

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def phase(self) -> Phase:
        """Of the training step: the recipe's first."""
        return Schedule(self.recipe).phase(0)

    @property
    def tokens(self) -> int:
        """Of a training step."""
        return len(self.phase.rows) * self.phase.length

    @property
    def parameters(self) -> int:
        return account(self.recipe.model).trainable

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "recipe"}
        return self.recipe.to_dict() | own | {"parameters": self.parameters}


def load_preset(
    name: str,
    device: torch.device,
    *,
    tokens: int | None = None,
    batch: int | None = None,
    dtype: str | None = None,
    decode_length: int | None = None,
    decode_batch: int = 1,
    layers: int | None = None,
    experts: int | None = None,
    overrides: Sequence[str] = (),
) -> Preset:
    """The recipe or released configuration `name`, with what is given in place of its own; None: its own.

    A released configuration trains on a row of 4,096 tokens, in bfloat16 on a GPU and float32 on a CPU. Decoding is
    behind 1,024 tokens.

    Raises:
        ValueError: no such name, an unknown key, or a number that is not allowed.
    """
    given = (("tokens", tokens), ("batch", batch), ("layers", layers), ("experts", experts))
    for option, value in (*given, ("decode_length", decode_length), ("decode_batch", decode_batch)):
        if value is not None and value < 1:
            raise ValueError(f"{option}={value}: allowed are integers from 1")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    values = apply(read_recipe(name), overrides)
    reads_text = Path(name).suffix == ".toml" or len(read_recipe(name)) > 1
    if not reads_text:  # nor is the tokenizer read, which is the configuration's own
        values["data"] = {"sequence_length": 4096, "batch_size": 1, "tokenizer": name} | values.get("data", {})
        values["train"] = {"dtype": "bfloat16" if device.type == "cuda" else "float32"} | values.get("train", {})
    recipe = Recipe.from_dict(values | {"name": Path(name).stem})
    if recipe.train.prepare:
        raise ValueError(f"train.prepare={recipe.train.prepare!r}: allowed is none: ours are the mechanisms measured")
    recipe = _resized(replace(recipe, model=cut(recipe.model, layers, experts)), tokens, batch)
    longest = recipe.model.max_position_embeddings
    length = min(1024, longest // 2) if decode_length is None else decode_length
    preset = Preset(recipe, dtype or recipe.train.dtype, length, decode_batch, reads_text)
    for option, value in (("tokens", preset.phase.length), ("decode_length", length)):
        if value > longest:
            raise ValueError(f"{option}={value}: {name} allows max_position_embeddings={longest}")
    return preset


def _resized(recipe: Recipe, tokens: int | None, batch: int | None) -> Recipe:
    """The recipe with rows of so many tokens and batches of so many rows, in all its stages; None: its own."""
    size = {"sequence_length": tokens, "batch_size": batch}
    given: dict[str, Any] = {name: value for name, value in size.items() if value is not None}
    stages = tuple(replace(stage, **given) for stage in recipe.stages)
    return replace(recipe, data=replace(recipe.data, **given), stages=stages)


def cut(config: ModelConfig, layers: int | None, experts: int | None) -> ModelConfig:
    """The first layers alone, with fewer experts, each of the width it has; a token visits no more than there are.

    Raises:
        ValueError: more layers or experts than the configuration has.
    """
    changes: dict[str, Any] = {}
    if layers is not None:
        if layers > config.num_hidden_layers:
            raise ValueError(f"layers={layers}: the configuration has num_hidden_layers={config.num_hidden_layers}")
        memory = config.engram
        inside = tuple(layer for layer in memory.layers if layer < layers) if memory else ()
        changes = {
            "num_hidden_layers": layers,
            "compress_ratios": config.compress_ratios[:layers],
            "layer_types": config.layer_types[:layers],
            "num_hash_layers": sum(config.is_hash(layer) for layer in range(layers)),
            "mlp_layer_types": config.mlp_layer_types and config.mlp_layer_types[:layers],
            "engram": replace(memory, layers=inside) if memory and inside else None,
        }
    if experts is not None:
        if experts > config.n_routed_experts:
            raise ValueError(f"experts={experts}: the configuration has n_routed_experts={config.n_routed_experts}")
        changes |= {"n_routed_experts": experts, "num_experts_per_tok": min(experts, config.num_experts_per_tok)}
    return replace(config, **changes)


def check_fits(preset: Preset, device: torch.device) -> None:
    """Raises ValueError where parameters, gradients and optimizer states alone need more memory than there is."""
    needed, there = STATE * preset.parameters, available_memory(device)
    if needed > there:
        raise ValueError(
            f"{preset.name} has {preset.parameters:,} parameters: a training step needs at least {needed:,} bytes "
            f"({needed / 2**30:,.1f} GiB: weights, gradients and two moments in float32, activations not counted), "
            f"{device} has {there / 2**30:,.1f} GiB free; cut it down with --layers and --experts"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that can be had: free ones of a GPU; on a CPU all that the system could free, where it tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
