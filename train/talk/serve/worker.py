"""One thread that owns the model, and the jobs that wait for it: first come, first served, a bounded number.

    event loop                               worker thread
    submit(job)  ──► waiting jobs ──►  next(job.steps), a token's work at a time
    await job.next()  ◄── items ──────────┘   until it ends, fails, or the job is cancelled

A job that is cancelled leaves the queue at once, or stops at its next token: its place is free for others.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from .errors import ApiError, internal, out_of_time, shutting_down

log = logging.getLogger("abyssal.serve")


class Job:
    """Work in steps, made by `start` in the worker's thread; its items are read in the event loop that made the job."""

    def __init__(self, name: str, start: Callable[[], Iterator[Any]]) -> None:
        self.name, self.start = name, start
        self.cancelled = False
        self.arrived = time.monotonic()
        self.begun: float | None = None  # when its turn came, by the monotonic clock
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    async def items(self, deadline: float) -> AsyncIterator[Any]:
        """What the steps give, until they end.

        Raises:
            ApiError: it failed, was cut off, or the loop's clock has reached `deadline`.
        """
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await self._items.get()
            except TimeoutError:
                raise out_of_time() from None
            if item is END:
                return
            if isinstance(item, ApiError):
                raise item
            yield item

    def put(self, item: Any) -> None:
        """Hands an item to the event loop, from any thread; a loop that is gone has nobody who waits."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            self.cancelled = True


END = object()


class Worker:
    """Runs jobs one at a time; `limit`: how many may wait behind the one that runs."""

    def __init__(self, limit: int) -> None:
        self.limit, self.done = limit, 0
        self.running: Job | None = None
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="abyssal-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises what `submit` would raise now."""
        with self._changed:
            self._check_room()

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises ApiError: 429 if it is full, 503 if the server is going down."""
        with self._changed:
            self._check_room()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more."""
        job.cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Cuts off what runs, at its next token, and what waits; nothing more is taken on."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *([self.running] if self.running else [])]:
                job.cancelled = True
                job.put(shutting_down())
            self._waiting.clear()
            self._changed.notify()

    def close(self) -> None:
        """Stops, and waits for the thread to end; a pass of the model that has begun goes on to its end."""
        self.stop()
        self._thread.join()

    def _check_room(self) -> None:
        if self._closed:
            raise shutting_down()
        if len(self._waiting) >= self.limit:
            raise ApiError(429, f"{self.limit} requests are waiting already: try again later", code="queue_full")

    def _work(self) -> None:
        while True:
            with self._changed:
                self.running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self.running = self._waiting.popleft()
            self._run(self.running)
            self.done += 1

    def _run(self, job: Job) -> None:
        job.begun = time.monotonic()
        try:
            for item in job.start():
                if job.cancelled:
                    return
                job.put(item)
            job.put(END)
        except ApiError as error:
            job.put(error)
        except Exception:  # whatever it was: the next request must be served
            log.exception("%s failed", job.name)
            job.put(internal())
