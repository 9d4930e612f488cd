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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..chat import DSML
from .grammar import HINTS, Grammar, hints, json_rule, literal
from .schema import REFUSED, SHAPES, Document, GrammarError, check_json, least, shown
from .values import Rules, Values

TAG = f"<{DSML}>"  # the token, as the notation names it
WHOLE = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
PARAMETERS = 400  # of a tool: all that may come next stand side by side, and the library counts symbols in 16 bits


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
    functions = dict(_functions(tools))
    if choice not in ("auto", "required", "none", *functions):
        raise GrammarError(f"choice={shown(choice)}: allowed are 'auto', 'required', 'none' and {', '.join(functions)}")
    if choice == "none":
        return Grammar("answer: TEXT", "text")
    if not functions:
        raise GrammarError(f"tools are empty, but choice={choice!r}")
    chosen = functions if choice in ("auto", "required") else {choice: functions[choice]}
    rules = Rules()
    names = [_call(rules, name, document) for name, document in chosen.items()]
    calls = '(call "\\n")+' if parallel else 'call "\\n"'
    start = ["answer: TEXT | TEXT_AND_TAG block", 'TEXT_AND_TAG: TEXT "\\n\\n<"']
    lines = [
        *(start if choice == "auto" else ['answer: "\\n\\n<" block']),
        f'block: {TAG} "tool_calls>\\n" {calls} "</" {TAG} "tool_calls>"',
        f"call: {' | '.join(names)}",
        *rules.lines,
    ]
    searched = [hint for document in chosen.values() for hint in hints(document)]
    parts = () if choice == "auto" else tuple(_parts(*min(chosen.items(), key=lambda item: len(_schemas(item[1])[1]))))
    return Grammar("\n".join(lines), f"calls of {shown(', '.join(chosen))}", ("</", *searched)[:HINTS], parts=parts)


def _functions(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Document]]:
    """Each tool's name and parameters."""
    check_json(tools, "tools")
    if not isinstance(tools, list | tuple):
        raise GrammarError(f"tools={shown(tools)}: a list is needed")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise GrammarError(
                f"tools[{i}]={shown(tool)}: expected {{'type': 'function', 'function': {{'name': ...}}}}"
            )
        name = _written(function["name"], f"tools[{i}]")
        if name in names:
            raise GrammarError(f"tools[{i}] is another one of the name {name!r}")
        names.add(name)
        parameters = {} if function.get("parameters") is None else function["parameters"]
        yield name, _parameters(parameters, f"the parameters of tool {name!r}")


def _parameters(schema: Any, where: str) -> Document:
    """A tool's parameters, which are those of an object and no more.

    Raises:
        GrammarError: another type, or keywords that hold for the object as a whole.
    """
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{where} are {shown(schema)}: a schema of an object is needed")
    document = Document(schema, where)
    schema = document.at[()]
    unknown = sorted((schema.keys() & (SHAPES.keys() | REFUSED)) - WHOLE)
    if schema.get("type", "object") != "object" or unknown:
        wrong = f"have {', '.join(unknown)}" if unknown else f"are of type {shown(schema['type'])}"
        raise GrammarError(f"{where} {wrong}: allowed is an object with {', '.join(sorted(WHOLE))}")
    return document


def _call(rules: Rules, tool: str, document: Document) -> str:
    """The rule of one tool's calls."""
    schemas, required = _schemas(document)
    if len(schemas) > PARAMETERS:
        raise GrammarError(f"{document.where} are {len(schemas)}: at most {PARAMETERS} are allowed")
    values = Values(document, rules)
    lines = [(_parameter(rules, name, part, values), name in required) for name, part in schemas.items()]
    if any(line is None and needed for line, needed in lines):
        raise GrammarError(f"{document.where} require one whose schema allows no value")
    listed = _list(rules, [(line, needed) for line, needed in lines if line is not None])
    return rules.add("call_", f'{_start(tool)} {listed} "</" {TAG} "invoke>"')


def _parts(tool: str, document: Document) -> Iterator[Grammar]:
    """The parts of one call with the required parameters alone, names and values by themselves."""
    schemas, required = _schemas(document)
    yield Grammar(f'answer: "\\n\\n<" {TAG} "tool_calls>\\n" {_start(tool)}', "a call's start")
    for name in [name for name in schemas if name in required]:
        yield Grammar(f"answer: {_named(name, document)}", "a parameter's name")
        rules = Rules()
        value = _value(rules, schemas[name], Values(document, rules), lambda schema: json_rule(least(schema)))
        yield Grammar("\n".join([f'answer: {value} "\\n"', *rules.lines]), "a parameter's value")
    end = f'"</" {TAG} "invoke>\\n" "</" {TAG} "tool_calls>"'
    yield Grammar(f"answer: {end}" if required else f'answer: "\\n" {end}', "a call's end")


def _start(tool: str) -> str:
    named = literal(f'invoke name="{tool}">\n')
    return f'"<" {TAG} {named}'


def _schemas(document: Document) -> tuple[dict[str, Any], set[str]]:
    """The schemas of all parameters by their names, and which are required."""
    schema = document.at[()]
    properties, required = schema.get("properties", {}), schema.get("required", ())
    extra = schema.get("additionalProperties", True)
    return {**properties, **{name: extra for name in required if name not in properties}}, set(required)


def _list(rules: Rules, lines: Sequence[tuple[str, bool]]) -> str:
    """Each parameter and a line's end, the optional ones or not; a line's end alone if there is none.

    rest_i = line_i? rest_i+1                         after the first one that is given
    list_i = line_i rest_i+1 | list_i+1               before it; without the second form where line_i is required
    """
    rest, first = "", rules.add("list_", '"\\n"')
    for line, needed in reversed(lines):
        first = rules.add("list_", f'{line} "\\n" {rest}' if needed else f'{line} "\\n" {rest} | {first}')
        rest = rules.add("rest_", f'{line} "\\n" {rest}' if needed else f'({line} "\\n")? {rest}')
    return first


def _parameter(rules: Rules, name: str, schema: Any, values: Values) -> str | None:
    """The rule of one parameter; None if its schema allows no value."""
    value = _value(rules, schema, values, json_rule)
    return None if value is None else rules.add("parameter_", f"{_named(name, values.document)} {value}")


def _named(name: str, document: Document) -> str:
    start = literal(f'parameter name="{_written(name, document.where)}" string="')
    return f'"<" {TAG} {start}'


def _value(rules: Rules, schema: Any, values: Values, as_json: Callable[[Any], str]) -> str | None:
    """What follows a parameter's name; None if its schema allows no value."""
    forms = []
    text, other = values.text_of(schema), values.other_than_text(schema)
    if text is not None:
        terminal = rules.add("VALUE_", f'({text}) "</"')
        forms.append(f'"true\\">" {terminal}')
    if other is not None:
        forms.append(f'"false\\">" {rules.add("value_", as_json(other))} "</"')
    return f'({" | ".join(forms)}) {TAG} "parameter>"' if forms else None


def _written(name: str, where: str) -> str:
    """A name, if it can stand between quotes in a tag."""
    if not name or any(part in name for part in ('"', "\n", DSML)):
        raise GrammarError(
            f"{where}: the name {shown(name)} has no form in a tool call: no quotes, line ends and {DSML}"
        )
    return name
