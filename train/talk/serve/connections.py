"""What clients may keep open: so many connections, and each no longer than a request and its answer take.

    accepted ─► HEAD_SECONDS for a request's head ─► `exchange` seconds for its body and answer ─► the next head, ...

uvicorn closes a connection that says nothing after an answer (`timeout_keep_alive`); what else has no end there has one
here. Where no file descriptors are left, connections are accepted with a spare one and closed.
"""

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

log = logging.getLogger("abyssal.serve")

HEAD_SECONDS = 10.0
MOST = 512  # connections, or half of the file descriptors
NO_FILES = (errno.EMFILE, errno.ENFILE)
SILENT = 60.0  # seconds between two lines that say the same


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with those bounds; what is refused here is told in JSON, too.

    Args:
        exchange: seconds that a request's body and its answer may take, together.
    """

    def __init__(self, exchange: float, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.exchange = exchange
        self.most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self.end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin(HEAD_SECONDS)
        if len(self.connections) > self.most:
            self._refuse(ApiError(503, f"{self.most} connections are open already", code="overloaded"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.end is not None:
            self.end.cancel()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._begin(self.exchange)

    def on_response_complete(self) -> None:
        self._begin(HEAD_SECONDS)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _begin(self, seconds: float) -> None:
        if self.end is not None:
            self.end.cancel()
        self.end = self.loop.call_later(seconds, self._out_of_time)

    def _out_of_time(self) -> None:
        """A client that is slow to ask is told so; one that is slow to read is cut off."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self.transport.is_closing():
            self._refuse(ApiError(408, "the request has not arrived in time", code="timeout"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Says so if nothing was said yet, and closes."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._begin(HEAD_SECONDS)


class Listening(socket.socket):
    """A listening socket for which there is always a file descriptor."""

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(fileno=listening.detach())
        self._spare, self._told = os.open(os.devnull, os.O_RDONLY), -SILENT

    def accept(self) -> tuple[socket.socket, Any]:
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in NO_FILES:
                raise
            if time.monotonic() - self._told >= SILENT:
                self._told = time.monotonic()
                log.error("no file descriptors are left (%s): new connections are closed", error.strerror)
        os.close(self._spare)
        try:
            super().accept()[0].close()
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        raise BlockingIOError

    def close(self) -> None:
        if self.fileno() >= 0:
            os.close(self._spare)
        super().close()
