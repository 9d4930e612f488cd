"""`abyssal eval constrained`: valid JSON and tool calls from any model, and what the constraint costs."""

import argparse
import sys
from pathlib import Path

from .options import Command, flag


def _arguments(parser: argparse.ArgumentParser) -> None:
    text = "folder of a run, a checkpoint or a model (path; default: a random one, see --random)"
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help=text)
    flag(parser, "--random", str, "nano", "configuration of the random model, if there is no checkpoint")
    flag(parser, "--tokenizer", str, None, "'bytes' or the folder of a trained one", "that of the run; else 'bytes'")
    flag(parser, "--answers", int, 1000, "answers in JSON, over 20 schemas; and a fifth as many of tool calls")
    flag(parser, "--tokens", int, 384, "tokens of an answer at most")
    flag(parser, "--batch", int, 50, "answers written side by side")
    flag(parser, "--seed", int, 0, "of the random model and of the drawing")


def _run(options: argparse.Namespace) -> None:
    from ..evaluate.constrained import json_tasks, open_model, run, tool_tasks
    from ..talk.terminal.visible import shown

    model, tokenizer = open_model(options.checkpoint, options.random, options.tokenizer, options.seed)
    invalid = 0
    for title, make, answers in (
        ("JSON", json_tasks, options.answers),
        ("tool calls", tool_tasks, -(-options.answers // 5)),
    ):
        report = run(model, tokenizer, make(tokenizer), answers, options.tokens, options.batch, options.seed)
        print(shown(f"{title}\n{report}", sys.stdout), flush=True)
        invalid += len(report.failures)
    if invalid:
        raise FloatingPointError(f"{invalid} answers are not valid")


COMMANDS = {
    "eval constrained": Command(
        _run,
        _arguments,
        "JSON and tool calls under a constraint: how many are valid, microseconds per token",
        "abyssal eval constrained --random nano --answers 1000",
    )
}
