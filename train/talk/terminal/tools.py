"""Python functions as tools: the schema is in the signature and the docstring.

    def weather(city: str, days: int = 1) -> str:
        \"\"\"The weather of the coming days.

        Args:
            city: its name in English.
        \"\"\"

Every public function that the file defines is a tool; one that is async is run to its end. Arguments are checked
against the hints before a call. A tool runs in the main thread, where Ctrl-C and the limit of time raise an exception
in it: it is really stopped, and its `finally` is run, but a long call of a C library has to come back first.
"""

import inspect
import json
import re
import runpy
import signal
import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SECONDS = 60.0  # that a tool may take, unless the user says otherwise
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Tool:
    """A function and its `schema`, as in a request of OpenAI's API."""

    function: Callable[..., Any]
    schema: Mapping[str, Any]

    def run(self, arguments: str, seconds: float = SECONDS) -> str:
        """The result of a call with a JSON object of arguments, as text; what goes wrong is a result too.

        Results are written in JSON where they can be, else as Python prints them.
        """
        try:
            given = json.loads(arguments)
            self._check(given)
            with _limit(seconds):
                result = self.function(**given)
                text = _text(_finished(result) if inspect.isawaitable(result) else result)
        except BaseException as error:  # the model is to learn of it, whatever it was: sys.exit and Ctrl-C, too
            text = f"error: {_named(error)}"
        return text.encode(errors="backslashreplace").decode()

    def _check(self, given: Any) -> None:
        hints, parameters = typing.get_type_hints(self.function), inspect.signature(self.function).parameters
        if not isinstance(given, dict):
            raise TypeError(f"arguments {given!r}: an object is needed")
        for name in given.keys() - parameters.keys():
            raise TypeError(f"there is no parameter {name!r}")
        for name, parameter in parameters.items():
            if name not in given and parameter.default is parameter.empty:
                raise TypeError(f"parameter {name!r} is missing")
            if name in given and not fits(given[name], hints[name]):
                raise TypeError(f"{name}={given[name]!r}: {json.dumps(schema_of(hints[name], name))} is needed")


class Stopped(BaseException):
    """A tool has taken too long. No Exception, because a tool may well catch those and try again."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises Stopped in what runs in it, after so many seconds and then every second."""

    def stop(*_: object) -> None:
        raise Stopped(f"it took longer than {seconds:g} s")

    before, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _finished(result: Awaitable[Any]) -> Any:
    import asyncio

    async def finish() -> Any:
        return await result

    return asyncio.run(finish())


def _text(result: Any) -> str:
    if isinstance(result, str):
        return str.__str__(result)
    try:
        return json.dumps(result, ensure_ascii=False, default=str)
    except Exception:  # keys, circles, numbers, methods of its own
        pass
    try:
        return str(result)
    except Exception as error:
        return f"error: the result, a {type(result).__name__}, cannot be written: {_named(error)}"


def _named(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # from a message that is computed
        return f"{type(error).__name__}, whose message cannot be written"


def load_tools(path: Path) -> dict[str, Tool]:
    """The tools of a Python file, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not run to its end, or has no public function, a generator, or a parameter that JSON has no
            value for.
    """
    if not path.is_file():
        raise FileNotFoundError(f"tools={str(path)!r}: no such file")
    module = "abyssal_tools"
    try:
        defined = runpy.run_path(str(path), run_name=module)
        tools = {
            name: Tool(value, _tool_schema(name, value))
            for name, value in defined.items()
            if inspect.isfunction(value) and value.__module__ == module and not name.startswith("_")
        }
    except (Exception, SystemExit) as error:
        raise ValueError(f"tools={str(path)!r}: {' '.join(_named(error).split())}") from error
    if not tools:
        raise ValueError(f"tools={str(path)!r}: it defines no public function")
    return tools


def _tool_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"{name}: a generator is no tool, which returns its result")
    described, meanings = _docstring(function)
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"{name}({parameter.name})"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{where}: parameters need a name each, * and / have no place in a tool")
        if parameter.name not in hints:
            raise ValueError(f"{where}: a type hint is needed")
        properties[parameter.name] = schema_of(hints[parameter.name], where)
        if parameter.name in meanings:
            properties[parameter.name]["description"] = meanings[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    json.dumps([name, described, parameters], ensure_ascii=False).encode()  # the model is told of all this
    return {"type": "function", "function": {"name": name, "description": described, "parameters": parameters}}


def schema_of(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint. Raises ValueError for one that has none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and hint in PLAIN:
        return {"type": PLAIN[hint]}
    if origin is Literal and all(isinstance(part, str | int | None) for part in parts):
        return {"enum": list(parts)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if part is type(None) else schema_of(part, where) for part in parts]}
    if origin is list and parts:
        return {"type": "array", "items": schema_of(parts[0], where)}
    if origin is dict and parts and parts[0] is str:
        return {"type": "object", "additionalProperties": schema_of(parts[1], where)}
    raise ValueError(
        f"{where}: {hint} has no JSON schema here; allowed are str, int, float, bool, list[...], dict[str, ...], "
        "Literal[...] and unions with | of them and None"
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type hint that has a schema."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(value is None if part is type(None) else fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(fits(part, parts[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(part, parts[1]) for part in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """What a docstring says before its sections, and of each parameter under "Args:"."""
    text = inspect.getdoc(function) or ""
    before, _, section = re.split(r"^(Args|Returns|Raises):\s*$", text + "\n\nArgs:\n", maxsplit=1, flags=re.MULTILINE)
    meanings = re.findall(r"^ +(\w+)(?: *\([^)]*\))?: *(.+(?:\n {5,}.+)*)", section, flags=re.MULTILINE)
    return before.strip(), {name: " ".join(meaning.split()) for name, meaning in meanings}
