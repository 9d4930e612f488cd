r"""V4's tool calls as a grammar: a block in DSML whose parameters follow each tool's schema.

    \n\n<｜DSML｜tool_calls>\n
    <｜DSML｜invoke name="NAME">\n
    <｜DSML｜parameter name="P" string="true">raw text</｜DSML｜parameter>\n
    <｜DSML｜parameter name="Q" string="false">JSON</｜DSML｜parameter>\n
    </｜DSML｜invoke>\n
    </｜DSML｜tool_calls>

A parameter's schema is split: the texts that it allows are raw, all other values JSON. Where a raw text is followed by
a tag, the tag's `</` is part of the same terminal: the lexer takes the longest match and would not give it back.
Source: spec E.4, the release's encoding; `chat.py` reads what this allows.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import DSML
from .grammar import Grammar, GrammarError, alternatives, expression, json_rule, literal, patterns, signs

TAG = f"<{DSML}>"  # the token, as the notation names it
OTHER = ("null", "boolean", "number", "integer", "array", "object")
NOTES = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "nullable"}
DEFINITIONS = ("$defs", "definitions")
WHOLE = {"type", "properties", "required", "additionalProperties", "strict", "$schema", "$id", *DEFINITIONS, *NOTES}
TEXT_KEYS = {"pattern", "minLength", "maxLength", "format"}
ANCHORS = ("^", "$")

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


def tool_calls(tools: Sequence[Mapping[str, Any]], choice: str = "auto", parallel: bool = True) -> Grammar:
    """Answers that may or must call tools.

    Optional parameters may be left out; parameters that a schema does not name are not written.

    Args:
        tools: as in a request of OpenAI's API: {"type": "function", "function": {"name", "parameters"}}.
        choice: "auto" (a text, then calls or none), "required" (calls), "none" (a text), or the name of the tool that
            is to be called.
        parallel: whether there may be several calls.

    Raises:
        GrammarError: no tools, a choice that is none of them, a name or a schema that calls have no form for.
    """
    functions = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise GrammarError(f"tools[{i}]={tool!r}: expected {{'type': 'function', 'function': {{'name': ...}}}}")
        functions[_written(function["name"], f"tools[{i}]")] = function.get("parameters") or {}
    if choice not in ("auto", "required", "none", *functions):
        raise GrammarError(f"choice={choice!r}: allowed are 'auto', 'required', 'none' and {', '.join(functions)}")
    if choice == "none":
        return Grammar("answer: TEXT", "text")
    if not functions:
        raise GrammarError(f"tools are empty, but choice={choice!r}")
    chosen = {choice: functions[choice]} if choice in functions else functions
    rules = _Rules()
    names = [rules.call(name, parameters) for name, parameters in chosen.items()]
    calls = '(call "\\n")+' if parallel else 'call "\\n"'
    start = ["answer: TEXT | TEXT_AND_TAG block", 'TEXT_AND_TAG: TEXT "\\n\\n<"']
    lines = [
        *(start if choice == "auto" else ['answer: "\\n\\n<" block']),
        f'block: {TAG} "tool_calls>\\n" {calls} "</" {TAG} "tool_calls>"',
        f"call: {' | '.join(names)}",
        *rules.lines,
    ]
    return Grammar("\n".join(lines), f"calls of {', '.join(chosen)}", ("</", *patterns(list(chosen.values()))))


class _Rules:
    """Numbered rules as they are made."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, prefix: str, body: str) -> str:
        name = f"{prefix}{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def call(self, tool: str, parameters: Any) -> str:
        """The rule of one tool's calls."""
        where = f"the parameters of tool {tool!r}"
        if not isinstance(parameters, Mapping):
            raise GrammarError(f"{where} are {parameters!r}: a schema of an object is needed")
        unknown = sorted(parameters.keys() - WHOLE)
        if parameters.get("type", "object") != "object" or unknown:
            wrong = f"have {', '.join(unknown)}" if unknown else f"are of type {parameters['type']!r}"
            raise GrammarError(f"{where} {wrong}: allowed is an object with {', '.join(sorted(WHOLE - NOTES))}")
        properties, required = parameters.get("properties") or {}, list(parameters.get("required") or ())
        extra = parameters.get("additionalProperties", True)
        schemas = {**properties, **{name: extra for name in required if name not in properties}}
        rules = [
            (self.parameter(name, schema, parameters, f"parameter {name!r} of tool {tool!r}"), name in required)
            for name, schema in schemas.items()
        ]
        if any(rule is None and needed for rule, needed in rules):
            raise GrammarError(f"{where} require one whose schema allows no value")
        start = literal(f'invoke name="{tool}">\n')
        return self.add("call_", f'"<" {TAG} {start} {self._list(rules)} "</" {TAG} "invoke>"')

    def _list(self, rules: Sequence[tuple[str | None, bool]]) -> str:
        """Each parameter and a line's end, the optional ones or not; a line's end alone if there is none."""
        parts = [(rule, needed) for rule, needed in rules if rule is not None]
        lines = [f'{rule} "\\n"' for rule, _ in parts]
        rest = [line if needed else f"({line})?" for line, (_, needed) in zip(lines, parts)]
        if any(needed for _, needed in parts):
            return self.add("list_", " ".join(rest))
        first_given = [" ".join([line, *rest[i + 1 :]]) for i, line in enumerate(lines)]
        return self.add("list_", " | ".join([*first_given, '"\\n"']))

    def parameter(self, name: str, schema: Any, root: Mapping[str, Any], where: str) -> str | None:
        """The rule of one parameter; None if its schema allows no value."""
        values = _split(schema, root, where)
        forms = []
        if values.texts:
            terminal = self.add("VALUE_", f'({" | ".join(values.texts)}) "</"')
            forms.append(f'"true\\">" {terminal}')
        if values.others:
            shared = {key: root[key] for key in DEFINITIONS if key in root}
            rule = self.add("value_", json_rule({"anyOf": values.others, **shared}))
            forms.append(f'"false\\">" {rule} "</"')
        if not forms:
            return None
        start = literal(f'parameter name="{_written(name, where)}" string="')
        return self.add("parameter_", f'"<" {TAG} {start} ({" | ".join(forms)}) {TAG} "parameter>"')


