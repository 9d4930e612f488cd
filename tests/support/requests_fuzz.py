"""Requests as nobody should send them: valid ones, changed in random places, to an application with a tiny model.

    python tests/support/requests_fuzz.py --requests 10000 --seed 0

Right is, for each: an expected status; an error in OpenAI's form where it is not 200; a stream that ends as streams do;
nothing in the log that is an error. What is not right is printed, and makes the exit status 1.
"""

import argparse
import asyncio
import collections
import copy
import gzip
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(part) for part in (ROOT, ROOT / "tests" / "support") if str(part) not in sys.path]

from lively import lively  # noqa: E402

from abyssal.train.data.tokenizers import ByteTokenizer  # noqa: E402
from abyssal.train.talk.serve.app import Limits, build_app  # noqa: E402
from abyssal.train.talk.serve.grammars import Grammars  # noqa: E402
from abyssal.train.talk.serve.worker import Worker  # noqa: E402
from abyssal.train.talk.voice import Voice  # noqa: E402

Json = Any
STATUSES = {200, 400, 403, 404, 405, 408, 413, 415, 429}
AT_ONCE = 8


def tiny_voice() -> Voice:
    model = lively(vocab_size=288, eos_token_id=257, num_hidden_layers=2, compress_ratios=[0, 4])
    return Voice(model, ByteTokenizer(), "tiny", 2048)


