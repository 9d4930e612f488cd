"""How a run ends early and whole: on Ctrl-C or SIGTERM it finishes the step at hand and saves a checkpoint.

the first signal     is noted, and answered in a line on stderr
the second           finds the handlers of before: Python's, which end the run where it is
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ANSWER = b"\nending after this step, with a checkpoint; once more ends it at once\n"


class Stopped(KeyboardInterrupt):
    """A run that has ended, with a checkpoint, because a signal asked for it."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


@contextmanager
def noted(listening: bool) -> Iterator[list[int]]:
    """The signals that have come while the block runs. Only a main thread can listen; who ignored one still does."""
    came: list[int] = []
    if not listening or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        restore()
        with suppress(OSError):
            os.write(2, ANSWER)  # print might stand in the midst of another print

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        restore()
