"""`abyssal profile`: where a training step and a decoded token spend time and memory."""

import argparse
from pathlib import Path

from .options import Command, flag, trust_argument


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    text = "shipped recipe or released configuration, or a .toml or .json file (str)"
    parser.add_argument("preset", metavar="PRESET", help=text)
    trust_argument(parser)
    flag(parser, "--tokens", int, None, "tokens of a row of the training step", "the recipe's; else 4096")
    flag(parser, "--batch", int, None, "rows of the training step", "the recipe's; else 1")
    flag(parser, "--device", str, None, "cpu, cuda, cuda:1, ...", "a GPU if there is one")
    flag(parser, "--dtype", str, None, "bfloat16, float16 or float32", "the recipe's; else bfloat16 on a GPU")
    flag(parser, "--decode-length", int, None, "tokens behind which one is decoded", "1024")
    flag(parser, "--decode-batch", int, 1, "sequences that are decoded together")
    flag(parser, "--repeats", int, None, "turns of each step, with and without instruments", "20 on a GPU, 7 on a CPU")
    flag(parser, "--layers", int, None, "cut the configuration down to its first layers", "all")
    flag(parser, "--experts", int, None, "cut the configuration down to that many routed experts", "all")
    text = "a recipe key as TABLE.KEY=VALUE, TOML value; repeatable (str; default: as in the preset)"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    flag(parser, "--out", Path, None, "folder for the JSON, the PNG and the traces", "runs/profile-PRESET-DATE-TIME")


def _profile(options: argparse.Namespace) -> None:
    from ..measure.profile.run import run

    names = ("tokens", "batch", "dtype", "decode_length", "decode_batch", "layers", "experts")
    chosen = {name: getattr(options, name) for name in ("device", "repeats", "out", *names)}
    run(options.preset, overrides=options.set, **chosen)


COMMANDS = {
    "profile": Command(
        _profile,
        _profile_arguments,
        "Time and memory of a training step and a decode step by mechanism, beside their limits",
        "abyssal profile toy --decode-length 4096 --out runs/profile-toy",
    )
}
