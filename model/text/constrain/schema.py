"""JSON schemas as they come in: which keywords there are, what their values are, and where references lead.

    keyword -> the shape of its value        SHAPES: the one table by which every walk goes

Only what stands where a shape has schemas is a schema; names of properties and what `enum`, `const`, `default` and
`examples` hold are data, whatever words they use. Draft 2020-12: keywords that are not in the table are annotations.
Those that grammars cannot keep to are refused where they would hold, and so is what would take too long (BOUNDS).
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from fractions import Fraction
from typing import Any
from urllib.parse import quote, unquote

from .drafts import update

Pointer = tuple[str, ...]  # from the document to one of its schemas, as in #/properties/a
Pointers = tuple[Pointer, ...]

# What is too much, and what it would cost. The library reads JSON 128 levels deep, and calls itself once for each name
# that an object requires; for every name that may come next its parser holds four items (ITEMS in `walk`).
BYTES = 200_000  # of a schema, or of all tools' parameters
DEPTH = 100  # objects and lists within each other
ENTRIES = 1_000  # of an object or list of schemas, and names in `required`: seconds and a stack beyond
VALUES = 10_000  # of an enum, or of an object or list that is data
NAME_PATTERNS = 50  # in patternProperties: each pair is shown to be disjoint
CONJUNCTION = 8  # schemas in an allOf: patterns that all have to be found multiply
BRANCHES = 2_000_000  # characters of all branches of `oneOf` that are written out, where a branch may hold more of them
UNIONS = 4  # so many within each other: each is a call within a call
DEFINITIONS = 500  # that references lead to: one that leads to the next is a call within a call
MULTIPLE = 65_535  # the least common multiple of all `multipleOf`: the library makes a state for each remainder
REPETITIONS = 10_000  # repetitions that a pattern may ask for

SCHEMA, SCHEMAS, NAMED = "a schema: an object, true or false", "a list of schemas, at least one", "an object of schemas"
TYPE, NAMES, LIST, ANY = (
    "a type or several of null, boolean, number, integer, string, array, object",
    "a list of names",
    "a list of values, at least one",
    "any value",
)
COUNT, POSITIVE, TEXT = "a whole number from 0 on", "a number above 0", "a text"
NUMBER, EXPRESSION = "a number", "a regular expression"
SHAPES = {
    **dict.fromkeys(("items", "additionalProperties"), SCHEMA),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), SCHEMAS),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), NAMED),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBER),
    **{"type": TYPE, "enum": LIST, "const": ANY, "required": NAMES, "multipleOf": POSITIVE},
    **{"pattern": EXPRESSION, "format": TEXT, "$ref": TEXT},
}
REFUSED = {"not", "if", "then", "else", "dependentSchemas", "dependentRequired", "propertyNames", "contains"}
REFUSED |= {"minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "$dynamicRef"}
REFUSED |= {"dependencies", "$recursiveRef", "divisibleBy", "disallow", "extends"}  # of older drafts; see `drafts`
DEFINED = ("$defs", "definitions")
KNOWN = (SHAPES.keys() | REFUSED) - set(DEFINED)
TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")


class GrammarError(ValueError):
    """A grammar that cannot be followed: no schema or expression that is known, too large, or nothing is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(part for part in re.split(r"\s+|[^\S ]", message) if part))


