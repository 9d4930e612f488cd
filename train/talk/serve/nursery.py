"""The process that the followers of grammars are forked from: `python -m abyssal.train.talk.serve.nursery`.

A grammar comes from a client, and to make one of it and to follow it may take any time, any memory, or break the
library. So each request's is followed in a process of its own, which may be killed, and does so itself at its limits:

    server ◄─► nursery    the tokenizer, READY, then each COMMAND: a number with FORK (and a socket), SLOW or KILL
    server ◄─► follower   (what the answer is held to, its tokens), then ("walk", tokens), ("fill",), ("take", token)

A follower answers ("done", value), ("refused", an ApiError's fields) or ("broken", traceback).
"""

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ....model.text.constrain import Constraint, DeadEndError, GrammarError, json_schema
from ...data.tokenizers import Tokenizer
from .errors import ApiError, invalid
from .prepare import grammar_of
from .request import ChatRequest

COMMAND = struct.Struct("<qc")
FORK, SLOW, KILL = b"f", b"s", b"k"
READY = b"r"
MAKING = 5  # seconds of processor time to make a grammar; real ones take milliseconds
FOLLOWING = 10, 0.01  # to follow it: for a text, and for each of its tokens
REAPED = 0.2  # seconds after which a child that has ended is seen
MEMORY = 256 * 2**20  # bytes that one may take beyond what the nursery has


def main() -> None:
    """Serves the server at standard input until it is gone, and takes all followers along."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, whose end is ours
        signal.signal(number, signal.SIG_IGN)
    server = socket.socket(fileno=os.dup(0))
    try:
        tokenizer = Connection(os.dup(0), writable=False).recv()
    except EOFError:
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # followers are to hold none of the server's sockets, which close with this process
    Constraint(json_schema(True), tokenizer)  # makes the vocabulary that all followers share
    server.send(READY)
    children: dict[int, int] = {}
    while True:
        _reap(children)
        if children and not select.select([server], [], [], REAPED)[0]:
            continue
        message, sockets, _, _ = socket.recv_fds(server, COMMAND.size, 1)
        if not message:
            break
        number, command = COMMAND.unpack(message)
        if command == FORK:
            with contextlib.suppress(OSError):  # no more processes: the server sees the socket closed
                child = os.fork()
                if not child:
                    server.close()
                    _follow_and_exit(Connection(sockets[0]), tokenizer)
                children[number] = child
            os.close(sockets[0])
        elif number in children:
            if command == SLOW:
                os.setpriority(os.PRIO_PROCESS, children[number], 19)
            else:
                os.kill(children[number], signal.SIGKILL)
    for child in list(children.values()):
        os.kill(child, signal.SIGKILL)


def _reap(children: dict[int, int]) -> None:
    """Forgets the children that have ended; their process ids may be others' from then on.

    Here alone: as the handler of a signal it would change the table under whoever looks at it, itself included.
    """
    for number, child in list(children.items()):
        if os.waitpid(child, os.WNOHANG)[0]:
            del children[number]


def _follow_and_exit(connection: Connection, tokenizer: Tokenizer) -> None:
    try:
        _limit(connection)
        _follow(connection, tokenizer)
    finally:
        os._exit(0)  # with the connection's end: what the nursery has open or is to do at its end is none of ours


def _limit(connection: Connection) -> None:
    os.dup2(0, 2)  # libraries that break say so at length
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def _allow(seconds: float) -> None:
    """Processor time that may be taken from now on; then SIGXCPU ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _follow(connection: Connection, tokenizer: Tokenizer) -> None:
    _allow(MAKING)
    asked, tokens = connection.recv()
    follower = Follower()
    connection.send(_answer(follower.make, asked, tokens, tokenizer))
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answer(getattr(follower, name), *arguments))


def _answer(do: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    try:
        return "done", do(*arguments)
    except ApiError as error:
        return "refused", vars(error)
    except MemoryError:
        raise
    except Exception:
        return "broken", traceback.format_exc()


class Follower:
    """One request's grammar, and the text that follows it at the moment."""

    def make(self, asked: ChatRequest, tokens: int, tokenizer: Tokenizer) -> None:
        """Raises ApiError if there is no such grammar, or no answer that is so short."""
        self.param = asked.held_by
        try:
            grammar = grammar_of(asked)
            assert grammar is not None
            self.constraint = Constraint(grammar.after_thinking() if asked.thinking else grammar, tokenizer)
        except GrammarError as error:
            raise invalid(self.param, str(error), "unsupported_schema") from None
        try:
            self.constraint.walk(tokens)
        except GrammarError as error:
            raise invalid("max_tokens", str(error)) from None

    def walk(self, tokens: int) -> None:
        base, each = FOLLOWING
        _allow(base + each * tokens)
        self.text = self.constraint.walk(tokens)
        self.words = np.zeros((1, -(-self.constraint.vocabulary.size // 32)), np.int32)

    def fill(self) -> bytes:
        """The tokens that may come next, a bit each."""
        self._going(self.text.fill, self.words, 0)
        return self.words.tobytes()

    def take(self, token: int) -> tuple[int, bool]:
        """The token that is written, and whether it is the last."""
        return self._going(self.text.take, token), self.text.complete

    def back(self) -> None:
        self.text.back()

    def _going(self, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except DeadEndError as error:
            raise invalid(self.param, str(error), "unsupported_schema") from None


if __name__ == "__main__":
    main()
