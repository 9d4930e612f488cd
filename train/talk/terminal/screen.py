"""What a conversation looks like: answers on stdout, remarks on stderr; reasoning dimmed on a terminal, else marked.

On a terminal, characters that would move its cursor or change its colours are written out: what a model writes must
not be able to pass for what the program says.
"""

import os
from typing import TextIO

from ..dialogue import Delta

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
MARKS = {"reasoning": "[thinking]\n", "content": "[answer]\n"}


class Screen:
    """Writes to a pair of streams."""

    def __init__(self, out: TextIO, remarks: TextIO) -> None:
        self.out, self.remarks = out, remarks
        self.terminal = out.isatty()
        self.colours = self.terminal and not os.environ.get("NO_COLOR")
        self._kind = ""

    def show(self, delta: Delta) -> None:
        """A piece of an answer."""
        if delta.kind != self._kind:
            self._change(delta.kind)
        self.out.write(visible(delta.text) if self.terminal else delta.text)
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


def visible(text: str) -> str:
    """The text with every character that does not print, but for line ends and tabs, written as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