class Document:
    """A schema with all the schemas in it, each as draft 2020-12 has it, and checked; the first, at (), is the whole.

    Args:
        root: as Python values.
        where: what it is, for messages.

    Raises:
        GrammarError: no JSON, a keyword's value of another shape, or too large.
    """

    def __init__(self, root: Any, where: str) -> None:
        check_json(root, where)
        self.where, self._branches = where, 0
        self.at: dict[Pointer, Any] = {}
        self._anchors: dict[str, Pointer] = {}
        self._targets: dict[str, Pointer] = {}
        references = self._read((), _copied(root))
        for reference in references:  # grows
            pointer = self._pointer(reference)
            if pointer is not None and pointer not in self.at:
                references += self._read_elsewhere(pointer)
        self._check_multiples()

    def error(self, pointer: Pointer, message: str) -> GrammarError:
        return GrammarError(f"{self.where} at {written(pointer)}: {message}")

    def target(self, reference: str) -> Pointer:
        """Where a `$ref` leads: to a schema that is more than a reference itself.

        Raises:
            GrammarError: not to a schema of this document.
        """
        passed: list[str] = []
        found = self._targets.get(reference)
        while found is None:
            pointer = self._pointer(reference)
            if pointer is None or pointer not in self.at:
                raise GrammarError(
                    f"{self.where}: $ref {shown(reference)} leads nowhere: allowed are #, #/... to one of its schemas, "
                    "an $anchor of it, and these after its $id"
                )
            passed.append(reference)
            if len(passed) > DEFINITIONS:
                raise GrammarError(
                    f"{self.where}: $ref {shown(reference)} refers to itself, or through more than {DEFINITIONS} "
                    "references"
                )
            if _is_reference(self.at[pointer]):
                reference = self.at[pointer]["$ref"]
                found = self._targets.get(reference)
            else:
                found = pointer
        self._targets.update(dict.fromkeys(passed, found))
        return found

    def alone(self, schema: Any) -> Any:
        """A schema, of this document or made of its parts, that stands by itself: what it refers to is in its $defs.

        Raises:
            GrammarError: a keyword that grammars cannot keep to, or a reference that leads nowhere.
        """
        numbers: dict[Pointer, int] = {}
        alone = self._renamed(schema, numbers)
        definitions: list[Any] = []
        while len(definitions) < len(numbers):
            if len(numbers) > DEFINITIONS:
                raise GrammarError(f"{self.where}: more than {DEFINITIONS} schemas are referred to")
            pending = list(numbers)[len(definitions) :]
            definitions += [self._renamed(self.at[pointer], numbers) for pointer in pending]
        if not definitions:
            return alone
        return {**alone, "$defs": {str(number): definition for number, definition in enumerate(definitions)}}

    def patterns(self) -> Iterator[str]:
        """All expressions that texts or names are searched for."""
        for schema in self.at.values():
            if isinstance(schema, Mapping):
                yield from ([schema["pattern"]] if "pattern" in schema else [])
                yield from schema.get("patternProperties", {})

    def check_known(self, schema: Mapping[str, Any]) -> None:
        """Raises GrammarError if a schema has keywords that grammars cannot keep to."""
        refused = sorted(schema.keys() & REFUSED)
        if refused:
            raise GrammarError(f"{self.where}: {', '.join(refused)}: allowed are {', '.join(SHAPES)}")

    def _read(self, pointer: Pointer, schema: Any) -> list[str]:
        """Takes in a schema with those in it; returns all references in them."""
        references = []
        left: list[tuple[Pointer, Any]] = [(pointer, schema)]
        for pointer, schema in left:  # grows
            if isinstance(schema, dict):
                update(schema)
            self._check(pointer, schema)
            self.at[pointer] = schema
            left += [((*pointer, *steps), part) for steps, part in parts(schema)]
            if isinstance(schema, dict):
                references += [schema["$ref"]] if "$ref" in schema else []
                if isinstance(schema.get("$anchor"), str):
                    self._anchors.setdefault(schema["$anchor"], pointer)
        return references

    def _read_elsewhere(self, pointer: Pointer) -> list[str]:
        """Takes in the schema that a reference finds below a keyword that is not known, if there is something."""
        if len(pointer) > DEPTH:
            return []
        known = max(n for n in range(len(pointer)) if pointer[:n] in self.at)
        here = self.at[pointer[:known]]
        if pointer[known] in SHAPES:
            return []
        for step in pointer[known:]:
            here = _below(here, step)
        if here is None:
            return []
        return self._read(pointer, here)

    def _pointer(self, reference: str) -> Pointer | None:
        """The pointer that a `$ref` gives, or that its anchor stands for; None for another document's."""
        document, _, fragment = reference.partition("#")
        whole = self.at[()]
        own = whole.get("$id", "") if isinstance(whole, dict) else ""
        if document and document != str(own).removesuffix("#"):
            return None
        start, *steps = unquote(fragment).split("/")
        if start:
            return None if steps else self._anchors.get(start)
        return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)

    def _renamed(self, schema: Any, numbers: dict[Pointer, int], within: Pointers = ()) -> Any:
        if isinstance(schema, bool):
            return schema
        self.check_known(schema)
        made: dict[str, Any] = {}
        for key, value in schema.items():
            shape = SHAPES.get(key) if key not in DEFINED else None
            if key == "$ref":
                made[key] = f"#/$defs/{numbers.setdefault(self.target(value), len(numbers))}"
            elif shape == SCHEMA:
                made[key] = self._renamed(value, numbers, within)
            elif key == "oneOf":
                made[key] = [self._branch(part, numbers, within) for part in value]
            elif shape == SCHEMAS:
                made[key] = [self._renamed(part, numbers, within) for part in value]
            elif shape == NAMED:
                made[key] = {name: self._renamed(part, numbers, within) for name, part in value.items()}
            elif shape == NUMBER:
                made[key] = _inward(value, _direction(key), key.startswith("exclusive"))
            elif shape is not None:
                made[key] = value
        return made

    def _branch(self, schema: Any, numbers: dict[Pointer, int], within: Pointers) -> Any:
        """A branch of `oneOf`, with what it refers to written out: the library shows that no other allows the same."""
        if not _is_reference(schema) or len(within) == UNIONS:
            return self._renamed(schema, numbers, within)
        pointer = self.target(schema["$ref"])
        if pointer in within:
            return self._renamed(schema, numbers, within)
        self._branches += len(str(self.at[pointer]))
        if self._branches > BRANCHES:
            raise GrammarError(f"{self.where}: oneOf: more than {BRANCHES} characters are referred to")
        return self._branch(self.at[pointer], numbers, (*within, pointer))

    def _check(self, pointer: Pointer, schema: Any) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise self.error(pointer, f"{shown(schema)} is no schema: allowed is {SCHEMA.partition(': ')[2]}")
        if "$id" in schema and pointer:
            raise self.error(pointer, "$id: allowed at the top alone")
        for key, value in schema.items():
            shape = SHAPES.get(key)
            if shape is not None and not TESTS[shape](value):
                raise self.error(pointer, f"{key}={shown(value)}: allowed is {shape}")
            if shape == NUMBER and value * _direction(key) > WRITTEN:
                raise self.error(pointer, f"{key}={shown(value)}: no number beyond 2^63 is written")
            size = len(value) if shape in (SCHEMAS, NAMED, NAMES, LIST) else 0
            if key not in DEFINED and size > LENGTHS.get(key, ENTRIES):
                raise self.error(pointer, f"{key} has {size} entries: at most {LENGTHS.get(key, ENTRIES)} are allowed")
        for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", ())]:
            if wrong := pattern_error(pattern):
                raise self.error(pointer, f"pattern {shown(pattern)}: {wrong}")
        for value in [*schema.get("enum", ()), schema.get("const")]:
            if wrong := _constant_error(value):
                raise self.error(pointer, f"const or enum: {shown(value)} holds {wrong}")
        most = len(set(schema.get("required", ()))) + 1
        if schema.get("minProperties", 0) > most:
            reason = "the names that are required and one more, as others may come twice"
            raise self.error(pointer, f"minProperties={schema['minProperties']}: at most {most} is allowed, {reason}")

    def _check_multiples(self) -> None:
        given = [
            schema["multipleOf"]
            for schema in self.at.values()
            if isinstance(schema, Mapping) and "multipleOf" in schema
        ]
        exact = {Fraction(str(value)) for value in given}
        unit = math.lcm(*(value.denominator for value in exact))
        multiple = math.lcm(*(int(value * unit) for value in exact))
        if multiple > MULTIPLE:
            raise GrammarError(
                f"{self.where}: multipleOf {', '.join(map(str, dict.fromkeys(given)))}: "
                f"their least common multiple may be {MULTIPLE} of the smallest unit"
            )


