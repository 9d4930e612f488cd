"""The command line: `abyssal train | generate | eval | plot | info | ...`; also `python -m abyssal`.

Each file beside this one is a family of commands with a table COMMANDS; a name may have two words. What a command needs
is imported when it runs, so that help is instant and a missing optional library hinders nobody else.
"""

import argparse
import difflib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from ... import __version__
from .. import own
from ..talk.terminal.visible import visible
from . import ablate, bench, chat, constrained, evaluate, generate, inspect, profile, reasoning, recipes, serve, train
from .options import Command

FAMILIES = (train, recipes, generate, chat, serve, evaluate, constrained, reasoning, inspect, profile, bench, ablate)
COMMANDS: dict[str, Command] = {name: command for family in FAMILIES for name, command in family.COMMANDS.items()}

# what a user can cause: bad names, values and files, a missing optional library, a diverging run
EXPECTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError, SafetensorError, MemoryError)
FULL = ("allocate memory", "out of memory")  # in torch's words: it has no class for that, but on a GPU

# what to do about an error of the system; about others its words say enough
ADVICE = {
    errno.ENOSPC: "make room there, or choose another place",
    errno.EDQUOT: "make room there, or choose another place",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "close some",
    errno.ENOTDIR: "a part of the path is a file: choose another",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; errors of the user's making end in one line on stderr and exit code 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started us has closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (as long as the process)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks is no reason to stop
    try:
        try:
            return _run(_parsed(words))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        _give_up(sys.stdout)  # who read the output has seen enough
        return 128 + signal.SIGPIPE
    finally:
        _give_up(sys.stderr)


def _parsed(words: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = " or ".join(map(repr, difflib.get_close_matches(words[0], COMMANDS, n=2, cutoff=0.7)))
        hint = f"did you mean {near}?" if near else "abyssal --help lists what there is"
        parser.error(f"unknown command {words[0]!r}: {hint}")
    return parser.parse_args(words)


def _run(options: argparse.Namespace) -> int:
    try:
        if getattr(options, "trust_code", False):
            own.allow()
        options.run(options)
        sys.stdout.flush()
    except (*EXPECTED, RuntimeError) as error:
        expected = isinstance(error, EXPECTED) or _is_full(error)
        if not expected or options.traceback or (isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout)):
            raise
        _give_up(sys.stdout)
        print(f"abyssal {options.command}: {visible(_said(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        said = [str(error) or "interrupted", *_notes(error)]
        print(f"\nabyssal {options.command}: {'; '.join(said)}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


def _is_full(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in FULL)


def _said(error: Exception) -> str:
    """An error in one line: of the system's, where and what it is, and what to do; then its notes."""
    if isinstance(error, SafetensorError):
        from ...model.disk import os_error

        error = os_error(error)
    parts = [" ".join(f"not enough memory: {error}".split())] if _is_full(error) else [str(error)]
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)!r}: " if isinstance(error.filename, str | bytes) else ""
        parts = [f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}"]
        parts += [ADVICE[error.errno]] if error.errno in ADVICE else []
    return "; ".join([*parts, *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _nobody_reads(stream: Any) -> bool:
    """Whether whoever read the pipe has ended: asked of the pipe, as what was written unbuffered leaves no trace."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except OSError:  # a stream without a descriptor
        return False
    return bool(poll.poll(0))


def _give_up(stream: Any) -> None:
    """What cannot be written is thrown away, or Python would try, and complain, once more at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="abyssal", description="Train, inspect and sample DeepSeek-V4 models.")
    parser.add_argument("--version", action="version", version=f"abyssal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in COMMANDS.items():
        command = commands.add_parser(
            name, help=entry.help, description=f"{entry.help}.", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=entry.run)
        entry.arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where an error comes from (default: off)")
    return parser


class _Parser(argparse.ArgumentParser):
    """Ends a command's help with what else there is to say, and an example."""

    def format_help(self) -> str:
        command = COMMANDS.get(self.prog.partition(" ")[2])
        if command is not None:
            details = f"{command.details()}\n\n" if command.details else ""
            self.epilog = f"{details}example:\n  {command.example}"
        return super().format_help()
