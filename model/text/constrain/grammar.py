"""What may be written, in llguidance's notation: a Lark grammar with JSON schemas in it and special tokens by name.

    answer: %json {...}          thinking: TEXT </think> answer

`TEXT` stands for any text that spells no special token: read back, such text would be the token.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .schema import REPETITIONS, Document, GrammarError, check_json, least, repetitions, shown

PLAIN = {"json_allowed_escapes": 'nrbtf\\"'}  # no \u: each text has one spelling, so no name is written as another
SPACED = {**PLAIN, "item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
FLEXIBLE = {**PLAIN, "whitespace_flexible": True}
HINTS = 32  # expressions to find short texts for
RULES = 2_000_000  # characters that a grammar may have: each parameter's schema has what it refers to with it


@dataclass(frozen=True)
class Grammar:
    """A language of answers, for any tokenizer.

    Args:
        rules: Lark rules; `answer` is the first, TEXT is defined elsewhere.
        source: what they were made from, for messages.
        hints: expressions that occur in it: texts that match them help to find ways to the end (see `ending`).
        thinks: whether reasoning up to `</think>` comes first.
        parts: grammars whose texts, short ones, one after the other are most likely a text of this one, where a search
            for a first way to the end would take long.

    Raises:
        GrammarError: rules of more than RULES characters.
    """

    rules: str
    source: str
    hints: tuple[str, ...] = ()
    thinks: bool = False
    parts: "tuple[Grammar, ...]" = ()

    def __post_init__(self) -> None:
        if len(self.rules) > RULES:
            raise GrammarError(
                f"{self.source}: its grammar has {len(self.rules)} characters: at most {RULES} are allowed"
            )

    def after_thinking(self) -> "Grammar":
        """The same after any text and `</think>`: for prompts that end in `<think>`."""
        thought = Grammar("answer: </think>", "reasoning")
        return replace(self, thinks=True, parts=(thought, *self.parts) if self.parts else ())

    def lark(self, special: Iterable[str]) -> str:
        """The whole grammar, for a tokenizer with those special strings."""
        spelled = "|".join(map(_escaped, special))
        start = "start: TEXT </think> answer" if self.thinks else "start: answer"
        text = f"TEXT: /(?s:.*)/ & ~/(?s:.*)({spelled})(?s:.*)/" if spelled else "TEXT: /(?s:.*)/"
        return f"{start}\n{self.rules}\n{text}\n"


def json_schema(schema: Mapping[str, Any] | bool, any_whitespace: bool = False) -> Grammar:
    """JSON values that a schema allows (draft 2020-12).

    Properties come in the schema's order. What llguidance does not know (`not`, `if`, `uniqueItems`, unknown formats)
    is an error, never left out. Control characters that JSON writes as numbers are not written.

    Args:
        schema: as Python values.
        any_whitespace: allow any between tokens; otherwise one blank or none after a comma and a colon.

    Raises:
        GrammarError: no schema, or one that is too large (see `schema`).
    """
    document = Document(schema, "the JSON schema")
    alone, source = document.alone(document.at[()]), f"the JSON schema {shown(schema)}"
    part = Grammar(f"answer: {json_rule(least(alone), any_whitespace)}", source)
    return Grammar(f"answer: {json_rule(alone, any_whitespace)}", source, hints(document), parts=(part,))


def json_object(any_whitespace: bool = False) -> Grammar:
    """Any JSON object."""
    return Grammar(f"answer: {json_rule({'type': 'object'}, any_whitespace)}", "any JSON object")


def regex(pattern: str) -> Grammar:
    """Texts that a regular expression matches as a whole (Rust's syntax: no look-around, no back-references).

    Raises:
        GrammarError: an empty pattern or none.
    """
    if not isinstance(pattern, str) or not pattern:
        raise GrammarError(f"pattern={shown(pattern)}: a regular expression is needed")
    check_json(pattern, "the regular expression")
    if repetitions(pattern) > REPETITIONS:
        raise GrammarError(f"pattern={shown(pattern)}: more than {REPETITIONS} repetitions")
    words = tuple(re.findall("[A-Za-z0-9_ -]{2,}", pattern))
    return Grammar(f"answer: {expression(pattern)}", f"the regular expression {pattern[:100]}", words[:HINTS])


def json_rule(schema: Any, any_whitespace: bool = False) -> str:
    """A checked schema as part of a rule.

    Raises:
        GrammarError: it allows nothing.
    """
    if schema is False:
        raise GrammarError("the schema false allows nothing")
    options = {"x-guidance": FLEXIBLE if any_whitespace else SPACED}
    return "%json " + json.dumps({**({} if schema is True else schema), **options})


def hints(document: Document) -> tuple[str, ...]:
    """What the patterns in a schema look for, each once, without anchors."""
    found = (part for pattern in document.patterns() for part in alternatives(pattern))
    return tuple(dict.fromkeys(part.removeprefix("^").removesuffix("$") for part in found))[:HINTS]


def alternatives(pattern: str) -> list[str]:
    """The alternatives of a pattern, outside of groups."""
    parts, depth = [""], 0
    for sign, written in zip(signs(pattern), pattern):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if sign == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += written
    return parts


def signs(pattern: str) -> Iterator[str]:
    """The characters of a pattern, nothing in place of those that are escaped or in a class."""
    escaped = in_class = False
    for character in pattern:
        plain = not escaped and not in_class
        yield character if plain and character not in "[\\" else ""
        if escaped or character == "\\":
            escaped = not escaped
        else:
            in_class = character == "[" if plain else character != "]"


def expression(pattern: str) -> str:
    """A regular expression between slashes."""
    written, escaped = "", False
    for character in pattern:
        character = {"/": "/" if escaped else "\\/", "\n": "n" if escaped else "\\n"}.get(character, character)
        written += character
        escaped = character == "\\" and not escaped
    return f"/{written}/"


def literal(text: str) -> str:
    """A text that is to be matched as it is."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """The expression that matches this text alone, which stands between slashes."""
    return "".join(c if c.isalnum() else f"\\u{{{ord(c):x}}}" for c in text)