LENGTHS = {"enum": VALUES, "patternProperties": NAME_PATTERNS, "allOf": CONJUNCTION}


def parts(schema: Any) -> Iterator[tuple[Pointer, Any]]:
    """The schemas right below a schema, with the steps that lead there."""
    for key, value in schema.items() if isinstance(schema, Mapping) else ():
        shape = SHAPES.get(key)
        if shape == SCHEMA:
            yield (key,), value
        elif shape == SCHEMAS:
            yield from (((key, str(i)), part) for i, part in enumerate(value))
        elif shape == NAMED:
            yield from (((key, name), part) for name, part in value.items())


def _is_reference(schema: Any) -> bool:
    """Whether a schema says no more than what it refers to."""
    return isinstance(schema, Mapping) and schema.keys() & KNOWN == {"$ref"}


def _below(value: Any, step: str) -> Any:
    """What one step of a pointer leads to; None if there is nothing."""
    if isinstance(value, list):
        return value[int(step)] if re.fullmatch("0|[1-9][0-9]{0,5}", step) and int(step) < len(value) else None
    return value.get(step) if isinstance(value, dict) else None


def _copied(value: Any) -> Any:
    """A JSON value of its own, in which nothing stands at two places."""
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    return [_copied(part) for part in value] if _is_list(value) else value


