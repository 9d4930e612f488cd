"""What a folder says of its model beside the weights: config.json, generation_config.json, the tokenizer's files."""

import json
from pathlib import Path
from typing import Any

import torch

from ..dialect import NoPlace
from ..folders import CONFIG
from . import families
from .families import Config, Family

GENERATION = "generation_config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
SPARSE = "sparse"  # the attention stage of a model whose training is over


def config(
    family: Family, config: Config, layout: str, weights: str, dtype: str, stage: str
) -> tuple[str, dict[str, Any]]:
    """The layout that holds a model, and its config.json there: "abyssal" where transformers' own classes cannot.

    Raises:
        ValueError: the family or the number format has no such layout.
    """
    if layout == "huggingface" and stage != SPARSE:
        layout = "abyssal"
    try:
        written = family.written(config, layout, weights, dtype)
    except NoPlace:
        layout, written = "abyssal", family.written(config, "abyssal", weights, dtype)
    return layout, written if stage == SPARSE else {**written, "attention_stage": stage}


def checkpoint(config: Config, dtype: torch.dtype, stage: str, prepared: str) -> dict[str, bytes]:
    """The files that make a checkpoint of a run a model, whose weights have our names; `prepared`: what changed it."""
    written = families.V4.written(config, "abyssal", "exact", str(dtype).removeprefix("torch."))
    written |= {} if stage == SPARSE else {"attention_stage": stage}
    written |= {"prepared": prepared} if prepared else {}
    return {CONFIG: _json(written), GENERATION: generation(config)}


def generation(config: Config) -> bytes:
    """generation_config.json: which tokens open, end and pad a text; to be drawn from the whole distribution."""
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = {name: token for name, token in tokens.items() if token is not None}
    return _json({**given, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0})


def carried(folder: Path) -> dict[str, bytes]:
    """The files of a folder that a model takes along into another one."""
    names = (GENERATION, *TOKENIZER)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
