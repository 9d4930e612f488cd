"""`abyssal eval reasoning`: what runs of the reasoning recipes know, thinking and not."""

import argparse
from pathlib import Path

from .options import Command, flag


def _arguments(parser: argparse.ArgumentParser) -> None:
    text = "runs or checkpoints of recipes with [reason], all seeds; or a reasoning.json, to be shown anew (paths)"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    flag(parser, "--problems", int, 256, "held-out problems of each task, asked in each mode")
    flag(parser, "--out", Path, None, "folder for reasoning.json, RESULTS.md and reasoning.png", "the first RUN")


def _run(options: argparse.Namespace) -> None:
    from ..plots.reason import plot
    from ..reason.evaluate import run

    if options.problems < 1:
        raise ValueError(f"--problems {options.problems}: allowed are numbers from 1")
    results = run(options.runs, options.problems, options.out)
    print(f"results  {results}\npicture  {plot(results)}")


COMMANDS = {
    "eval reasoning": Command(
        _run,
        _arguments,
        "Accuracy on held-out problems, thinking and answering at once, over seeds",
        "abyssal eval reasoning runs/sft-0 runs/sft-1 runs/grpo-0 runs/grpo-1 --out results",
    ),
}
