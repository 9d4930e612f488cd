"""`abyssal chat`: a conversation with a model in the terminal."""

import argparse
import io
import sys
from pathlib import Path

from ..talk.terminal.tools import SECONDS
from .options import Command, flag
from .voices import voice, voice_arguments


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    voice_arguments(parser)
    flag(parser, "--system", str, "", "the system's message", "none")
    text = "reason before answering; shown dimmed (default: off)"
    parser.add_argument("--thinking", action="store_true", help=text)
    parser.add_argument("--max-effort", action="store_true", help="with --thinking: ask for all of it (default: off)")
    flag(parser, "--tools", Path, None, "Python file; its functions are tools, each call needs your yes", "none")
    flag(parser, "--tool-timeout", float, SECONDS, "seconds that a tool may take")
    flag(parser, "--max-new-tokens", int, 512, "tokens of an answer")
    flag(parser, "--temperature", float, 1.0, "divides the logits; 0 = always the likeliest")
    flag(parser, "--top-p", float, 1.0, "keep the likeliest tokens up to this probability; 1 = all")
    flag(parser, "--seed", int, None, "of the sampling", "none")


def _chat(options: argparse.Namespace) -> None:
    from ...model.generation.sampling import Sampling
    from ..talk.dialogue import Manner
    from ..talk.terminal.conversation import Conversation
    from ..talk.terminal.screen import Screen
    from ..talk.terminal.talk import HELP, Talk
    from ..talk.terminal.tools import load_tools

    if options.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens={options.max_new_tokens}: allowed are positive numbers")
    if not 0 < options.tool_timeout < 1e6:
        raise ValueError(f"tool-timeout={options.tool_timeout}: allowed are numbers above 0 and below 1,000,000")
    if options.max_effort and not options.thinking:
        raise ValueError("--max-effort without --thinking: there is no effort to ask for")
    Sampling(options.temperature, top_p=options.top_p)  # refuses what it does not allow, before a model is read
    tools = load_tools(options.tools) if options.tools else {}
    manner = Manner(options.max_new_tokens, options.temperature, top_p=options.top_p, seed=options.seed)
    conversation = Conversation(
        voice(options),
        manner,
        options.system,
        options.thinking,
        "max" if options.max_effort else None,
        [tool.schema for tool in tools.values()],
    )
    screen = Screen(sys.stdout, sys.stderr)
    if sys.stdin.isatty():
        screen.remark(f"{conversation.voice.name}: {HELP}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no Unicode is not sent, and ends nothing
    Talk(conversation, tools, screen, seconds=options.tool_timeout).run()


COMMANDS = {
    "chat": Command(
        _chat,
        _chat_arguments,
        "Talk to a model in the terminal",
        "abyssal chat runs/reason-20260101-120000 --thinking --tools tools.py",
    )
}
