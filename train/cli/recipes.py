"""`abyssal recipe | recipes`: what there is to train, and what its keys mean."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from .options import Command, set_argument, width


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RECIPE", help="shipped name or .toml file (str)")
    parser.add_argument("--all", action="store_true", help="also the keys left at their defaults (default: off)")
    set_argument(parser)


def _recipe(options: argparse.Namespace) -> None:
    from ...model.config import naming, read_recipe, recipe_file
    from ..recipe import Recipe, apply
    from .toml import written

    file, values = recipe_file(options.name), apply(read_recipe(options.name), options.set)
    if file.name.endswith(".toml") and "model" in values:  # a released configuration is none that reads bytes
        naming(options.name, Recipe.from_dict, values)
    text = naming(options.name, written, values, options.all, width())
    header = [*_header(file), *(f"# changed: {' '.join(change.split())}" for change in options.set)]
    print("\n".join([*header, *[""] * bool(header), text]), end="")


def _header(file: Any) -> list[str]:
    """The comment at the top of a recipe."""
    lines = file.read_text("utf-8").splitlines()
    return lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]


def _recipes(_: argparse.Namespace) -> None:
    from ...model.config import shipped
    from ...model.lineage.config import SHIPPED

    files = shipped()
    recipes = [name for name, file in files.items() if file.name.endswith(".toml")]
    others = [*(name for name in files if name not in recipes), *SHIPPED]
    print("recipes: abyssal train NAME, abyssal recipe NAME; minutes on two CPU cores")
    print("\n".join(_table([(name, *_told(files[name]), _parameters(name)) for name in recipes])))
    print("\nconfigurations: abyssal info NAME")
    print("\n".join(_table([(name, f"DeepSeek-{_title(name)} as released", "", _parameters(name)) for name in others])))


def _told(file: Any) -> tuple[str, str]:
    """Purpose and minutes, as a recipe's own header has them: its first sentence, and a line `# minutes: 5`."""
    header = "\n".join(line.removeprefix("#").strip() for line in _header(file))
    minutes = re.search(r"^minutes: *([\d.]+)", header, re.MULTILINE)
    first = re.split(r"\n\n|\nminutes:|(?<=\.)\s", header)[0]
    return " ".join(first.split()), minutes[1] if minutes else ""


def _parameters(name: str) -> str:
    from ...model.accounting import counted
    from ...model.config import read_recipe
    from ..measure import cost

    if name not in cost.RIVALS.values() and "model" not in read_recipe(name):
        return "that of train.init"
    found = cost.accounts(cost.load(name), 0)
    return counted(found.total if name in cost.RIVALS.values() else found.trainable)


def _title(name: str) -> str:
    from ..measure.cost import RIVALS

    return next((title for title, key in RIVALS.items() if key == name), name)


def _table(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """Name, parameters, minutes, purpose; the last within the width that is left."""
    first, last = (max(len(row[i]) for row in rows) for i in (0, 3))
    indent = " " * (first + last + 16)
    for name, purpose, minutes, parameters in rows:
        lead = f"  {name:<{first}}  {parameters:>{last}}  {minutes and f'{minutes} min':>8}  "
        yield textwrap.fill(purpose, width(), initial_indent=lead, subsequent_indent=indent)


COMMANDS = {
    "recipes": Command(
        _recipes,
        lambda parser: None,
        "List the shipped recipes and configurations: purpose, parameters, minutes",
        "abyssal recipes",
    ),
    "recipe": Command(
        _recipe,
        _recipe_arguments,
        "Print a recipe with the meaning of each key, to be saved, changed and trained",
        "abyssal recipe toy --set optim.lr=1e-3 > my.toml",
    ),
}
