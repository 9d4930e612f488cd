"""Text that others wrote, on a terminal: models, tools and names of files have no say over its cursor and colours.

A pipe or a file gets every character as it is.
"""

import unicodedata
from typing import TextIO

KEPT = "\n\t\u200c\u200d"  # the joiners of scripts and emoji move nothing
SHORT = 200  # characters


def visible(text: str) -> str:
    """The text with control characters, bidi overrides and all else that does not print written as escapes.

    Line ends, tabs, joiners and spaces of any width stay; a carriage return does not, because it can hide a line.
    """
    return "".join(c if c.isprintable() or c in KEPT or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(c: str) -> str:
    return f"\\x{ord(c):02x}"


def shown(text: str, stream: TextIO) -> str:
    """The text as it is to be written to the stream: visible on a terminal, else as it is."""
    return visible(text) if stream.isatty() else text


def brief(text: str) -> str:
    """One short visible line: the beginning of a longer text, and how long it is."""
    start = visible(text[:SHORT]).replace("\n", "\\n")
    return start if len(text) <= SHORT else f"{start} ... ({len(text):,} characters)"
