"""`abyssal train`: a recipe, a folder, and what came of it."""

import argparse
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

from .inspect import exported
from .options import Command, flag, set_argument, trust_argument, width


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="shipped name or .toml file (str; optional with --resume)"
    )
    flag(parser, "--out", Path, None, "folder of the run", "runs/NAME-DATE-TIME, or the resumed run's")
    flag(parser, "--export", Path, None, "folder to write the model to at the end, with its card", "none")
    flag(parser, "--resume", Path, None, "run or checkpoint to go on with", "start anew")
    set_argument(parser)
    trust_argument(parser)


def _train(options: argparse.Namespace) -> None:
    from ..distributed.world import first_process
    from ..start import train
    from ..talk.terminal.visible import shown

    recipe, out = _recipe_and_folder(options)
    summary = train(recipe, out, options.resume, signals=True)
    if not first_process():
        return
    compared = _try_compare(summary)
    print(shown(_describe(summary, _try_plot(summary.out), compared), sys.stdout))
    if options.export:
        print("\n" + exported(summary.checkpoint, options.export))


def _recipe_and_folder(options: argparse.Namespace) -> tuple[Any, Path | None]:
    """The recipe asked for (a resumed run's own unless one is named), and where the run goes; None = a new folder."""
    from ...model.config import shipped
    from .. import own
    from ..recipe import Recipe, apply, load_recipe, own_code
    from ..run import checkpoint
    from ..start import never_saved

    if options.recipe and options.recipe not in shipped() and Path(options.recipe).is_dir():
        raise ValueError(
            f"RECIPE={options.recipe!r} is a folder: to go on with a run give --resume {options.recipe}; to start from"
            f" its weights give a recipe and --set train.init={options.recipe} (finetune on text, sft on chats)"
        )
    if options.resume is None:
        if options.recipe is None:
            raise ValueError("RECIPE is missing: give a shipped name, a .toml file, or --resume DIR")
        return load_recipe(options.recipe, options.set), options.out
    own.allow(*own_code(apply({}, options.set)))
    begun = never_saved(options.resume)
    if begun:  # it starts over
        stored, out = begun, options.out or options.resume
    else:
        folder = checkpoint.find(options.resume)
        stored, out = checkpoint.read_state(folder)[0].to_dict(), options.out or checkpoint.require_run(folder)
    if options.recipe:
        return load_recipe(options.recipe, options.set), out
    return Recipe.from_dict(apply(stored, options.set)), out


def _try_plot(out: Path) -> str:
    from ..plots.curves import plot
    from ..plots.mechanisms import plot_mechanisms

    try:
        return ", ".join(str(path) for path in (plot(out), plot_mechanisms(out)) if path)
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib, then: abyssal plot {out})"
    except Exception as error:  # a picture, of which a run that has ended well does not fail
        return f"not drawn: {error} (then: abyssal plot {out})"


def _try_compare(summary: Any) -> str:
    from ..data.source import TextSource
    from ..run import opponents

    if not isinstance(summary.source, TextSource):
        return ""
    print("comparing with n-gram models and compressors", flush=True)
    try:
        found = opponents.compare(summary.source, summary.scores, summary.progress.step, summary.out)
        opponents.write(summary.out, found)
        return opponents.table(found)
    except Exception as error:  # a table, of which as little
        return f"not compared: {error} (then: abyssal eval {summary.out})"


def _describe(summary: Any, curves: str, compared: str) -> str:
    steps, tokens, seconds = summary.progress.step, summary.progress.tokens, summary.progress.seconds
    speed = f"{tokens / seconds:,.0f} tokens/s"
    lines = [
        "",
        *(f"{label:<24} {text}" for label, text in summary.report.items()),
        f"trained                  {steps} steps, {tokens:,} tokens in {seconds:.0f} s, {speed}",
        f"curves                   {curves}",
        f"checkpoint               {summary.checkpoint}",
        f"all files                {summary.out}",
    ]
    if compared:
        lines += ["", compared]
    if summary.sample:
        lines += ["", "sample:", summary.sample]
    return "\n".join(lines)


def _recipe_keys() -> str:
    """Every recipe key that --set takes, with its type, default and meaning."""
    from ..settings import OPTIONAL, TABLES

    lines = ["recipe keys (model.* are those of the released config.json, see abyssal recipe NAME --all):"]
    tables = {**TABLES, **OPTIONAL}
    column = max(len(f"{table}.{f.name}") for table, kind in tables.items() for f in fields(kind)) + 4
    for table, kind in tables.items():
        if table in OPTIONAL:
            lines.append(f"  [{table}] is not in every recipe:")
        for f in fields(kind):
            default = list(f.default) if isinstance(f.default, tuple) else f.default
            kind_name = getattr(f.type, "__name__", str(f.type)).replace("tuple", "list")
            lead = f"  {f'{table}.{f.name}':<{column - 2}}{kind_name:<6} "
            text = f"{f.metadata['meaning']} (default: {default!r})"
            lines.append(textwrap.fill(text, width(), initial_indent=lead, subsequent_indent=" " * (column + 7)))
    return "\n".join(lines)


COMMANDS = {
    "train": Command(
        _train,
        _train_arguments,
        "Train a recipe on text, with checkpoints, metrics, curves and a sample",
        "abyssal train toy --set optim.lr=1e-3 --set train.steps=200\n"
        "  torchrun --nproc-per-node 2 -m abyssal.train train nano --set train.expert_parallel=2",
        _recipe_keys,
    )
}
