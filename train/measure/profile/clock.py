"""Time by phase and mechanism: what passes between two changes belongs to the mechanism that was at work.

On a GPU the changes are events in its stream, so that a mechanism's time is the stream's, waiting for work included.
"""

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from .observe import Observer

Times = dict[tuple[str, str], float]  # milliseconds by phase and mechanism


class Clock(Observer):
    """Milliseconds of each phase and mechanism between the first phase and `phase(None)`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._now: Callable[[], Any] = self._event if device.type == "cuda" else time.perf_counter
        self.marks: list[tuple[tuple[str, str] | None, Any]] = []

    def changed(self) -> None:
        self.marks.append(((self.at, self.current) if self.at else None, self._now()))

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def times(self) -> Times:
        """What was measured since the last call."""
        marks, self.marks, found = self.marks, [], Counter[tuple[str, str]]()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (what, begin), (_, end) in pairwise(marks):
            if what:
                found[what] += begin.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - begin)
        return dict(found)


def typical(runs: list[Times]) -> Times:
    """The mean of the faster half of the runs, which others disturbed least. Means add up, as medians would not."""
    runs = sorted(runs, key=lambda times: sum(times.values()))[: (len(runs) + 1) // 2]
    keys = dict.fromkeys(key for times in runs for key in times)
    return {key: sum(times.get(key, 0.0) for times in runs) / len(runs) for key in keys}
