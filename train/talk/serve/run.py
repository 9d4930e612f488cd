"""A server on an address: uvicorn around the application, until it is interrupted."""

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import threading
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from ..voice import Voice
from .app import Limits, build_app
from .connections import BoundedProtocol, Listening
from .grammars import Grammars
from .worker import Worker

GRACE = 10.0  # seconds that requests get when the server is told to stop; then they are cut off, with an error
HEARD = 1.0  # seconds more for clients to hear it; then their connections are cut
LAST = 13.0  # seconds after which the process ends in any case
HEAD = 16 * 2**10  # bytes of a request's head
SENDING = 30.0  # seconds more than an answer may take for sending it to a slow client

log = logging.getLogger("abyssal.serve")


def serve(voice: Voice, host: str, port: int, limits: Limits) -> None:
    """Serves until SIGINT or SIGTERM; requests under way get a few seconds more.

    Raises:
        ValueError: an address that cannot be had.
    """
    listening = bind(host, port)
    log_to_stderr()
    shown = f"[{host}]" if ":" in host else host
    log.info("%s at http://%s:%d/v1", voice.name, shown, listening.getsockname()[1])
    if not limits.local_only:
        log.warning("bound to %s: anybody who reaches this address can use the model, there are no keys", host)
    server = build_server(voice, limits)
    server.grammars.warm()
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        log.info("stopped")


def build_server(voice: Voice, limits: Limits) -> "Server":
    """uvicorn around the application."""
    worker, grammars = Worker(limits.queue), Grammars(voice.tokenizer)
    app = build_app(voice, limits, worker, grammars)
    protocol: Any = partial(BoundedProtocol, limits.timeout + SENDING)
    settings = uvicorn.Config(
        app,
        http=protocol,
        loop="asyncio",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD,
    )
    return Server(settings, worker, grammars)


class Server(uvicorn.Server):
    """Stops in order: no new connections, `GRACE` for what is under way, then an error for the rest, then the end.

    It comes after `LAST` seconds at the latest, whatever the model does, and at once if the server is told again.
    """

    def __init__(self, settings: uvicorn.Config, worker: Worker, grammars: Grammars) -> None:
        super().__init__(settings)
        self.worker, self.grammars = worker, grammars

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            _exit(sig, "told to stop again")
        super().handle_exit(sig, frame)
        last = threading.Timer(LAST, _exit, (sig, f"still busy {LAST:.0f} seconds after it was told to stop"))
        last.daemon = True
        last.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timers = loop.call_later(GRACE, self._stop), loop.call_later(GRACE + HEARD, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def _stop(self) -> None:
        self.worker.stop()
        threading.Thread(target=self.grammars.close, daemon=True).start()  # it waits for processes

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _exit(sig: int, why: str) -> None:
    log.error("stopped: %s", why)
    os._exit(128 + sig)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ValueError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return Listening(socket.create_server((host, port), family=family, backlog=1024))
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port}: cannot listen there ({error})") from None


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("abyssal.serve").setLevel(logging.INFO)


class PrintableFormatter(logging.Formatter):
    """What clients send gets into the log, but no sign of it moves the cursor or begins a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def printable(text: str) -> str:
    """Signs that do not print as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
