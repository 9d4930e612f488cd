"""Dataclasses that check what they are given. A configuration needs no torch, and nothing here imports it.

    value    a list becomes a tuple and a whole number a float where the field says so; another type is an error;
             "none" is no value, where there may be none (TOML has no word for it)
    range    a field's own check, where its metadata have one: `check`, a function, and `allowed`, the same in words
    key      an unknown one is an error that names the nearest known key; all of them, or where they are listed, if none
             is near

Every error names the key, its value and what is allowed, in one line.
"""

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

LARGEST = 2**63 - 1  # what a tensor's sizes and ids can be
NEAR = 0.7  # difflib's ratio from which a name is near: 'grop' is 0.75 of 'grpo', 'n_layer' 0.64 of 'num_hash_layers'

NONE = "none"  # stands for no value in a recipe
MANY = 24  # keys that an error does not list where it can say who does
LIST = "abyssal recipe NAME --all"

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def means(meaning: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a dataclass with one line that says what it is."""
    return field(default=default, metadata={"meaning": meaning}, **more)


def build(kind: Any, values: Mapping[str, Any], prefix: str = "", also: Iterable[str] = (), see: str = "") -> Any:
    """`kind(**values)`, with inner tables built too; `also` are known keys that were handled before.

    `see` is the command that lists the keys, where they are too many for an error.

    Raises:
        TypeError, ValueError: an unknown key, a missing one, or what `kind` refuses.
    """
    types = {f.name: _without_none(f.type) for f in fields(kind)}
    for key in values:
        if key not in types:
            raise unknown("key", str(key), (*types, *also), lambda name: shown(prefix + name), see)
    missing = [prefix + f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"missing keys: {', '.join(missing)}")
    inner = {key for key, value in values.items() if is_dataclass(types[key]) and isinstance(value, Mapping)}
    return kind(**{k: build(types[k], v, f"{prefix}{k}.", see=see) if k in inner else v for k, v in values.items()})


def settle(config: Any, prefix: str = "") -> None:
    """Gives each field of a frozen dataclass the type that it declares, then asks its check.

    Raises:
        TypeError, ValueError: a value of another type, not finite, or refused by the field's check.
    """
    for f in fields(config):
        name, value = prefix + f.name, typed(prefix + f.name, getattr(config, f.name), f.type)
        object.__setattr__(config, f.name, value)
        if f.metadata.get("check"):
            require(f.metadata["check"](value), name, value, f.metadata["allowed"])


def drop_fixed(values: dict[str, Any], fixed: Mapping[str, Any]) -> None:
    """Takes out the keys that do not vary. Raises ValueError where one has another value."""
    for key, allowed in fixed.items():
        if key in values:
            require(values[key] == allowed, key, values.pop(key), repr(allowed))


def require(ok: Any, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={shown(value)}: allowed is {allowed}")


def shown(value: Any) -> str:
    """`repr`, of a long value its ends; the type of an integer with more digits than Python prints."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return f"<{type(value).__name__}>"


def unknown(what: str, name: str, known: Iterable[str], show: Callable[[str], str] = repr, see: str = "") -> ValueError:
    """The error about an unknown key, table or the like: the nearest known ones; all, or who lists them, if none is."""
    known = list(known)
    near = _near(name, known)
    hint = f"the nearest known {what} is {' or '.join(map(show, near))}" if near else f"known are {', '.join(known)}"
    if not near and see and len(known) > MANY:
        hint = f"none is near; {see} lists them"
    return ValueError(f"unknown {what} {show(name)}: {hint}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The words " did you mean 'toy'?" where something known is near, else none."""
    near = _near(name, list(known))
    return f" did you mean {' or '.join(map(repr, near))}?" if near else ""


def _near(name: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=3, cutoff=NEAR)


def _without_none(kind: Any) -> Any:
    return next(arg for arg in get_args(kind) if arg is not NoneType) if isinstance(kind, UnionType) else kind


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind` holds it. Raises TypeError or ValueError: of another type, or not finite."""
    if isinstance(kind, UnionType):
        return None if value in (None, NONE) else typed(name, value, _without_none(kind))
    if get_origin(kind) is tuple:
        return _sequence(name, value, get_args(kind))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name}={shown(value)}: allowed is {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: allowed are finite numbers")
    if kind is int:
        require(abs(value) <= LARGEST, name, value, f"an integer of 64 bits, up to {LARGEST}")
    return value


def _sequence(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """`kinds` are those of tuple[kind, ...] or of tuple[kind, kind]."""
    is_list, any_length = isinstance(value, list | tuple), kinds[-1] is Ellipsis
    if not is_list or not (any_length or len(value) == len(kinds)):
        allowed = kinds[0].__name__ if any_length else f"{len(kinds)} numbers"
        raise TypeError(f"{name}={shown(value)}: allowed is a list of {allowed}")
    return tuple(typed(f"{name}[{i}]", item, kinds[0]) for i, item in enumerate(value))
