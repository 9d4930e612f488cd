"""A chrome trace with a range for every mechanism, and, on a GPU, how long kernels ran that each of them launched.

A kernel belongs to the innermost range around its launch. Autograd adds gradients up between two nodes: a kernel
launched there belongs to the node before.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function

from .observe import REST, Observer

PHASE = "phase: "
Times = dict[tuple[str, str], float]


class Ranges(Observer):
    """Marks every phase, every scope and every autograd node as a range of torch's profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Any] = []
        self.phase_range: Any = None

    def phase(self, name: str | None) -> None:
        if self.phase_range:
            self.phase_range.__exit__(None, None, None)
            self.phase_range = None
        super().phase(name)
        if name:
            self.phase_range = record_function(PHASE + name)
            self.phase_range.__enter__()

    def enter(self, mechanism: str) -> None:
        super().enter(mechanism)
        self._begin(self.current)

    def leave(self) -> None:
        self._end()
        super().leave()

    def watch(self, node: Any, mechanism: str) -> None:
        node.register_prehook(lambda _: self._begin(mechanism))
        node.register_hook(lambda *_: self._end())

    def _begin(self, mechanism: str) -> None:
        self.running.append(record_function(mechanism))
        self.running[-1].__enter__()

    def _end(self) -> None:
        self.running.pop().__exit__(None, None, None)


def record(steps: Callable[[], object], device: torch.device, path: Path) -> Times:
    """Runs `steps` under torch's profiler, writes the chrome trace and returns the kernels' milliseconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        steps()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))
    return kernel_times(json.loads(path.read_text(encoding="utf-8"))["traceEvents"]) if device.type == "cuda" else {}


class _Range(NamedTuple):
    begin: float
    end: float
    name: str


def kernel_times(events: list[dict[str, Any]]) -> Times:
    """Milliseconds of the GPU's work by the phase and mechanism that launched it, from a chrome trace's events.

    Autograd launches from a thread of its own, while the one that waits for it launches nothing.
    """
    phases: list[_Range] = []
    ranges: list[_Range] = []
    launched: dict[Any, float] = {}
    found = Counter[tuple[str, str]]()
    for e in events:
        kind, correlation = e.get("cat"), e.get("args", {}).get("correlation")
        if kind == "user_annotation":
            span = _Range(e["ts"], e["ts"] + e["dur"], e["name"])
            (phases if span.name.startswith(PHASE) else ranges).append(span)
        elif kind in ("cuda_runtime", "cuda_driver") and correlation is not None:
            launched[correlation] = e["ts"]
    starts, names = _flatten(sorted(ranges, key=lambda r: (r.begin, -r.end)))
    for e in events:
        at = launched.get(e.get("args", {}).get("correlation"))
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset") or at is None:
            continue
        phase = next((p for p in phases if p.begin <= at <= p.end), None)
        if phase:
            place = bisect_right(starts, at) - 1
            mechanism = names[place] if place >= 0 and starts[place] >= phase.begin else REST
            found[phase.name.removeprefix(PHASE), mechanism] += e["dur"] / 1e3
    return dict(found)


def _flatten(spans: list[_Range]) -> tuple[list[float], list[str]]:
    """From when on which range is the innermost; past the end of all it is still the last one's time."""
    starts: list[float] = []
    names: list[str] = []
    around: list[_Range] = []

    def close(until: float) -> None:
        while around and around[-1].end <= until:
            ended = around.pop()
            if around:
                starts.append(ended.end)
                names.append(around[-1].name)

    for span in spans:
        close(span.begin)
        around.append(span)
        starts.append(span.begin)
        names.append(span.name)
    close(float("inf"))
    return starts, names
