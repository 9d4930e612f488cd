"""Turns and commands: a line is a question, or a command if it begins with a slash.

A tool is called only after the user has said yes to its name and arguments; Ctrl-C stops an answer or a tool, and what
was said until then stays in the conversation. So does a turn whose tool has run, whatever became of it.
"""

import json
import os
import sys
import termios
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ..dialogue import Answer
from .conversation import Conversation
from .screen import Remarks, Screen
from .tools import SECONDS, Tool
from .visible import brief

LONGEST = 4095  # bytes of a line that is typed: Linux's terminals leave out the rest
ROUNDS = 8  # answers in a row that call tools
DECLINED = "error: the user declined this call"
INTERRUPTED = "error: the user interrupted this call"
HELP = "/reset forgets the conversation   /save FILE writes it as JSON   /quit ends   Ctrl-C stops an answer or a tool"


def read_line(question: str) -> str | None:
    """A line from the user; None at the end. The question is shown to who sits at a terminal, where stdout is none too.

    Raises:
        ValueError: a line that the terminal has cut.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    if not sys.stdout.isatty():
        print(question, end="", file=sys.stderr, flush=True)
        question = ""
    try:
        line = input(question)
    except EOFError:
        return None
    if len(os.fsencode(line)) >= LONGEST:
        raise ValueError(f"not sent: a terminal lets {LONGEST} bytes of a line through; give a longer one by a pipe")
    return line


def forget_typed() -> None:
    """What was typed or pasted before a question is no answer to it."""
    if sys.stdin.isatty():
        termios.tcflush(sys.stdin, termios.TCIFLUSH)


class Talk:
    """A conversation with the user at `ask`; `seconds`: the most that a tool may take."""

    def __init__(
        self,
        conversation: Conversation,
        tools: Mapping[str, Tool],
        screen: Screen,
        ask: Callable[[str], str | None] = read_line,
        seconds: float = SECONDS,
    ) -> None:
        self.conversation, self.tools, self.screen, self.ask = conversation, tools, screen, ask
        self.seconds = seconds

    def run(self) -> None:
        """Until the user leaves."""
        while True:
            try:
                line = self.ask("> ")
            except KeyboardInterrupt:
                self.screen.remark("\n/quit or the end of input leaves")
                continue
            except ValueError as error:
                self.screen.remark(str(error))
                continue
            if line is None or line.strip() == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line.strip():
                self.turn(line)

    def command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name == "/reset" and not argument:
            self.conversation.reset()
            self.screen.remark("a new conversation")
        elif name == "/save" and argument:
            self.save(Path(argument.strip()))
        else:
            self.screen.remark(HELP if name == "/help" else f"{brief(line.strip())}: no such command. {HELP}")

    def save(self, path: Path) -> None:
        """Writes the conversation to a new file."""
        saved = {"model": self.conversation.voice.name, "messages": self.conversation.messages}
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(saved, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            self.screen.remark(f"not saved: {error}")
            return
        self.screen.remark(f"saved: {path}")

    def turn(self, text: str) -> None:
        """A question, the answer, and calls of tools as long as the model has more of them.

        What cannot be sent is taken back, unless a tool has run.
        """
        messages = self.conversation.messages
        before = len(messages)
        self.conversation.ask(text)
        try:
            for _ in range(ROUNDS):
                answer = self.answer()
                if answer is None or not self.results(answer.tool_calls):
                    return
            self.screen.remark(f"stopped after {ROUNDS} answers with tool calls")
        except KeyboardInterrupt:
            self.screen.remark("stopped")
        except ValueError as error:
            if any(message["role"] == "tool" for message in messages[before:]):
                self.screen.remark(f"stopped: {error}; /save FILE keeps the conversation, /reset forgets it")
                return
            del messages[before:]
            self.screen.remark(f"not sent: {error}")

    def answer(self) -> Answer | None:
        """Shows the model's answer; None if it was stopped."""
        answers: list[Answer] = []
        try:
            with closing(self.conversation.answer(answers)) as pieces:
                for piece in pieces:
                    for delta in piece:
                        self.screen.show(delta)
        except KeyboardInterrupt:
            self.screen.end()
            self.screen.remark("stopped")
            return None
        self.screen.end()
        if answers[0].error:
            self.screen.remark(f"not in the chat format: {answers[0].error}")
        if answers[0].finish_reason == "length":
            self.screen.remark(f"cut off after {answers[0].tokens} tokens")
        return answers[0]

    def results(self, calls: list[dict[str, Any]]) -> bool:
        """Runs the calls that the user allows; whether the model is to go on."""
        going = True
        for call in calls:
            result = DECLINED
            try:
                said = self.ask_to_run(call["function"]) if going else None
                going = said is not None
                if said is not None and said.strip().lower() in ("y", "yes"):
                    result = INTERRUPTED
                    result = self.run_tool(call["function"])
            except KeyboardInterrupt:
                going = False
            self.screen.remark(f"  {brief(result)}")
            self.conversation.give_result(call, result)
        return bool(calls) and going

    def ask_to_run(self, function: Mapping[str, str]) -> str | None:
        arguments = function["arguments"].replace("\n", " ")  # all of them, and no line that could be ours
        self.screen.remark(f"the model wants to call {function['name']}({arguments})")
        forget_typed()
        with suppress(ValueError):
            return self.ask("run it? y/N ")
        return ""

    def run_tool(self, function: Mapping[str, str]) -> str:
        with redirect_stdout(Remarks(self.screen)), redirect_stderr(Remarks(self.screen)):
            return self.tools[function["name"]].run(function["arguments"], self.seconds)
