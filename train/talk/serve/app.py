"""The HTTP side: routes that read a request strictly, have it prepared and answered, and tell every error in JSON.

POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{id}   GET /health
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..voice import Voice
from .errors import ApiError, internal, out_of_time
from .fields import parse_object
from .grammars import Grammars, Held
from .prepare import Work, prepare_chat, prepare_text
from .request import check_model, read_chat, read_text
from .respond import respond, unless_gone
from .worker import Worker

log = logging.getLogger("abyssal.serve")

LOCAL_NAMES = ("", "localhost", "127.0.0.1", "[::1]")
BODY_SECONDS = 30.0  # for a body to arrive
LARGE = 2**16  # bytes of a body; of such one is read at a time, for nothing else goes on meanwhile
CLIENT_GONE = 499  # a status that nobody reads


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Raises:
        ValueError: a number that is not positive.
    """

    queue: int = 64  # requests that may wait
    timeout: float = 300.0  # seconds from a request's arrival to the end of its answer
    max_new_tokens: int = 1024  # of an answer where the request names no number
    max_body: float = 4 * 2**20  # bytes of a request
    thinking: bool = False  # think where the request does not say
    local_only: bool = True  # answer only to this machine's own names, so that no web page elsewhere can ask

    def __post_init__(self) -> None:
        for name in ("queue", "timeout", "max_new_tokens", "max_body"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)}: allowed are positive numbers")


def build_app(voice: Voice, limits: Limits, worker: Worker, grammars: Grammars) -> Starlette:
    """The application that serves a model; worker and grammars are closed at the end of its lifespan."""
    server = Server(voice, limits, worker, grammars)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(grammars.close)
        await asyncio.to_thread(worker.close)

    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.text, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/health", server.health),
    ]
    errors: Any = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _unexpected}
    app = Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan)
    app.router.redirect_slashes = False  # to a host that the client names
    return app


class Server:
    """One model, its worker, and the endpoints."""

    def __init__(self, voice: Voice, limits: Limits, worker: Worker, grammars: Grammars) -> None:
        self.voice, self.limits, self.worker, self.grammars = voice, limits, worker, grammars
        self.began = time.time()
        self.large = asyncio.Semaphore(1)

    async def chat(self, request: Request) -> Response:
        def prepare(body: bytes) -> Work:
            asked = read_chat(parse_object(body), self.limits.thinking)
            return prepare_chat(self.voice, asked, self.limits.max_new_tokens)

        return await self._answer(request, prepare)

    async def text(self, request: Request) -> Response:
        def prepare(body: bytes) -> Work:
            return prepare_text(self.voice, read_text(parse_object(body)), self.limits.max_new_tokens)

        return await self._answer(request, prepare)

    async def _answer(self, request: Request, prepare: Callable[[bytes], Work]) -> Response:
        """Reads, prepares (beside the event loop: it may take a while) and answers a request, in time."""
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        body = await self._body(request, deadline)
        work, held = await unless_gone(request, self._prepared(prepare, body, deadline))
        return await respond(request, self.worker, work, held, deadline)

    async def _prepared(
        self, prepare: Callable[[bytes], Work], body: bytes, deadline: float
    ) -> tuple[Work, Held | None]:
        try:
            async with asyncio.timeout_at(deadline):
                async with self.large if len(body) > LARGE else contextlib.nullcontext():
                    work = await asyncio.to_thread(prepare, body)
                held = None if work.held is None else await self.grammars.make(work.held, work.tokens)
                return work, held
        except TimeoutError:
            raise out_of_time() from None

    async def models(self, request: Request) -> Response:
        self._check_host(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_host(request)
        check_model(request.path_params["name"], self.voice.name)
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        self._check_host(request)
        worker = self.worker
        state = {"running": int(worker.running is not None), "queued": worker.waiting, "queue": worker.limit}
        return JSONResponse({"status": "ok", "model": self.voice.name, **state, "done": worker.done})

    def _model(self) -> dict[str, Any]:
        return {"id": self.voice.name, "object": "model", "created": int(self.began), "owned_by": "abyssal"}

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.limits.local_only and name.lower() not in LOCAL_NAMES:
            raise ApiError(403, f"Host {host!r}: this server answers to this machine only", code="forbidden_host")

    async def _body(self, request: Request, deadline: float) -> bytes:
        """What the request has to say. Raises ApiError."""
        self._check_host(request)
        self.worker.check_room()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web page elsewhere cannot send this type unasked
            raise ApiError(415, f"Content-Type {kind!r}: application/json is needed", code="unsupported_media_type")
        body = bytearray()
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + BODY_SECONDS)):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.max_body:
                        raise ApiError(
                            413, f"the body has over {self.limits.max_body:,.0f} bytes", code="body_too_large"
                        )
        except TimeoutError:
            raise ApiError(408, "the body has not arrived in time", code="timeout") from None
        return bytes(body)


async def _api_error(request: Request, error: ApiError) -> Response:
    if error.status < 500:
        log.info("%s %s: %d %s", request.method, request.url.path, error.status, error.code)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such address, or another method."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return await _api_error(request, ApiError(error.status_code, message, code=code))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Starlette raises the error again behind this response, so that it is in the log; uvicorn closes then."""
    return JSONResponse(internal().body(), 500, {"Connection": "close"})
