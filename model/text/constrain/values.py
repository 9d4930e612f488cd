"""What a parameter's schema allows, in two parts: texts, which are written raw, and all other values, written as JSON.

texts  = an expression of the keywords that hold for texts        others = {"type": the other types, "allOf": [schema]}
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .grammar import alternatives, expression, literal, signs
from .schema import Document, GrammarError, Pointer, kind, shown

KINDS = frozenset(("null", "boolean", "number", "string", "array", "object"))
ANCHORS = ("^", "$")
CHAIN = 10  # references that may lead to references
DATE, TIME = r"[1-9][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])", r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
ZONE, BYTE = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])", r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": DATE,
    "time": TIME + ZONE,
    "date-time": f"{DATE}T{TIME}{ZONE}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{BYTE}(\.{BYTE}){{3}}",
    "email": r"[a-z0-9]+([._-][a-z0-9]+)*@[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*\.[a-z]{2,}",
}


class Rules:
    """Numbered rules as they are made, those that are alike once."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def add(self, prefix: str, body: str) -> str:
        return self._names.setdefault((prefix, body), f"{prefix}{len(self._names)}")

    @property
    def lines(self) -> list[str]:
        return [f"{name}: {body}" for (_, body), name in self._names.items()]


class Values:
    """Splits the schemas of a document; the texts of what is referred to are a terminal, made once."""

    def __init__(self, document: Document, rules: Rules) -> None:
        self.document, self._rules = document, rules
        self._kinds: dict[Pointer, frozenset[str]] = {}
        self._texts: dict[Pointer, str] = {}
        self._within: list[Pointer] = []

    def text_of(self, schema: Any) -> str | None:
        """The expression of the texts that a schema allows; None if there are none."""
        return f"TEXT & {self._text(schema)}" if "string" in self._kinds_of(schema) else None

    def other_than_text(self, schema: Any) -> Any:
        """A schema, standing alone, of the other values; None if there are none."""
        kinds = self._kinds_of(schema)
        if not kinds - {"string"}:
            return None
        if "string" in kinds:
            schema = {"type": sorted(kinds - {"string"}), "allOf": [schema]}
        return self.document.alone(schema)

    def _kinds_of(self, schema: Any) -> frozenset[str]:
        """The types that a schema may allow values of; of an enum's values those that the other keywords may allow."""
        if isinstance(schema, bool):
            return KINDS if schema else frozenset()
        found = KINDS
        for key, value in schema.items():
            if key == "type":
                names = [value] if isinstance(value, str) else value
                found &= {"number" if name == "integer" else name for name in names}
            elif key in ("enum", "const"):
                found &= {kind(each) for each in (value if key == "enum" else [value])}
            elif key in ("anyOf", "oneOf"):
                found &= frozenset().union(*map(self._kinds_of, value))
            elif key == "allOf":
                found &= KINDS.intersection(*map(self._kinds_of, value))
            elif key == "$ref":
                found &= self._referred(value, self._kinds, self._kinds_of)
        return found

    def _text(self, schema: Any) -> str:
        """The expression of the texts, where there are some."""
        if isinstance(schema, bool):
            return "TEXT"
        self.document.check_known(schema)
        parts = []
        for key, value in schema.items():
            if key in ("enum", "const"):
                texts = [each for each in (value if key == "enum" else [value]) if isinstance(each, str)]
                parts.append(_any(map(literal, texts)))
            elif key == "pattern":
                parts.append(expression(_search(value, self.document.where)))
            elif key == "format":
                if value not in FORMATS:
                    raise GrammarError(f"{self.document.where}: format {value!r}: allowed are {', '.join(FORMATS)}")
                parts.append(expression(FORMATS[value]))
            elif key == "minLength":
                parts.append(f"/(?s:.){{{value},}}/")
            elif key == "maxLength":
                parts.append(f"/(?s:.){{0,{value}}}/")
            elif key == "$ref":
                parts.append(self._referred(value, self._texts, self._terminal))
            elif key == "allOf":
                parts += map(self._text, value)
            elif key in ("anyOf", "oneOf"):
                names = [self._terminal(part) for part in value if "string" in self._kinds_of(part)]
                parts.append(_any(names if key == "anyOf" else _alone(names)))
        return " & ".join(parts) or "TEXT"

    def _referred(self, reference: str, known: dict[Pointer, Any], look: Callable[[Any], Any]) -> Any:
        """What is found where a reference leads, looked for once."""
        pointer = self.document.target(reference)
        if pointer not in known:
            if pointer in self._within or len(self._within) == CHAIN:
                raise self.document.error(pointer, f"refers to itself, or through more than {CHAIN} references")
            self._within.append(pointer)
            known[pointer] = look(self.document.at[pointer])
            self._within.pop()
        return known[pointer]

    def _terminal(self, schema: Any) -> str:
        return self._rules.add("TEXT_", self._text(schema))


def _any(texts: Iterable[str]) -> str:
    return f"({' | '.join(texts)})"


def _alone(names: list[str]) -> Iterator[str]:
    """Each of the terminals without the others: what matches one of them alone."""
    for i, name in enumerate(names):
        yield " & ".join([name, *(f"~{other}" for other in names[:i] + names[i + 1 :])])


def _search(pattern: str, where: str) -> str:
    """The expression of whole texts in which a pattern is found somewhere, or where its `^` and `$` say."""
    if re.search(r"(?<!\\)\(\?[a-zA-Z-]+\)", pattern):
        raise GrammarError(f"{where}: pattern {shown(pattern)}: flags are allowed for a group, as in (?i:a)")
    found = []
    for part in alternatives(pattern):
        start = "" if part.startswith("^") else "(?s:.*)"
        anchored = re.search(r"(?<!\\)(\\\\)*\$$", part) is not None
        body = part.removeprefix("^")[: -1 if anchored else None]
        if any(sign in ANCHORS for sign in signs(body)):
            raise GrammarError(f"{where}: pattern {shown(pattern)}: ^ and $ are allowed at the ends of an alternative")
        found.append(f"{start}({body})" + ("" if anchored else "(?s:.*)"))
    return "|".join(found)
