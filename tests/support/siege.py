"""A server under a mixed load: most clients plain, a tenth of them hostile, for as long as you like.

    python tests/support/siege.py --minutes 30 --clients 64

It starts `abyssal serve` on a tiny model and goes through three times: each plain request alone (what it is answered is
what it must be answered ever after), the plain clients without the others, all of them together. At the end, under full
load, the server is told to stop. Plain: chats, texts, streams, tool calls, JSON, with a dozen marks to tell them apart.
Hostile: grammars without end, slow heads and bodies, clients that leave, garbage, odd requests.

It prints what it measured and which bars it met, as JSON, and exits with 1 if one was missed.
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(part) for part in (ROOT, ROOT / "tests" / "support") if str(part) not in sys.path]

import requests_fuzz  # noqa: E402

from abyssal.model import save_pretrained  # noqa: E402

Json = Any
SLOWER = 2.0  # than with the plain clients alone: the median of each kind and what 95 of 100 requests take
GROWN = 1.1  # the memory of the last third over that of the first
STOPPED = 15.0  # seconds from SIGTERM to the end
MARKS = 12  # different prompts
LINES = 2.0  # in the log, for each request
TRUE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "f", "parameters": TRUE}}
PLAIN: dict[str, Callable[[str], tuple[str, Json]]] = {
    "chat": lambda mark: ("chat/completions", {"messages": [user(mark)], "max_tokens": 6, "temperature": 0}),
    "chat drawn": lambda mark: ("chat/completions", {"messages": [user(mark)], "max_tokens": 6, "seed": 1}),
    "chat stream": lambda mark: (
        "chat/completions",
        {"messages": [user(mark)], "max_tokens": 6, "stream": True, "seed": 2},
    ),
    "text": lambda mark: ("completions", {"prompt": mark, "max_tokens": 6, "seed": 3}),
    "text stream": lambda mark: ("completions", {"prompt": mark, "max_tokens": 6, "seed": 4, "stream": True}),
    "json": lambda mark: ("chat/completions", {"messages": [user(mark)], "max_tokens": 16, "seed": 5, **form(TRUE)}),
    "tool": lambda mark: ("chat/completions", {"messages": [user(mark)], "max_tokens": 120, "seed": 6, **calls(TOOL)}),
}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def form(schema: Json) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def calls(*tools: Json) -> Json:
    return {"tools": list(tools), "tool_choice": "required", "parallel_tool_calls": False}


# hostile grammars -----------------------------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


def optional(count: int) -> Json:
    properties = {name: {"type": "string"} for name in names(count)}
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


def branching(depth: int, width: int, key: str) -> Json:
    """Every level refers to the next one several times."""
    levels = {
        f"d{i}": {key: [{"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": j} for j in range(width)]}
        for i in range(depth)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**levels, f"d{depth}": {"type": "integer"}}}


GRAMMARS: dict[str, Json] = {
    "two multiples": form({"allOf": [{"type": "integer", "multipleOf": 1000003}, {"multipleOf": 999983}]}),
    "required": form({"type": "object", "required": names(40_000)}),
    "optional": calls(optional(2000)),
    "more optional": calls(optional(10_000)),
    "branches": form(branching(16, 3, "anyOf")),
    "one of branches": form(branching(12, 3, "oneOf")),
    "all of branches": form(branching(12, 2, "allOf")),
    "pattern": form({"type": "string", "pattern": "(a|b|ab){500}(x{1,500}y{1,500}){100}"}),
    "lengths": form({"type": "string", "minLength": 100_000, "maxLength": 900_000}),
    "items": form({"type": "array", "minItems": 100_000}),
}

# clients --------------------------------------------------------------------------------------------------------------


class Siege:
    """The clients of one server, and what they saw."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.expected: dict[tuple[str, str], str] = {}
        self.times: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        self.statuses: dict[str, collections.Counter[Any]] = collections.defaultdict(collections.Counter)
        self.faults: list[str] = []
        self.phase = "alone"
        self.over = False
        self.http = httpx.AsyncClient(base_url=f"{address}/v1", timeout=600.0, limits=httpx.Limits())

    async def plain(self, i: int) -> None:
        """A client that asks one thing after the other, and knows what it must hear."""
        for kind in itertools.islice(itertools.cycle(PLAIN), i, None):
            if self.over:
                return
            await self.ask(kind, f"client {i % MARKS}")

    async def ask(self, kind: str, mark: str) -> None:
        path, body = PLAIN[kind](mark)
        began, phase = time.monotonic(), self.phase
        try:
            reply = await self.http.post(path, json={"model": "tiny", **body})
        except httpx.HTTPError as error:
            if not self.over:
                self.faults.append(f"{kind}: {type(error).__name__} {error}")
            return
        if self.over:
            return
        self.statuses[phase][reply.status_code] += 1
        if reply.status_code != 200:
            self.faults.append(f"{kind}: {reply.status_code} {reply.text[:200]}")
            return
        self.times[phase][kind].append(time.monotonic() - began)
        said = answer(reply)
        if self.expected.setdefault((kind, mark), said) != said:
            self.faults.append(f"{kind} of {mark}: {said!r}, alone {self.expected[kind, mark]!r}")

    async def hostile(self, i: int) -> None:
        draw = random.Random(i)
        kinds = [self.grammar, self.leaving, self.slow_head, self.slow_body, self.garbage, self.odd]
        for kind in itertools.islice(itertools.cycle(kinds), i, None):
            if self.over:
                return
            try:
                await kind(draw)
            except (OSError, httpx.HTTPError):
                self.statuses["hostile"]["connection lost"] += 1

    async def post(self, body: Json, **options: Any) -> None:
        async with httpx.AsyncClient(base_url=f"{self.address}/v1", timeout=600.0) as http:
            reply = await http.post("chat/completions", json={"model": "tiny", **body}, **options)
        self.heard(reply)

    def heard(self, reply: httpx.Response) -> None:
        self.statuses["hostile"][reply.status_code] += 1
        if reply.status_code >= 500 and not self.over and reply.status_code != 504:
            self.faults.append(f"{reply.status_code}: {reply.text[:200]}")

    async def grammar(self, draw: random.Random) -> None:
        await self.post({"messages": [user("x")], "max_tokens": 40, **draw.choice(list(GRAMMARS.values()))})

    async def leaving(self, draw: random.Random) -> None:
        """Asks for much and is gone, while a grammar is made or in the middle of a stream."""
        much = {"messages": [user("x")], "max_tokens": 2000, "temperature": 0, "stream": True}
        much |= draw.choice([{}, *GRAMMARS.values()])
        try:
            await asyncio.wait_for(self.post(much), draw.uniform(0.0, 2.0))
        except TimeoutError:
            self.statuses["hostile"]["left"] += 1

    async def slow_head(self, draw: random.Random) -> None:
        await self.raw([bytes([byte]) for byte in b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"], 1.0)

    async def slow_body(self, draw: random.Random) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await self.raw([head + b"Content-Length: 1000\r\n\r\n", *[b" "] * 100], 1.0)

    async def garbage(self, draw: random.Random) -> None:
        await self.raw([draw.randbytes(draw.randrange(1, 3000)), b"\r\n\r\n"], 0.0)

    async def raw(self, parts: list[bytes], pause: float) -> None:
        """Bytes, with pauses, until they are over or the server has had enough."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
                if self.over or reader.at_eof():
                    break
            said = await asyncio.wait_for(reader.read(200), 60)
            self.statuses["hostile"][" ".join(said[:12].decode("latin-1").split()) or "closed"] += 1
        finally:
            writer.close()

    async def odd(self, draw: random.Random) -> None:
        async with httpx.AsyncClient(base_url=self.address, timeout=600.0) as http:
            for _ in range(20):
                self.heard(await http.request(**requests_fuzz.request(draw)))


def answer(reply: httpx.Response) -> str:
    """What was said, without what differs each time."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        parts = [choice for event in events[:-1] for choice in json.loads(event).get("choices", [{"error": event}])]
        return (
            "".join(str(part.get("text") or part.get("delta", part).get("content") or "") for part in parts)
            + events[-1]
        )
    (choice,) = reply.json()["choices"]
    message = choice.get("message", choice)
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return f"{message.get('content', message.get('text'))} {functions} {choice['finish_reason']}"


# the server -----------------------------------------------------------------------------------------------------------


class Watched:
    """The server's process, its log, and the memory of it and all processes that it has."""

    def __init__(self, folder: Path) -> None:
        save_pretrained(requests_fuzz.tiny_voice().model, folder, layout="official")
        command = [
            sys.executable,
            "-m",
            "abyssal.train",
            "serve",
            str(folder),
            "--tokenizer",
            "bytes",
            "--name",
            "tiny",
        ]
        command += ["--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment)
        self.lines: list[str] = []
        self.memory: list[tuple[str, int, int]] = []  # phase, MiB of the server, MiB of all
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(r"http://[0-9.:]+(?=/v1)", line)
            if found:
                self.address = found[0]
                break
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True).start()

    def weigh(self, phase: str) -> None:
        own = resident(self.process.pid)
        self.memory.append((phase, own, own + sum(map(resident, below(self.process.pid)))))


def resident(process: int) -> int:
    """MiB in memory; 0 for a process that is no more."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) // 1024 if found else 0


def below(process: int) -> Iterator[int]:
    """The processes that a process has started, and theirs."""
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from below(child)


# all of it ------------------------------------------------------------------------------------------------------------


async def besiege(server: Watched, siege: Siege, minutes: float, clients: int) -> tuple[float, int]:
    """Seconds from the signal to the end, and the exit status."""
    hostile = max(1, clients // 10)
    marks = [f"client {i}" for i in range(MARKS)]

    async def weigh() -> None:
        while True:
            server.weigh(siege.phase)
            await asyncio.sleep(0.5)

    weighing = asyncio.create_task(weigh())
    for kind, mark in itertools.product(PLAIN, marks):
        await siege.ask(kind, mark)
    siege.phase = "plain"
    plain = [asyncio.create_task(siege.plain(i)) for i in range(clients - hostile)]
    await asyncio.sleep(60 * minutes / 3)
    siege.phase = "mixed"
    others = [asyncio.create_task(siege.hostile(i)) for i in range(hostile)]
    await asyncio.sleep(60 * minutes * 2 / 3)
    siege.over = True
    weighing.cancel()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = await asyncio.to_thread(server.process.wait, 60)
    seconds = time.monotonic() - began
    for task in [*plain, *others]:
        task.cancel()
    await asyncio.gather(*plain, *others, return_exceptions=True)
    await siege.http.aclose()
    return seconds, status


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    shown = {"median": statistics.median(ordered), "p95": ordered[int(0.95 * (len(ordered) - 1))], "max": ordered[-1]}
    return {name: round(value, 3) for name, value in shown.items()} | {"requests": len(ordered)}


def thirds(values: list[int]) -> tuple[int, int]:
    third = max(1, len(values) // 3)
    return int(statistics.median(values[:third])), int(statistics.median(values[-third:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="a third of them without hostile clients")
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Watched(Path(folder) / "model")
        siege = Siege(server.address)
        seconds, status = asyncio.run(besiege(server, siege, options.minutes, options.clients))
    times = {
        phase: {kind: spread(each) for kind, each in {**kinds, "all": [*itertools.chain(*kinds.values())]}.items()}
        for phase, kinds in siege.times.items()
    }
    quiet, mixed = times["plain"], times["mixed"]
    slower = {kind: round(mixed[kind]["median"] / quiet[kind]["median"], 2) for kind in quiet if kind in mixed}
    slower["all, p95"] = round(mixed["all"]["p95"] / quiet["all"]["p95"], 2)
    memory = {
        which: thirds([row[i] for row in server.memory if row[0] == "mixed"]) for i, which in ((1, "own"), (2, "all"))
    }
    requests = sum(map(sum, (counter.values() for counter in siege.statuses.values())))
    odd = [i for i, line in enumerate(server.lines) if "Traceback" in line or not line.rstrip("\n").isprintable()]
    odd_lines = [server.lines[i : i + 20] for i in odd]
    bars = {
        "no fault": not siege.faults,
        f"within {SLOWER} of the quiet time": max(slower.values()) <= SLOWER,
        f"memory within {GROWN}": all(last <= GROWN * first for first, last in memory.values()),
        f"stopped within {STOPPED} s, by the signal": seconds <= STOPPED and status == -signal.SIGTERM,
        f"{LINES} lines per request, no errors": not odd_lines and len(server.lines) <= LINES * requests + 100,
    }
    report = {
        "times": times, "slower": slower, "statuses": siege.statuses, "MiB of the first and last third": memory,
        "log lines": len(server.lines), "requests": requests, "stopped": [round(seconds, 1), status],
        "faults": siege.faults[:20], "odd lines": odd_lines[:20], "bars": bars,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    sys.exit(not all(bars.values()))


if __name__ == "__main__":
    main()