# valid ----------------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
        "s": {"type": "string", "pattern": "^a+$", "minLength": 1, "maxLength": 4},
        "e": {"enum": ["x", 1, None]},
        "l": {"type": "array", "items": {"$ref": "#/$defs/i"}, "minItems": 0, "maxItems": 2},
        "o": {"anyOf": [{"type": "number", "multipleOf": 0.5}, {"type": "null"}, {"const": "k"}]},
        "d": {"type": "string", "format": "date"},
    },
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"i": {"type": "integer"}},
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOLS = [
    {"type": "function", "function": FUNCTION},
    {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
]
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
HISTORY = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
    {"role": "tool", "tool_call_id": "1", "content": "2"},
]
CHATS: list[Json] = [
    {"messages": [USER]},
    {"messages": HISTORY, "tools": TOOLS},
    {"messages": [USER], "tools": TOOLS, "tool_choice": "required", "max_tokens": 300, "parallel_tool_calls": False},
    {"messages": [USER], "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"messages": [USER], "response_format": FORM, "max_tokens": 60},
    {"messages": [USER], "response_format": {"type": "json_object"}, "thinking": {"type": "enabled"}},
    {"messages": HISTORY, "reasoning_effort": "high", "stop": ["a", "b"], "n": 2, "seed": 1},
    {"messages": [USER], "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "user": "u", "logit_bias": {}},
]
TEXTS: list[Json] = [
    {"prompt": "once"},
    {"prompt": ["once"], "temperature": 0, "stop": "x", "n": 2},
    {"prompt": "", "seed": 7, "echo": False, "best_of": 1, "logprobs": None},
]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
VALID = [
    (f"/v1/{path}", {"model": "tiny", "max_tokens": 3, **stream, **body})
    for path, bodies in (("chat/completions", CHATS), ("completions", TEXTS))
    for body in bodies
    for stream in ({}, STREAM)
]

# changed --------------------------------------------------------------------------------------------------------------


def nested(depth: int, opening: str = '{"a":', inner: str = "1", closing: str = "}") -> str:
    return opening * depth + inner + closing * depth


class Raw(NamedTuple):
    """Text that stands in the JSON as it is."""

    text: str


ODD: list[Json] = [
    *(None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, 3.4e38, 1e-320),
    *("", " ", "a", "x" * 3000, "\0", "\x1b[2J", "\u2028", "é😀", "\ue000" * 50, "<｜User｜>", "</think>", "｜DSML｜"),
    *("[" * 5000, "NaN", "1e999", '{"a": 1e999}', '{"a": "\\ud800"}', "null", "(", "a{1000}{1000}", "^(a+)+$", "\\"),
    *([], {}, [[]], [None], [1], ["a"], {"a": 1}, {"": {}}, {"type": "text", "text": "t"}, {"$ref": "#"}, "#/$defs/i"),
    *(
        ["object"],
        ["string", "null"],
        "object",
        "string",
        "array",
        "required",
        "none",
        "assistant",
        "tool",
        "developer",
    ),
    *map(
        Raw, ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "1" + "0" * 5000, '"\\ud800"', "01", "'a'")
    ),
    *(Raw(nested(depth)) for depth in (20, 100, 200, 600)),
    *(Raw(nested(depth, "[", "", "]")) for depth in (100, 600, 100_000)),
    Raw('{"a": 1, "a": 2}'),
]
KEYS = (
    "",
    "a",
    "\0",
    "type",
    "pattern",
    "properties",
    "$ref",
    "enum",
    "not",
    "required",
    "items",
    "anyOf",
    "allOf",
    "if",
)


def places(value: Json) -> list[tuple[Any, Any]]:
    """Everything in a value, as (what it is in, its key or number)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def change(body: Json, draw: random.Random) -> None:
    """One change at a random place."""
    inside, key = draw.choice(places(body))
    kind = draw.randrange(6)
    if kind < 3:
        inside[key] = copy.deepcopy(draw.choice(ODD))
    elif kind == 3:
        del inside[key]
    elif kind == 4 and isinstance(inside, dict):
        inside[draw.choice(KEYS)] = inside.pop(key) if draw.random() < 0.5 else copy.deepcopy(draw.choice(ODD))
    else:
        inside[key] = copy.deepcopy(draw.choice([other[which] for other, which in places(body)]))


def written(value: Json) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def cut(body: bytes, draw: random.Random) -> bytes:
    return body[: draw.randrange(len(body) + 1)]


def flipped(body: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(body))
    return body[:at] + bytes([draw.randrange(256)]) + body[at + 1 :]


BYTES = [
    cut,
    flipped,
    lambda body, draw: gzip.compress(body),
    lambda body, draw: body.decode().encode("utf-16"),
    lambda body, draw: b"\xef\xbb\xbf" + body,
    lambda body, draw: body + body,
]
PATHS = ["/v1/models/%00", "/v1/models/%ff", "/v1/models/tiny", "/v1/models/", "//", "/v1/chat/completions/", "/health"]
HOSTS = ["", "[", "[::1", "[::1]:x", "localhost:99999999", "a:b:c", "evil.example", "127.0.0.1", "LOCALHOST", "\xff"]
METHODS = ["GET", "PUT", "HEAD", "OPTIONS", "DELETE", "BREW", "POST"]


def request(draw: random.Random) -> dict[str, Any]:
    """For `httpx`: mostly a changed body, sometimes changed bytes, or another line or head of the request."""
    path, valid = draw.choice(VALID)
    body = copy.deepcopy(valid)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if body:
            change(body, draw)
    content, headers, method = written(body).encode(), {"Content-Type": "application/json"}, "POST"
    kind = draw.randrange(20)
    if kind == 0 and content:
        content = draw.choice(BYTES)(content, draw)
    elif kind == 1:
        headers["Host"] = draw.choice(HOSTS)
    elif kind == 2:
        method, path = draw.choice(METHODS), draw.choice([path, *PATHS])
    elif kind == 3:
        headers["Content-Type"] = draw.choice(["", "text/plain", "application/json; charset=x", "\xff", ";"])
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    return {"method": method, "url": path, "content": content, "headers": encoded}


# sent -----------------------------------------------------------------------------------------------------------------


def wrong(reply: httpx.Response) -> str | None:
    """What is wrong with a reply, if anything is."""
    if reply.status_code not in STATUSES:
        return f"status {reply.status_code}"
    if reply.request.method == "HEAD":
        return None
    if reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"):
        events = reply.text.removesuffix("\n\n").split("\n\n")
        if events[-1] != "data: [DONE]":
            return "a stream without its end"
        errors = [json.loads(event.removeprefix("data: ")).get("error") for event in events[:-1]]
        return next((f"{error} in a stream" for error in errors if error and error["code"] == "internal_error"), None)
    value = reply.json()
    if reply.status_code == 200:
        return None
    error = value.get("error", {})
    well = set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    return None if well and isinstance(error["param"], (str, type(None))) else f"error {error}"


class Errors(logging.Handler):
    """What is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


class Report(NamedTuple):
    statuses: dict[int, int]
    failures: list[str]


def fuzz(count: int, seed: int, voice: Voice | None = None) -> Report:
    """Sends that many requests."""
    voice = voice or tiny_voice()
    worker, grammars = Worker(AT_ONCE), Grammars(voice.tokenizer)
    errors = Errors()
    logging.getLogger("abyssal.serve").addHandler(errors)
    try:
        app = build_app(voice, Limits(max_new_tokens=3), worker, grammars)
        return asyncio.run(_fuzz(app, count, seed, errors))
    finally:
        logging.getLogger("abyssal.serve").removeHandler(errors)
        grammars.close()
        worker.close()


async def _fuzz(app: Any, count: int, seed: int, errors: Errors) -> Report:
    statuses: collections.Counter[int] = collections.Counter()
    failures: list[str] = []
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as http:

        async def some(numbers: Any) -> None:
            for number in numbers:
                fields = request(random.Random(f"{seed} {number}"))
                try:
                    reply = await http.request(**fields)
                    statuses[reply.status_code] += 1
                    fault = wrong(reply)
                except Exception as error:
                    fault = f"{type(error).__name__}: {error}"
                logged, errors.records[:] = list(errors.records), []
                fault = fault or (f"logged: {logged[0][-2000:]}" if logged else None)
                if fault:
                    failures.append(f"request {number} {fields['url']} {fields['content'][:2000]!r}: {fault}")

        numbers = iter(range(count))
        await asyncio.gather(*(some(numbers) for _ in range(AT_ONCE)))
    return Report(dict(sorted(statuses.items())), failures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = fuzz(options.requests, options.seed)
    for failure in report.failures:
        print(failure)
    print(json.dumps({"statuses": report.statuses, "failures": len(report.failures)}))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