def least(schema: Any) -> Any:
    """A schema whose objects have what they require, and lists what is least, and no more: most of its texts are short.

    They are among those of the schema itself, but for `oneOf`, and where objects in an `allOf` require different names.
    """
    if isinstance(schema, bool):
        return schema
    made = dict(schema)
    for key, value in schema.items():
        shape = SHAPES.get(key)
        if shape == SCHEMA:
            made[key] = least(value)
        elif shape == SCHEMAS:
            made[key] = [least(part) for part in value]
        elif shape == NAMED:
            made[key] = {name: least(part) for name, part in value.items()}
    if "properties" in made:
        required = made.get("required", ())
        made["properties"] = {name: part for name, part in made["properties"].items() if name in required}
        if made["properties"].keys() >= set(required):
            made["additionalProperties"] = False
    if "items" in made:
        made["maxItems"] = made.get("minItems", 0)
    return made


def check_json(value: Any, where: str) -> None:
    """Raises GrammarError unless a value is JSON, and neither too deep nor too large for a schema."""
    size = 0
    left: list[tuple[Pointer, Any]] = [((), value)]
    while left:
        pointer, here = left.pop()
        inside = list(here.items()) if isinstance(here, Mapping) else list(enumerate(here)) if _is_list(here) else []
        texts = [here] if isinstance(here, str) else [name for name, _ in inside] if isinstance(here, Mapping) else []
        size += 4 + sum(len(str(text)) for text in texts)
        wrong = _no_json(here, texts)
        if len(pointer) > DEPTH or size > BYTES:
            wrong = (
                f"more than {DEPTH} levels of objects and lists" if len(pointer) > DEPTH else f"more than {BYTES} bytes"
            )
        if wrong:
            raise GrammarError(f"{where} at {written(pointer[:9])}{'/...' if len(pointer) > 9 else ''}: {wrong}")
        left += [((*pointer, str(step)), part) for step, part in inside]


def written(pointer: Iterable[str]) -> str:
    """A pointer as a `$ref` has it."""
    return "#" + "".join(f"/{quote(step.replace('~', '~0').replace('/', '~1'), safe='~$')}" for step in pointer)


