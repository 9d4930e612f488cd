"""What a conversation looks like: answers on stdout, remarks on stderr; reasoning dimmed on a terminal, else marked."""

import io
import os
from typing import TextIO

from ..dialogue import Delta
from .visible import shown, visible

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
MARKS = {"reasoning": "[thinking]\n", "content": "[answer]\n"}


class Screen:
    """Writes to a pair of streams."""

    def __init__(self, out: TextIO, remarks: TextIO) -> None:
        self.out, self.remarks = out, remarks
        self.colours = out.isatty() and not os.environ.get("NO_COLOR")
        self._kind = ""

    def show(self, delta: Delta) -> None:
        """A piece of an answer."""
        if delta.kind != self._kind:
            self._change(delta.kind)
        self.out.write(shown(delta.text, self.out))
        self.out.flush()

    def end(self) -> None:
        """The answer is over."""
        if self._kind:
            self.out.write((PLAIN if self.colours and self._kind == "reasoning" else "") + "\n")
            self.out.flush()
        self._kind = ""

    def remark(self, text: str) -> None:
        """Something that the program has to say."""
        print(visible(text), file=self.remarks, flush=True)

    def _change(self, kind: str) -> None:
        dimmed, marked = self._kind == "reasoning", self._kind == "reasoning" or kind == "reasoning"
        if self._kind:
            self.out.write((PLAIN if self.colours and dimmed else "") + "\n")
        if self.colours:
            self.out.write(DIM if kind == "reasoning" else "")
        elif marked:
            self.out.write(MARKS[kind])
        self._kind = kind


class Remarks(io.TextIOBase):
    """A stream for what a tool prints: visible, among the remarks."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.remarks.write(visible(text))
        return len(text)

    def flush(self) -> None:
        self.screen.remarks.flush()
