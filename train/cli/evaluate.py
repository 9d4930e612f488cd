"""`abyssal eval ...`: what a trained model can do."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from .options import Command, checkpoint_argument, flag, tokenizer_argument, trust_argument


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_argument(parser)
    tokenizer_argument(parser)
    flag(parser, "--rows", int, None, "held-out rows to read; 0 = all", "as in the run's recipe, else 128")
    flag(parser, "--length", int, None, "tokens of a row", "as in the run's recipe, else 512")
    text = "held-out part of other data: what data.source takes; of conversations that are not the recipe's, all"
    flag(parser, "--source", str, None, text, "as in the run's recipe, else stdlib")


def _eval(options: argparse.Namespace) -> None:
    import torch

    from ..data.conversations import ChatSource
    from ..data.source import TextSource
    from ..run import checkpoint, opponents
    from ..run.load import open_model
    from ..start import open_source
    from ..talk.terminal.visible import shown

    loaded = open_model(options.checkpoint, tokenizer=options.tokenizer)
    given = {"source": options.source, "held_out_rows": options.rows, "sequence_length": options.length}
    recipe = loaded.learning(**{key: value for key, value in given.items() if value is not None})
    if recipe.planted and options.length:
        recipe = replace(recipe, planted=replace(recipe.planted, eval_length=options.length, eval_lengths=()))
    own = loaded.recipe.with_absolute_paths().data.source if loaded.recipe else None
    source = open_source(recipe, loaded.tokenizer, test=own not in (None, recipe.data.source))
    scores = source.evaluate(loaded.model, getattr(torch, recipe.train.dtype))
    print(shown(source.describe(), sys.stdout))
    if isinstance(source, TextSource):
        rows = source.held_out
        print(f"{'held-out bytes':<24} {source.held_out_bytes():,} in {len(rows.rows)} of {rows.stream.rows} rows")
    if isinstance(source, ChatSource):
        print(f"{'held-out answers':<24} {source.held_out.learnt():,} tokens in {len(source.held_out.rows)} rows")
    for label, text in source.report(scores).items():
        print(f"{label:<24} {text}")
    if isinstance(source, TextSource):
        run = checkpoint.run_of(loaded.folder) if loaded.recipe else None
        step = checkpoint.read_state(loaded.folder)[1].step if run else 0
        print(f"\n{opponents.table(opponents.compare(source, scores, step, run))}")


def _needle_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_argument(parser)
    flag(parser, "--lengths", str, "256,512,1024,2048,4096", "tokens of the prompts")
    flag(parser, "--depths", str, "0,0.25,0.5,0.75,1", "where the facts stand: 0 = start, 1 = before the question")
    flag(parser, "--trials", int, 8, "facts for each length and depth")
    flag(parser, "--batch", int, 8, "facts asked for side by side")
    flag(parser, "--seed", int, 0, "of the facts and the text around them")
    flag(parser, "--out", Path, None, "folder for needle.json and needle.png", "that of the run")


def _needle(options: argparse.Namespace) -> None:
    from ..evaluate.needle import run

    chosen = {name: getattr(options, name) for name in ("lengths", "depths", "trials", "batch", "seed", "out")}
    run(options.checkpoint, **chosen)


def _speculative_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_argument(parser)
    flag(parser, "--prompts", int, 16, "held-out documents to go on from")
    flag(parser, "--tokens", int, 125, "tokens to write after each")
    flag(parser, "--prompt-bytes", int, 200, "bytes of a document to read first")


def _speculative(options: argparse.Namespace) -> None:
    from ..evaluate.speculation import run

    compared = run(options.checkpoint, options.prompts, options.tokens, options.prompt_bytes)
    print(compared)
    if compared.differs is not None:
        raise FloatingPointError("speculative decoding wrote other tokens than plain decoding")


def _lm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a model, of any layout, or of a run (path)"
    )
    trust_argument(parser)
    flag(parser, "--tasks", str, None, "names of tasks, divided by commas", "none")
    flag(parser, "--limit", int, None, "questions of each task", "all")
    flag(parser, "--shots", int, None, "solved examples before each question", "as the task says")
    flag(parser, "--include", Path, None, "folder of tasks' files, instead of lm-eval's own", "none")
    flag(parser, "--tokenizer", str, None, "'bytes', or a folder with a tokenizer.json", "the model's")
    flag(parser, "--batch", int, 8, "texts side by side")
    flag(parser, "--device", str, "auto", "auto, cpu or cuda")


def _lm(options: argparse.Namespace) -> None:
    if not options.tasks:
        raise ValueError("--tasks is missing: allowed are names of tasks, divided by commas")
    from ..evaluate.harness import AbyssalLM, run

    model = AbyssalLM(options.model, options.tokenizer, options.device, batch_size=options.batch)
    print(run(model, options.tasks.split(","), options.limit, options.shots, options.include))


COMMANDS = {
    "eval": Command(
        _eval,
        _eval_arguments,
        "What a model scores on held-out data: bits per byte beside n-gram models and xz, or of answers, or right ones",
        "abyssal eval runs/toy-20260101-120000 --rows 0",
    ),
    "eval needle": Command(
        _needle,
        _needle_arguments,
        "Facts hidden in long text: what a trained model finds, and how far back",
        "abyssal eval needle runs/toy-20260101-120000 --lengths 256,1024,4096 --trials 16",
    ),
    "eval speculative": Command(
        _speculative,
        _speculative_arguments,
        "Speculative against plain decoding: the same tokens, drafts accepted, speed",
        "abyssal eval speculative runs/toy-20260101-120000 --prompts 16 --tokens 125",
    ),
    "eval lm": Command(
        _lm,
        _lm_arguments,
        "Benchmarks of lm-eval on any model",
        "abyssal eval lm runs/toy-20260101-120000 --tasks lambada_openai,arc_easy --limit 100",
    ),
}
