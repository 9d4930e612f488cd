"""`abyssal ablate [SUITE]`: named experiments with seeds and verdicts."""

import argparse
import importlib.util
from pathlib import Path

from .options import Command, flag


def _arguments(parser: argparse.ArgumentParser) -> None:
    text = "suites to run, FILE.py with suites of your own, or all (str; default: all that --list shows)"
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=text)
    parser.add_argument("--list", action="store_true", help="print the suites and their arms (default: off)")
    size = parser.add_mutually_exclusive_group()
    text = "minutes on two CPU cores (default: on)"
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="quick", help=text)
    text = "longer runs, for hours of CPU or a GPU (default: off)"
    size.add_argument("--full", dest="size", action="store_const", const="full", help=text)
    text = "runs of each arm, with seeds 0, 1, ..., to begin with"
    flag(parser, "--seeds", int, None, text, "those that the suite is registered with")
    flag(parser, "--workers", int, 2, "processes of one thread each that train side by side; 1 = in this one")
    flag(parser, "--out", Path, Path("runs/ablate"), "folder for runs, JSON and PNG")
    text = "override a recipe key in all arms, as in abyssal train (may be given several times; default: none)"
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help=text)
    text = "run nothing: draw the pictures of the suites again from the JSON in --out (default: off)"
    parser.add_argument("--draw", action="store_true", help=text)
    text = "tune instead, by a written procedure: toy, or the dense transformer that is held against it"
    flag(parser, "--sweep", str, None, text, "none")
    flag(parser, "--page", Path, None, "write a page of results from all JSON in --out to this file", "none")


def _run(options: argparse.Namespace) -> None:
    from ..ablate.draw import draw
    from ..ablate.report import table, write_page
    from ..ablate.run import run_suite
    from ..ablate.suites import SUITES, chosen, listed

    suites = chosen(options.suites)
    if options.list:
        print(listed(suites))
        return
    if not importlib.util.find_spec("scipy"):
        raise ModuleNotFoundError("abyssal ablate needs scipy: pip install 'abyssal[ablate]'")
    if options.sweep is not None:
        _sweep(options)
        return
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: allowed are positive numbers")
    for suite in suites:
        path = options.out / f"{suite.name}.json"
        if not options.draw:
            found = run_suite(
                suite,
                options.out,
                seeds=range(options.seeds or suite.seeds),
                size=options.size,
                overrides=options.set,
                workers=options.workers,
            )
            print(f"\n{table(found)}\n\n{path}")
        elif not path.is_file():
            if options.suites and options.suites != ["all"]:
                raise FileNotFoundError(f"{str(path)!r} is not there: run abyssal ablate {suite.name} first")
            continue
        try:
            print(draw(path))
        except ModuleNotFoundError as error:
            print(f"not drawn: {error.name} is not installed (pip install abyssal[plot])")
    if options.page:
        print(write_page(options.out, options.page, list(SUITES | {suite.name: suite for suite in suites})))


def _sweep(options: argparse.Namespace) -> None:
    from ..ablate import sweep
    from ..ablate.suites.sweeps import SWEEPS

    if options.sweep not in SWEEPS:
        raise ValueError(f"--sweep {options.sweep!r}: allowed are {', '.join(SWEEPS)}")
    print(f"\n{sweep.table(sweep.run_sweep(SWEEPS[options.sweep], options.out, workers=options.workers))}")


COMMANDS = {
    "ablate": Command(
        _run,
        _arguments,
        "Named experiments: a baseline, one change, several seeds, a verdict",
        "abyssal ablate indexer --quick --out runs/ablate",
    )
}
