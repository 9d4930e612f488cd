"""Turns and commands: a line is a question, or a command if it begins with a slash.

A tool is called only after the user has said yes to its name and arguments; Ctrl-C stops an answer, and what was said
until then stays in the conversation.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ..dialogue import Answer
from .conversation import Conversation
from .screen import Screen
from .tools import Tool

ROUNDS = 8  # answers in a row that call tools
DECLINED = "error: the user declined this call"
HELP = "/reset forgets the conversation   /save FILE writes it as JSON   /quit ends   Ctrl-C stops an answer"


def read_line(question: str) -> str | None:
    """A line from the user; None at the end. The question is shown on a terminal only."""
    if sys.stdin.isatty():
        try:
            return input(question)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


class Talk:
    """A conversation with the user at `ask`."""

    def __init__(
        self,
        conversation: Conversation,
        tools: Mapping[str, Tool],
        screen: Screen,
        ask: Callable[[str], str | None] = read_line,
    ) -> None:
        self.conversation, self.tools, self.screen, self.ask = conversation, tools, screen, ask

    def run(self) -> None:
        """Until the user leaves."""
        while True:
            try:
                line = self.ask("> ")
            except KeyboardInterrupt:
                self.screen.remark("\n/quit or the end of input leaves")
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
            self.screen.remark(HELP if name == "/help" else f"{line.strip()}: no such command. {HELP}")

    def save(self, path: Path) -> None:
        """Writes the conversation to a new file."""
        saved = {"model": self.conversation.voice.name, "messages": self.conversation.messages}
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(saved, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except OSError as error:
            self.screen.remark(f"not saved: {error}")
            return
        self.screen.remark(f"saved: {path}")

    def turn(self, text: str) -> None:
        """A question, the answer, and calls of tools as long as the model has more of them; all of it or nothing."""
        messages = self.conversation.messages
        before = len(messages)
        self.conversation.ask(text)
        try:
            for _ in range(ROUNDS):
                answer = self.answer()
                if answer is None or not self.results(answer.tool_calls):
                    return
            self.screen.remark(f"stopped after {ROUNDS} answers with tool calls")
        except ValueError as error:
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
            function = call["function"]
            shown = f"{function['name']}({function['arguments']})"
            try:
                said = self.ask_to_run(shown) if going else None
            except KeyboardInterrupt:
                said = None
            going = going and said is not None
            allowed = said is not None and said.strip().lower() in ("y", "yes")
            result = self.tools[function["name"]].run(function["arguments"]) if allowed else DECLINED
            self.screen.remark(f"  {result}")
            self.conversation.give_result(call, result)
        return bool(calls) and going

    def ask_to_run(self, shown: str) -> str | None:
        self.screen.remark(f"the model wants to call {shown}")
        return self.ask("run it? y/N ")
