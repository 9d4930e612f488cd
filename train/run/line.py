"""Lines of metrics whose numbers come from the device later: the host goes on with the next steps meanwhile.

    step s         a record with tensors     ->  one copy into pinned memory, an event; nothing waits
    step s + n     the event is long past    ->  the numbers are looked at, the line is written

On a CPU numbers are there at once, n = 0, and a line is written with its step.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Line:
    """A step's record, whose tensors are on their way to the host: [] becomes a number, others a list of six digits.

    `again()` makes the passes of the step once more, for those who ask why a number is not finite. A value that is a
    function is called once the step is over on the device.
    """

    def __init__(self, record: dict[str, Any], again: Callable[[], Any] | None = None) -> None:
        self.record, self.again = record, again
        found = {name: value.detach() for name, value in record.items() if isinstance(value, Tensor)}
        self._sizes = {name: -1 if x.ndim == 0 else x.numel() for name, x in found.items()}
        self._numbers, self._there = on_their_way([x.flatten() for x in found.values()])

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The single numbers of the tensors, once they are there; the record has all of them then."""
        if self._there is not None:
            self._there.synchronize()
        numbers, single = iter(self._numbers.tolist()), {}
        for name, size in self._sizes.items():
            if size < 0:
                single[name] = next(numbers)
            else:
                self.record[name] = [_rounded(next(numbers)) for _ in range(size)]
        self.record |= single | {name: value() for name, value in self.record.items() if callable(value)}
        return single


class Lines:
    """Those of a run in the order of its steps; each is written when `behind` more have come, or all are asked for."""

    def __init__(self, write: Callable[[Line], None], behind: int) -> None:
        self.write, self.behind = write, behind
        self.waiting: deque[Line] = deque()

    def add(self, line: Line) -> None:
        self.waiting.append(line)
        self.flush(self.behind)

    def flush(self, behind: int = 0) -> None:
        """Writes all but the last `behind`."""
        while len(self.waiting) > behind:
            self.write(self.waiting.popleft())


class Stopwatch:
    """The seconds from its making to `stop`: on CUDA of the device, which the host runs ahead of."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self.ended = self._now()

    def stop(self) -> None:
        self.ended = self._now()

    def seconds(self) -> float:
        """Once the device has come to its end."""
        if self.device.type == "cuda":
            return self.began.elapsed_time(self.ended) / 1000
        return self.ended - self.began

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def on_their_way(parts: list[Tensor]) -> tuple[Tensor, Any]:
    """Rows of numbers, one behind the other, on the host; and the event after which they are there, if it is needed."""
    numbers = torch.cat(parts) if parts else torch.empty(0)
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    return host, there


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
