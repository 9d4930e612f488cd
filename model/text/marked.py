"""Special tokens are control, text is text: in a message, what spells a special token is cut in two by a mark.

messages, mark = marked(messages, tokenizer.special)
text = encode_messages(messages)
ids = [token for part in text.split(mark) for token in tokenizer.encode(part, special=True)]
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .chat import Message, read_arguments


def marked(messages: Sequence[Message], special: Iterable[str]) -> tuple[list[Message], str]:
    """The messages with each special string in their texts cut by the mark, and the mark, which none of them has.

    A call whose arguments are an empty text or null is one without any.

    Raises:
        RecursionError: they are nested too deeply.
    """
    messages, pattern = list(map(_with_parsed_arguments, messages)), "|".join(map(re.escape, special))
    mark = _mark(json.dumps(messages, ensure_ascii=False, default=str))
    return _cut(messages, re.compile(f"(?=(?:{pattern}))(.)", re.DOTALL), mark), mark


def _with_parsed_arguments(message: Message) -> dict[str, Any]:
    """The message with the arguments of its calls as objects: JSON's escapes could hide a special string."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": _object(function["arguments"])}})
    return {**message, "tool_calls": calls}


def _object(arguments: Any) -> Any:
    """The object that the text is JSON of, an empty one for null and no text at all; else what was given."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return {}
    try:
        parsed = read_arguments(arguments)
    except (TypeError, ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _mark(text: str) -> str:
    """A short string that the text does not have, and that no end of it begins: a number between private-use signs."""
    taken = set(re.findall("\ue000([0-9]+)\ue001", text))
    return next(f"\ue000{n}\ue001" for n in range(len(taken) + 1) if str(n) not in taken)


def _cut(value: Any, special: re.Pattern[str], mark: str) -> Any:
    """The value with each special string in its texts cut in two by the mark."""
    if isinstance(value, str):
        return special.sub(lambda found: found[1] + mark, value)
    if isinstance(value, Mapping):
        return {_cut(key, special, mark): _cut(part, special, mark) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(part, special, mark) for part in value]
    return value
