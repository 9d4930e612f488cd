"""`abyssal eval reasoning` and `abyssal study`: what runs of the reasoning recipes know, and what each way earns."""

import argparse
from pathlib import Path

from .options import Command, flag, set_argument


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    text = "runs or checkpoints of recipes with [reason], all seeds (paths)"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    flag(parser, "--problems", int, 256, "held-out problems of each task, asked in each mode")


def _eval(options: argparse.Namespace) -> None:
    from ..study.record import TEMPERATURES, record
    from ..study.report import table

    _check_problems(options.problems)
    runs = [record(path, options.problems) for path in options.runs]
    for run in runs:
        if run["tasks"] != runs[0]["tasks"]:
            raise ValueError(f"{run['folder']!r} has tasks {run['tasks']}: allowed are those of the first run")
    for temperature in TEMPERATURES:
        print(table(sorted(runs, key=lambda run: run["seed"]), temperature) + "\n")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="those that are run (str; default: all)")
    parser.add_argument("--list", action="store_true", help="print the studies and their claims (default: off)")
    text = "run nothing: write page and picture again from the reasoning.json in --out (default: off)"
    parser.add_argument("--draw", action="store_true", help=text)
    flag(parser, "--seeds", int, 8, "runs of each arm, with seeds 0, 1, ...")
    flag(parser, "--workers", int, 2, "processes of one thread each that train side by side; 1 = in this one")
    flag(parser, "--problems", int, 256, "held-out problems of each task, asked in each mode")
    flag(parser, "--out", Path, Path("runs/study"), "folder for runs, reasoning.json, RESULTS.md and reasoning.png")
    set_argument(parser)


def _study(options: argparse.Namespace) -> None:
    from ..study.draw import draw
    from ..study.plan import STUDIES, listed
    from ..study.queue import FILE, run_studies, write_page

    names = options.studies or list(STUDIES)
    if options.list:
        print(listed(names))
        return
    if options.draw:
        print(f"page     {write_page(options.out)}\npicture  {draw(options.out / FILE)}")
        return
    _check_problems(options.problems)
    for name, number in (("seeds", options.seeds), ("workers", options.workers)):
        if number < 1:
            raise ValueError(f"--{name} {number}: allowed are positive numbers")
    results = run_studies(
        names,
        options.out,
        seeds=range(options.seeds),
        problems=options.problems,
        workers=options.workers,
        overrides=options.set,
    )
    print(f"results  {results}\npicture  {draw(results)}")


def _check_problems(problems: int) -> None:
    if problems < 1:
        raise ValueError(f"--problems {problems}: allowed are numbers from 1")


COMMANDS = {
    "eval reasoning": Command(
        _eval,
        _eval_arguments,
        "Accuracy on held-out problems, thinking and answering at once, over seeds",
        "abyssal eval reasoning runs/sft-0 runs/sft-1 runs/grpo-0 runs/grpo-1",
    ),
    "study": Command(
        _study,
        _study_arguments,
        "Reasoning: fine-tuning, rewards, distillation as chains of runs with seeds, and verdicts",
        "abyssal study control --seeds 8 --out runs/study",
    ),
}