@dataclass
class _Values:
    """What a schema allows: expressions of its texts, and schemas of its other values."""

    texts: list[str]
    others: list[Any]


def _split(schema: Any, root: Mapping[str, Any], where: str, depth: int = 0) -> _Values:
    if schema is False:
        return _Values([], [])
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping) or depth > 32:
        raise GrammarError(f"{where}: {schema!r} is no schema, or refers to itself")
    keys = schema.keys() - NOTES - set(DEFINITIONS)
    for key, branches in _alternatives(schema, root, where).items():
        if keys != {key}:
            raise GrammarError(f"{where}: {key} beside {', '.join(sorted(keys - {key}))} has no form in a tool call")
        parts = [_split(branch, root, where, depth + 1) for branch in branches]
        return _Values([t for part in parts for t in part.texts], [o for part in parts for o in part.others])
    kinds = schema.get("type", ("string", *OTHER))
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if "enum" in schema or "const" in schema:
        allowed = schema["enum"] if "enum" in schema else [schema["const"]]
        texts = [f"{literal(value)} & TEXT" for value in allowed if isinstance(value, str)] if "string" in kinds else []
        rest = [value for value in allowed if not isinstance(value, str)]
        others = [{**schema, "enum": rest}] if rest else []
        if texts and schema.keys() & TEXT_KEYS:
            raise GrammarError(f"{where}: an enum or const beside {', '.join(sorted(schema.keys() & TEXT_KEYS))}")
        return _Values(texts, [{k: v for k, v in other.items() if k != "const"} for other in others])
    other_kinds = [kind for kind in kinds if kind != "string"]
    texts = [_text(schema, where)] if "string" in kinds else []
    return _Values(texts, [{**schema, "type": other_kinds}] if other_kinds else [])


def _alternatives(schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> dict[str, list[Any]]:
    """The key by which a schema stands for others, and those."""
    if "$ref" in schema:
        return {"$ref": [_resolve(schema["$ref"], root, where)]}
    if len(schema.get("allOf", [])) == 1:
        return {"allOf": schema["allOf"]}
    if "allOf" in schema:
        raise GrammarError(f"{where}: allOf of several schemas has no form in a tool call")
    return {key: schema[key] for key in ("anyOf", "oneOf") if key in schema}


def _resolve(reference: str, root: Mapping[str, Any], where: str) -> Any:
    found: Any = root
    for part in str(reference).removeprefix("#").strip("/").split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or part not in found:
            raise GrammarError(f"{where}: $ref {reference!r} leads nowhere in the tool's parameters")
        found = found[part]
    return found


def _text(schema: Mapping[str, Any], where: str) -> str:
    """The expression of the texts that a schema allows."""
    parts = ["TEXT"]
    if "pattern" in schema:
        parts.append(expression(_search(schema["pattern"], where)))
    if "minLength" in schema or "maxLength" in schema:
        parts.append(f"/(?s:.){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/")
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise GrammarError(f"{where}: format {schema['format']!r}: allowed are {', '.join(FORMATS)}")
        parts.append(expression(FORMATS[schema["format"]]))
    return " & ".join(parts)


def _search(pattern: str, where: str) -> str:
    """The expression of whole texts in which a pattern is found somewhere, or where its `^` and `$` say."""
    found = []
    for part in alternatives(pattern):
        start = "" if part.startswith("^") else "(?s:.*)"
        anchored = re.search(r"(?<!\\)(\\\\)*\$$", part) is not None
        body = part.removeprefix("^")[: -1 if anchored else None]
        if any(sign in ANCHORS for sign in signs(body)):
            raise GrammarError(f"{where}: pattern {pattern!r}: ^ and $ are allowed at the ends of an alternative")
        found.append(f"{start}({body})" + ("" if anchored else "(?s:.*)"))
    return "|".join(found)


def _written(name: str, where: str) -> str:
    """A name, if it can stand between quotes in a tag."""
    if not name or any(part in name for part in ('"', "\n", DSML)):
        raise GrammarError(f"{where}: the name {name!r} has no form in a tool call: no quotes, line ends and {DSML}")
    return name
