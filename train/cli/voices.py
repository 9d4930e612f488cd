"""Which model to talk to: the options that `abyssal chat` and `abyssal serve` share."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import flag, tokenizer_argument

if TYPE_CHECKING:
    from ..talk.voice import Voice


def voice_arguments(parser: argparse.ArgumentParser) -> None:
    text = "run, checkpoint, or folder with config.json and safetensors (path; not with --random)"
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=text)
    text = "instead of RUN: a shipped configuration with random weights, for trying things out (str; default: none)"
    parser.add_argument("--random", metavar="PRESET", help=text)
    tokenizer_argument(parser)
    flag(parser, "--context", int, None, "tokens of a conversation", "the model's positions, at most 32768")
    flag(parser, "--device", str, "auto", "auto, cpu, cuda or cuda:N")


def voice(options: argparse.Namespace, name: str | None = None) -> "Voice":
    """The model that was asked for. Raises ValueError unless it is exactly one."""
    from ..talk.voice import open_voice, random_voice

    if (options.folder is None) == (options.random is None):
        raise ValueError("either RUN or --random PRESET is needed" if options.folder is None else "RUN with --random")
    if options.random is None:
        found = open_voice(options.folder, options.tokenizer, options.context, options.device, name)
        if found.untaught:
            taught = f"abyssal train sft --set data.source=FILE.jsonl --set train.init={options.folder}"
            print(f"{found.name} was never taught to converse, it writes on ({taught})", file=sys.stderr)
        return found
    if options.tokenizer not in (None, "bytes"):
        raise ValueError(f"tokenizer={options.tokenizer!r} with --random: allowed is 'bytes'")
    found = random_voice(options.random, options.context, options.device, name)
    print(f"{options.random}: RANDOM WEIGHTS, what it writes means nothing", file=sys.stderr)
    return found