def shown(value: Any, most: int = 100) -> str:
    """A value's beginning, for messages."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def kind(value: Any) -> str:
    """Which of the types a JSON value is of; "number" for all numbers."""
    kinds = {bool: "boolean", type(None): "null", str: "string", int: "number", float: "number"}
    return kinds.get(type(value)) or ("object" if isinstance(value, Mapping) else "array")


def pattern_error(pattern: str) -> str:
    """Why an expression is refused before the library reads it: what means something else there, or is too large."""
    for found in TOKEN.finditer(pattern):
        if found["class"] and re.search(r"\[|&&|--|~~", re.sub(r"\\.", "", found["class"])):
            return f"the class [{found['class']}] has a sign of sets ([, &&, -- or ~~), which is to be escaped"
    signs = ("*" if found["least"] else found[0] if len(found[0]) == 1 else "x" for found in TOKEN.finditer(pattern))
    if re.search(r"[*+?][*+]|\(\?>", "".join(signs)):
        return "possessive repetitions (a*+) and atomic groups ((?>a)) mean something else: allowed is (?:a*)+"
    if repetitions(pattern) > REPETITIONS:
        return f"more than {REPETITIONS} repetitions"
    return ""


TOKEN = re.compile(r"\\.|\[\^?(?P<class>\]?(?:\\.|[^\]\\])*)\]|\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|.", re.DOTALL)


def repetitions(pattern: str) -> int:
    """How many characters a pattern stands for, with all its alternatives and counted repetitions written out."""
    groups, last = [0], 0
    for found in TOKEN.finditer(pattern):
        if found["least"]:
            more = last * (int((found["most"] or found["least"])[:9]) - 1)
            last, groups[-1] = last + more, groups[-1] + max(more, 0)
            continue
        closed = found[0] == ")" and len(groups) > 1
        last = groups.pop() if closed else 1
        if found[0] == "(":
            groups.append(0)
        else:
            groups[-1] += last
    return sum(groups)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _no_json(value: Any, texts: list[Any]) -> str:
    """What keeps a value, without its parts but with these texts, from being JSON."""
    for text in texts:
        if not isinstance(text, str):
            return f"the name {shown(text)} is no text"
        if re.search("[\ud800-\udfff]", text):
            return f"{shown(text)} holds half a character, a lone surrogate"
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        return "a number that is not finite in float64"
    known = value is None or isinstance(value, bool | int | float | str | Mapping) or _is_list(value)
    return "" if known else f"a value of type {type(value).__name__} is no JSON"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return kind(value) == "number"


def _is_type(value: Any) -> bool:
    return bool(value) and all(name in TYPES for name in (value if _is_list(value) else [value]))


TESTS: dict[str, Callable[[Any], bool]] = {
    SCHEMA: lambda value: True,  # checked where its own keywords are
    SCHEMAS: lambda value: _is_list(value) and len(value) > 0,
    NAMED: lambda value: isinstance(value, Mapping),
    TYPE: _is_type,
    NAMES: lambda value: _is_list(value) and all(isinstance(name, str) for name in value),
    LIST: lambda value: _is_list(value) and len(value) > 0,
    ANY: lambda value: True,
    COUNT: _is_whole,
    NUMBER: _is_number,
    POSITIVE: lambda value: _is_number(value) and value > 0,
    TEXT: lambda value: isinstance(value, str),
    EXPRESSION: lambda value: isinstance(value, str),
}


def _constant_error(value: Any) -> str:
    """What a value holds that cannot be written."""
    for part in _leaves(value):
        if isinstance(part, int) and int(float(part)) != part:
            return "a whole number that no float64 is"
        if isinstance(part, str) and re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", part):
            return "a control character that JSON has no letter for"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    """What a JSON value holds that is neither object nor list."""
    inside = value.values() if isinstance(value, Mapping) else value if _is_list(value) else None
    if inside is None:
        yield value
        return
    for part in inside:
        yield from _leaves(part)


WRITTEN = 2**63 - 1024  # the largest float64 among the whole numbers that the library has
UP, DOWN = (Context(prec=15, rounding=way, Emin=-36) for way in (ROUND_CEILING, ROUND_FLOOR))  # down to 1e-50


def _direction(key: str) -> int:
    """Where numbers lie that a bound allows: 1 above it, -1 below it."""
    return 1 if "inimum" in key else -1


def _inward(bound: float, direction: int, exclusive: bool) -> float:
    """A bound as the library reads it, where it would take one nearby: the next on the allowed side.

    It reads 15 digits as they are, and its expressions nest once for each digit. An exclusive bound it allows where the
    other one is farther from 0 and less than 1 away, and of integers from 2^53 on.
    """
    if bound * direction <= -WRITTEN:
        return -WRITTEN * direction
    near = float(bound)
    outside = near < bound if direction > 0 else near > bound
    if outside or (exclusive and near == bound and (near * direction >= 0 or abs(near) >= 2**53)):
        near = math.nextafter(near, direction * math.inf)
    return int(near) if near.is_integer() else float((UP if direction > 0 else DOWN).create_decimal(repr(near)))
