"""Grammars that clients ask for, each made and followed in a process of its own (`nursery.py`).

    held = await grammars.make(asked, tokens)     a Constraint for `generate`     held.close() ends its process

Whatever a grammar does to that process, or to the library in it, costs one request.
"""

import asyncio
import itertools
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import numpy as np

from ....model.text.constrain import Constraint
from ....model.text.constrain.walk import Walk
from ...data.tokenizers import Tokenizer
from .errors import ApiError, invalid, shutting_down
from .nursery import COMMAND, FORK, KILL, MAKING, MEMORY, READY, SLOW
from .request import ChatRequest

log = logging.getLogger("abyssal.serve")

AT_ONCE = 8  # grammars that are being made; others wait
GIVES_WAY = 1.0  # seconds after which a grammar that is not made yet gets the time only that nobody else wants
HUNG = 60.0  # seconds for one step; processor time is up long before, if there is any


class Grammars:
    """Makes grammars ready for one tokenizer, a few at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._nursery = _Nursery(tokenizer)
        self._threads = ThreadPoolExecutor(AT_ONCE, "abyssal-grammar")

    def warm(self) -> None:
        """Starts what takes seconds; otherwise the first request waits for it."""
        self._threads.submit(self._nursery.start)

    async def make(self, asked: ChatRequest, tokens: int) -> "Held":
        """Raises ApiError: no such grammar, no answer of up to `tokens` tokens, or too much for the limits."""
        held = Held(self._nursery, asked.held_by)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, held.make, asked, tokens)
        except asyncio.CancelledError:  # the client has gone, or the server is told to stop
            held.close()
            if self._nursery.closed:
                raise shutting_down() from None
            raise
        except BaseException:
            held.close()
            raise
        return held

    def close(self) -> None:
        """Ends all processes."""
        self._nursery.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


class Held(Constraint):
    """A constraint whose grammar is in another process; one text at a time may follow it."""

    def __init__(self, nursery: "_Nursery", param: str) -> None:
        self.param, self.vocabulary = param, nursery.vocabulary
        self._nursery, self._number, self._closed = nursery, next(NUMBERS), False

    def make(self, asked: ChatRequest, tokens: int) -> None:
        self._connection, self._from = self._nursery.fork(self._number)
        if self._closed:
            self.close()
        self._put(asked, tokens)
        if not self._connection.poll(GIVES_WAY):
            self._nursery.command(self._number, SLOW)
        self._get()

    def walk(self, budget: int) -> "HeldWalk":
        self.ask("walk", budget)
        return HeldWalk(self, budget)

    def ask(self, *question: Any) -> Any:
        """Raises ApiError where the text cannot go on, or the process is no more."""
        self._put(*question)
        return self._get(HUNG)

    def close(self) -> None:
        """Ends the process, whatever it does; from any thread."""
        self._closed = True
        self._nursery.command(self._number, KILL)

    def _put(self, *question: Any) -> None:
        try:
            self._connection.send(question)
        except OSError:
            raise self._lost() from None

    def _get(self, seconds: float | None = None) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise self._lost()
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if kind == "refused":
            raise ApiError(**value)
        if kind == "broken":
            log.error("a grammar failed\n%s", value)
            raise self._lost()
        return value

    def _lost(self) -> ApiError:
        if self._nursery.closed:
            return shutting_down()
        if self._nursery.lost(self._from):
            return ApiError(503, "the process that follows grammars was lost: try again", code="overloaded")
        limits = f"over {MAKING} seconds of processor time or {MEMORY // 2**20} MiB"
        message = f"no grammar can be made of this: it takes {limits}, or breaks the library that makes it"
        return invalid(self.param, message, "unsupported_schema")


class HeldWalk(Walk):
    """A text that follows it."""

    def __init__(self, held: Held, left: int) -> None:
        self.constraint: Held = held
        self.left, self.complete = left, False

    def fill(self, words: np.ndarray, row: int) -> None:
        mask = np.frombuffer(self.constraint.ask("fill"), np.int32)
        words[row, : len(mask)] = mask

    def take(self, token: int) -> int:
        written, self.complete = self.constraint.ask("take", token)
        self.left -= 1
        return written

    def back(self) -> None:
        self.constraint.ask("back")
        self.left, self.complete = self.left + 1, False


NUMBERS = itertools.count()


class _Nursery:
    """The process that forks; started when it is first needed, and again should it ever be lost."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocabulary: Any = SimpleNamespace(size=tokenizer.vocab_size)
        self._tokenizer = pickle.dumps(tokenizer)
        self._starting, self._sending = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # once it is ready
        self.closed = False

    def start(self) -> None:
        """Starts the process unless it runs. Raises RuntimeError if it ends at once."""
        with self._starting:
            if self.closed or (self._process is not None and self._process.poll() is None):
                return
            ours, theirs = socket.socketpair()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"}
            with theirs:
                command = [sys.executable, "-m", f"{__package__}.nursery"]
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment
                )
            with Connection(os.dup(ours.fileno()), readable=False) as sent:
                sent.send_bytes(self._tokenizer)
            if ours.recv(1) != READY and not self.closed:
                raise RuntimeError("the process that makes grammars has not started")
            self._socket = ours

    def fork(self, number: int) -> tuple[Connection, Any]:
        """The connection to a new process, and which process it came from.

        Raises ApiError if there are no more file descriptors.
        """
        try:
            self.start()
            ours, theirs = socket.socketpair()
            with theirs:
                lost = self._process
                if lost is not None and not self.command(number, FORK, [theirs.fileno()]):
                    lost.kill()
                    lost.wait()  # only then it is started again
                    self.start()
                    self.command(number, FORK, [theirs.fileno()])
        except (OSError, RuntimeError) as error:
            raise ApiError(503, f"no grammar can be made now: {error}", code="overloaded") from None
        return Connection(ours.detach()), self._process

    def lost(self, process: Any) -> bool:
        """Whether this process is no more: whatever ended it, followers that were not forked yet ended with it."""
        with self._sending:
            if process is not self._process or self._socket is None:
                return True
            try:
                return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError as error:
                return not isinstance(error, BlockingIOError)

    def command(self, number: int, command: bytes, files: Sequence[int] = ()) -> bool:
        """Whether it was sent: without effect for a follower that is no more, and false if this process is not."""
        with self._sending:
            if self._socket is None or self.closed:
                return False
            try:
                socket.send_fds(self._socket, [COMMAND.pack(number, command)], files)
            except OSError:
                return False
            return True

    def close(self) -> None:
        """Ends it, and with it its children."""
        with self._sending:
            self.closed = True
            if self._socket is not None:
                self._socket.close()
        if self._process is not None:
            if self._socket is None:
                self._process.kill()
            self._process.wait()
