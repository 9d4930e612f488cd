"""What a command is, and the options that several have."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command: what runs it, what adds its options, one line of help, an example, and more for the help's end."""

    run: Callable[[argparse.Namespace], None]
    arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    example: str
    details: Callable[[], str] | None = None


def flag(parser: argparse.ArgumentParser, name: str, kind: type, default: Any, meaning: str, shown: str = "") -> None:
    """An option whose help ends with its type and default."""
    text = f"{meaning} ({kind.__name__.lower()}; default: {shown or default})"
    parser.add_argument(name, type=kind, default=default, metavar=name.strip("-").replace("-", "_").upper(), help=text)


def set_argument(parser: argparse.ArgumentParser) -> None:
    text = "a recipe key as TABLE.KEY=VALUE, TOML value, or TABLE=none; repeatable (str; default: as in the recipe)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def width() -> int:
    """Of the terminal, within reason; 100 where there is none."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))


def checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    text = "run (its newest checkpoint), checkpoint, or folder with config.json and safetensors (path)"
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help=text)


def tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--tokenizer", str, None, "bytes, or a folder or tokenizer.json", "the model's own")
