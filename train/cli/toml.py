"""A recipe as TOML, each key with its meaning behind it: what is written can be saved and trained.

[optim]          # the rules of the parameters (V4 2.4) and the learning rate
rule = "muon"    # how linear maps learn: adamw, or muon
lr = 0.006       # peak learning rate
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from ...model.config import ModelConfig
from ...model.fields import NONE
from ...model.kinds import kinds_of
from ..recipe import of_kind, present
from ..settings import OPTIONAL, STAGES, TABLES, StageConfig

LONG = 46  # characters of `key = value` beside which no meaning fits
MODEL = "keys and values of the released config.json"


def written(values: Mapping[str, Any], every: bool = False, width: int = 100) -> str:
    """The tables of a recipe (`read_recipe`, `apply`) as text; `every`: with the keys that are left at their defaults.

    Raises:
        TypeError, ValueError: a key or a value that its table refuses.
    """
    values, told = present(values), set[str]()
    names = [name for name in values if name != "name"]
    names += [name for name in TABLES if every and name not in values]
    blocks = [f"name = {_toml(values['name'])}"] if "name" in values else []
    stages = [of_kind(StageConfig, stage) for stage in values.get(STAGES, ())]
    for name in names:
        given = values.get(name, {})
        if name == "model":
            blocks.append(_block("[model]", MODEL, ModelConfig.from_dict(given), given, every, width))
        elif name == STAGES:
            title, about = f"[[{name}]]", _about(StageConfig)
            blocks += [_block(title, about, *stage, every, width, told) for stage in zip(stages, given)]
        else:
            if name == "train" and every and stages:
                given = {"steps": sum(stage.steps for stage in stages), **given}
            kind = {**TABLES, **OPTIONAL}[name]
            blocks.append(_block(f"[{name}]", _about(kind), of_kind(kind, given), given, every, width))
    absent = [f"[{name}]" for name in OPTIONAL if name not in values] + [f"[[{STAGES}]]"] * (not stages)
    if every and absent:
        line = f"# not in this recipe (abyssal train --help): {' '.join(absent)}"
        blocks.append(textwrap.fill(line, width, subsequent_indent="# "))
    return "\n\n".join(blocks) + "\n"


def _about(kind: type) -> str:
    """The first sentence of a table's docstring behind its name."""
    return " ".join((kind.__doc__ or "").split()).partition("]: ")[2].rstrip(".")


def _block(
    title: str,
    about: str,
    table: Any,
    given: Mapping[str, Any],
    every: bool,
    width: int,
    told: set[str] | None = None,
) -> str:
    """A table, and behind it those within; a meaning in `told` is not said again."""
    rows, inner = [], []
    for key, value, default, meaning in _entries(table):
        if not (every or key in given or value != default):
            continue
        if is_dataclass(value) or isinstance(value, Mapping):
            part = given.get(key)
            within = part if isinstance(part, Mapping) else {}
            inner.append(_block(f"{title[:-1]}.{key}]", meaning, value, within, every, width))
        elif value is not None or not isinstance(table, Mapping):
            rows.append((key, value, _once(meaning, told)))
    column = 2 + max((len(text) for row in rows if len(text := _line(*row[:2])) <= LONG), default=0)
    column = max(column, len(title) + 2)
    lines = [
        *_beside(title, _once(about, told), column, width),
        *(line for row in rows for line in _row(*row, column, width)),
    ]
    return "\n\n".join(["\n".join(lines), *inner])


def _once(meaning: str, told: set[str] | None) -> str:
    if told is None:
        return meaning
    new = "" if meaning in told else meaning
    told.add(meaning)
    return new


def _entries(table: Any) -> list[tuple[str, Any, Any, str]]:
    """Key, value, default and meaning of each field."""
    if isinstance(table, Mapping):
        return [(key, value, MISSING, "") for key, value in table.items()]
    values = {f.name: getattr(table, f.name) for f in fields(table)}
    if isinstance(table, ModelConfig):  # as a person writes it: without the MTP block, and what follows from ratios
        depth, follows = table.num_hidden_layers, table.layer_types == kinds_of(table.compress_ratios)
        values["compress_ratios"] = table.compress_ratios[:depth]
        values["layer_types"] = () if follows else table.layer_types[:depth]
    return [(f.name, values[f.name], f.default, f.metadata["meaning"]) for f in fields(table)]


def _row(key: str, value: Any, meaning: str, column: int, width: int) -> list[str]:
    text = _line(key, value)
    if len(text) <= LONG:
        return _beside(text, meaning, column, width)
    above = [f"# {part}" for part in textwrap.wrap(meaning, width - 2)]
    if not isinstance(value, list | tuple):
        return [*above, text]
    items = ", ".join(_toml(item).replace(" ", "\0") for item in value)
    lines = textwrap.wrap(items, width - 4, break_long_words=False, break_on_hyphens=False)
    return [*above, f"{key} = [", *(f"    {line}".replace("\0", " ") for line in lines), "]"]


def _beside(text: str, meaning: str, column: int, width: int) -> list[str]:
    parts = textwrap.wrap(meaning, max(width - column - 2, 30))
    lefts = [text, *[""] * (len(parts) - 1)]
    return [f"{left:<{column}}# {part}" for left, part in zip(lefts, parts)] or [text]


def _line(key: str, value: Any) -> str:
    return f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return json.dumps(NONE if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
