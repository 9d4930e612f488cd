"""`abyssal bench [OP]`: every op against other implementations."""

import argparse
from pathlib import Path
from typing import Any

from ..measure.bench import ALIASES, OPS
from .options import Command, flag


def _bench_all_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="OP", help="what to measure (str; default: all)")
    text = "print what can be measured, and at which shapes, instead of measuring it (default: off)"
    parser.add_argument("--list", action="store_true", help=text)
    _bench_common_arguments(parser, "all")


def _bench_all(options: argparse.Namespace) -> None:
    from ..measure.bench import OPS
    from ..measure.bench.run import load, run_all

    if options.op not in (None, "all"):
        load(options.op)
    if not options.list:
        run_all(**_bench_common(options))
        return
    for name in [options.op] if options.op in OPS else OPS:
        op = load(name)
        print(f"abyssal bench {name}   {OPS[name]}")
        for options_of, kind in ((op.shapes, "shape"), (op.data, "data")):
            print(*(f"  --{kind} {choice:<10} {meaning}" for choice, meaning in options_of.items()), sep="\n")


def _bench_common_arguments(parser: argparse.ArgumentParser, op: str) -> None:
    flag(parser, "--tokens", str, None, "numbers of tokens, with commas", "the shape's")
    flag(parser, "--dtype", str, None, "bfloat16, float16 or float32", "bfloat16 on a GPU, float32 on a CPU")
    flag(parser, "--device", str, None, "cpu, cuda, cuda:1, ...", "a GPU if there is one")
    flag(parser, "--repeats", int, None, "turns of each contender that count", "100 on a GPU, 7 on a CPU")
    flag(parser, "--base", str, None, "a commit whose kernels run beside the present ones", "none")
    text = "do not run the op's tests before it is timed (default: they run, and a red op is not timed)"
    parser.add_argument("--no-tests", dest="tests", action="store_false", help=text)
    text = "leave other libraries' implementations out (default: they run where they are installed)"
    parser.add_argument("--ours", dest="others", action="store_false", help=text)
    flag(parser, "--patience", float, 10.0, "seconds after which a contender takes no more turns")
    flag(parser, "--out", Path, None, "folder for the JSON and the PNG", f"runs/bench-{op.upper()}-DATE-TIME")


def _bench_common(options: argparse.Namespace) -> dict[str, Any]:
    names = ("tokens", "dtype", "device", "repeats", "base", "tests", "others", "patience", "out")
    return {name: getattr(options, name) for name in names}


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--shape", str, None, "names or sizes of shapes, with commas", "the op's for the device")
    flag(parser, "--data", str, None, "how inputs are drawn, see abyssal bench --list", "the op's first")
    _bench_common_arguments(parser, "OP")


def _bench(options: argparse.Namespace) -> None:
    from ..measure.bench.run import run

    name = options.command.removeprefix("bench ")
    for op in ALIASES.get(name, (name,)):
        run(op, shape=options.shape, data=options.data, **_bench_common(options))


COMMANDS = {
    "bench": Command(
        _bench_all,
        _bench_all_arguments,
        "Time and memory of every op, against other implementations",
        "abyssal bench --base HEAD~1",
    ),
    **{
        f"bench {op}": Command(
            _bench, _bench_arguments, text, f"abyssal bench {op} --tokens 1024,4096 --out runs/bench"
        )
        for op, text in (OPS | {name: f"As {' and then '.join(ops)}" for name, ops in ALIASES.items()}).items()
    },
}
