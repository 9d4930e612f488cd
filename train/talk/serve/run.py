"""A server on an address: uvicorn around the application, until it is interrupted."""

import asyncio
import ipaddress
import logging
import socket
import sys

import uvicorn

from ..voice import Voice
from .app import Limits, build_app
from .worker import Worker

GRACE = 10.0  # seconds that requests get when the server is told to stop; then they are cut off, with an error


def serve(voice: Voice, host: str, port: int, limits: Limits) -> None:
    """Serves until SIGINT or SIGTERM; requests under way get a few seconds more.

    Raises:
        ValueError: an address that cannot be had.
    """
    listening = bind(host, port)
    log_to_stderr()
    log = logging.getLogger("abyssal.serve")
    shown = f"[{host}]" if ":" in host else host
    log.info("%s at http://%s:%d/v1", voice.name, shown, listening.getsockname()[1])
    if not limits.local_only:
        log.warning("bound to %s: anybody who reaches this address can use the model, there are no keys", host)
    try:
        build_server(voice, limits).run(sockets=[listening])
    except KeyboardInterrupt:
        log.info("stopped")


def build_server(voice: Voice, limits: Limits) -> uvicorn.Server:
    """uvicorn around the application."""
    worker = Worker(limits.queue)
    app = build_app(voice, limits, worker)
    settings = uvicorn.Config(app, access_log=False, log_level="warning", server_header=False)
    return _Server(settings, worker)


class _Server(uvicorn.Server):
    """Stops in order: no new connections, `GRACE` for what is under way, then an error for the rest."""

    def __init__(self, settings: uvicorn.Config, worker: Worker) -> None:
        super().__init__(settings)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE, self.worker.stop)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ValueError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port}: cannot listen there ({error})") from None


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("abyssal.serve").setLevel(logging.INFO)
