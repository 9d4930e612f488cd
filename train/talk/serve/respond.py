"""From a job to its response: whole, or a stream of server-sent events; and a line in the log when it is over.

A client that goes away takes its job along, whether it waits, runs or is being sent.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..dialogue import Answer
from .errors import ApiError
from .grammars import Held
from .prepare import Work
from .replies import usage
from .worker import Job, Worker

log = logging.getLogger("abyssal.serve")

T = TypeVar("T")


async def respond(request: Request, worker: Worker, work: Work, held: Held | None, deadline: float) -> Response:
    """Queues the work and answers. Raises ApiError where there is no room, and where a whole answer fails; and
    ClientDisconnect.
    """
    job = Job(work.reply.id, lambda: work.steps(held))
    try:
        worker.submit(job)
    except ApiError:
        _end(held)
        raise
    return await _Exchange(request, worker, work, held, job, deadline).response()


async def unless_gone(request: Request, doing: Awaitable[T]) -> T:
    """The result of what is done for a client; it is cancelled when the client goes. Raises ClientDisconnect."""
    done, gone = asyncio.ensure_future(doing), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return await done
    finally:
        done.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _end(held: Held | None) -> None:
    if held is not None:
        held.close()


class _Exchange:
    """One request's job and what is said to its client."""

    def __init__(
        self, request: Request, worker: Worker, work: Work, held: Held | None, job: Job, deadline: float
    ) -> None:
        self.request, self.worker, self.work, self.deadline = request, worker, work, deadline
        self.held, self.job = held, job
        self.answers: list[Answer] = []
        self.outcome = "client gone"

    async def response(self) -> Response:
        if self.work.stream:
            headers = {"Cache-Control": "no-cache"}
            freed = BackgroundTask(self._free)  # a stream whose client has gone already is never begun
            return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers, background=freed)
        return await self._whole()

    async def _whole(self) -> Response:
        with self._recorded():
            await unless_gone(self.request, self._collect())
            self._finished()
        return JSONResponse(self.work.reply.whole(self.work.prompt_tokens, self.answers))

    async def _collect(self) -> None:
        async for items in self.job.items(self.deadline):
            self.answers += [item for _, item in items if isinstance(item, Answer)]

    async def _events(self) -> AsyncIterator[str]:
        """Chunks as events. What goes wrong once the stream has begun is an event too."""
        try:
            with self._recorded():
                async for chunk in self._chunks():
                    yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[dict]:
        reply, begun = self.work.reply, -1
        async for items in self.job.items(self.deadline):
            for i, item in items:
                for chunk in reply.opening(i) if i > begun else []:
                    yield chunk
                begun = i
                if not isinstance(item, Answer):
                    yield reply.piece(i, item)
                    continue
                self.answers.append(item)
                for chunk in reply.closing(i, item):
                    yield chunk
        self._finished()
        if self.work.usage:
            yield reply.chunk(counts=usage(self.work.prompt_tokens, self.answers))

    def _finished(self) -> None:
        self.outcome = ", ".join(answer.finish_reason for answer in self.answers)

    def _free(self) -> None:
        self.worker.cancel(self.job)
        _end(self.held)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Frees the job's place however this ends, and writes how it did."""
        try:
            yield
        except ApiError as error:
            self.outcome = str(error.code)
            raise
        finally:
            self._free()
            begun = self.job.begun or time.monotonic()
            waited, ran = begun - self.job.arrived, time.monotonic() - begun
            counts = f"{self.work.prompt_tokens} + {sum(answer.tokens for answer in self.answers)} tokens"
            log.info("%s %s · %s · waited %.2f s, ran %.2f s", self.job.name, self.outcome, counts, waited, ran)


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
