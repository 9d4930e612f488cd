"""Reading JSON objects that anybody may have sent: every field is taken out by name and checked, and none may be left.

A field that is null counts as not given. Errors name the field by its path, as in `messages[2].content`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import ApiError, invalid

Check = Callable[[Any], Any]  # returns the value, or raises ValueError with what is allowed


DEEPEST = 128  # lists and objects in one another


def parse_object(body: bytes) -> dict[str, Any]:
    """A request's body as a JSON object of text that UTF-8 can write. Raises ApiError 400."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        if _depth(value) > DEEPEST:
            raise RecursionError
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a surrogate pair, which is no character", code="invalid_json") from None
    except RecursionError:
        message = f"the body has more than {DEEPEST} lists and objects in one another"
        raise ApiError(400, message, code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}: an object is needed", code="invalid_json")
    for path in _too_large(value, ""):
        raise invalid(path, "allowed are numbers that float64 holds")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of it")


def _too_large(value: Any, path: str) -> Iterator[str]:
    """Where there are numbers like 1e400."""
    if isinstance(value, float) and math.isinf(value):
        yield path
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _too_large(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _too_large(part, f"{path}[{i}]")


def _depth(value: Any) -> int:
    level, depth = [value], -1
    while level:
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level, depth = [part for each in parts for part in each], depth + 1
    return depth


class Fields:
    """The fields of an object that nobody has asked for yet."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise invalid(path, f"{short(value)} is no object", "invalid_type")
        self.path, self._left = path, {key: part for key, part in value.items() if part is not None}

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def take(self, key: str, check: Check, default: Any = None) -> Any:
        """The checked value of a field, or the default where it is not given."""
        if key not in self._left:
            return default
        value = self._left.pop(key)
        try:
            return check(value)
        except ValueError as error:
            raise invalid(self.name(key), f"{short(value)}: {error}") from None

    def need(self, key: str, check: Check) -> Any:
        """The checked value of a field that must be there."""
        if key not in self._left:
            raise invalid(self.name(key), "this field is required", "missing_required_parameter")
        return self.take(key, check)

    def neutral(self, key: str, *values: Any) -> None:
        """Takes out a field that has no effect here; other values than these would need one."""
        if key in self._left and self._left[key] not in values:
            allowed = " or ".join(map(short, values)) or "null"
            raise invalid(self.name(key), f"not supported here: allowed is {allowed}", "unsupported_parameter")
        self._left.pop(key, None)

    def ignore(self, *keys: str) -> None:
        """Takes out labels that could not change an answer anywhere."""
        for key in keys:
            self._left.pop(key, None)

    def end(self) -> None:
        """Raises if there is a field that nobody asked for."""
        for key in self._left:
            raise invalid(self.name(key), "there is no such parameter here", "unknown_parameter")


def short(value: Any) -> str:
    """The value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def anything(value: Any) -> Any:
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text is needed")
    return value


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


def integer(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not least <= value <= most:
            raise ValueError(f"allowed are integers from {least} to {most}")
        return int(value)

    return check


def number(least: float, most: float, above: bool = False) -> Check:
    """From `least` (or above it) to `most`."""

    def check(value: Any) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value <= most or (above and value == least):
            raise ValueError(f"allowed are numbers from {'more than ' if above else ''}{least:g} to {most:g}")
        return float(value)

    return check


def one_of(*values: str) -> Check:
    def check(value: Any) -> str:
        if value not in values:
            raise ValueError(f"allowed are {', '.join(values)}")
        return value

    return check


def objects(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list is needed")
    return value


def texts(most: int) -> Check:
    """A text, or a list of up to `most`, none of them empty; as a tuple."""

    def check(value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > most or not all(isinstance(v, str) and v for v in listed):
            raise ValueError(f"allowed are a text and lists of up to {most} texts, none of them empty")
        return tuple(listed)

    return check
