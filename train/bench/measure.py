"""Correctness, time and memory of a task's contenders, in one process, on the same inputs.

A contender whose output or gradients differ from the reference's is reported as wrong and not timed. Contenders take
turns, each a forward without gradients and a training step (forward, then backward), so that what slows the machine
down for a while slows all of them down. On a GPU, time is that between events, with the caches overwritten before.
"""

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..roofline import Peak
from .task import Contender, Run, Task

# relative error up to which a result is right: of outputs, and of gradients, where a clamp that rounding makes two
# implementations decide differently changes whole elements; fp32 results of tf32 products are wrong
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (3e-3, 2e-2), torch.bfloat16: (2e-2, 6e-2)}
PATIENCE = 20.0  # seconds in all after which a contender takes no more turns
STAGES = ("forward", "training forward", "backward", "forward + backward")
Say = Callable[[str], None]


class Error(NamedTuple):
    """Of one tensor: the norm of its difference over the reference's norm, and the same of largest elements."""

    tensor: str
    relative: float
    largest: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.relative <= self.allowed  # NaN is not


def measure(task: Task, dtype: torch.dtype, repeats: int, say: Say = print) -> list[dict[str, Any]]:
    """A row for each contender: `status` is "ok", "wrong", "failed" or "not run", with a `note` that says why.

    Raises whatever the reference raises.
    """
    rows: list[dict[str, Any]] = []
    first: dict[int, list[float]] = {}
    wanted: dict[str, Tensor] = {}
    dout = _dout(task)
    for i, contender in enumerate(task.contenders):
        say(f"checking {contender.name}")
        try:
            row, first[i] = _check(contender, task, dtype, dout, wanted)
        except Exception as error:  # a foreign library's: a row of the table, not the end of the run
            if i == 0:
                raise
            row = {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}
        rows.append({"contender": contender.name} | row)
    wanted.clear()
    runs: dict[int, Any] = {i: task.contenders[i].run for i, row in enumerate(rows) if row["status"] == "ok"}
    for i, times in _turns(runs, first, task, dout, repeats, say).items():
        rows[i]["turns"] = len(times)
        rows[i]["milliseconds"] = {
            stage: {"min": min(column), "median": median(column)} for stage, column in zip(STAGES, zip(*times))
        }
        say(f"memory of {task.contenders[i].name}")
        rows[i]["memory"] = _memory(runs[i], task, dout)
    return rows


def _check(
    contender: Contender, task: Task, dtype: torch.dtype, dout: Tensor, wanted: dict[str, Tensor]
) -> tuple[dict[str, Any], list[float]]:
    """The row's status, and the times of this first turn; an empty `wanted` is filled with the results."""
    note = _cannot(contender, task)
    if note or contender.run is None:
        return {"status": "not run", "note": note}, []
    times, outputs, gradients = _turn(contender.run, task, dout)
    got = dict(zip([*task.outputs, *(f"d{name}" for name in task.learned)], [*outputs, *gradients]))
    wanted |= {} if wanted else got
    errors = [_error(name, got[name], wanted[name], dtype, name in task.outputs) for name in wanted]
    worst = max(errors, key=lambda e: (not e.right, e.relative / e.allowed))
    row = {"status": "ok", "note": "", "error": worst._asdict() | {"largest": max(e.largest for e in errors)}}
    if not worst.right:
        off = f"{worst.tensor} is off by {worst.relative:.1e}, allowed is {worst.allowed:.0e}"
        row |= {"status": "wrong", "note": off}
    return row, times


def _cannot(contender: Contender, task: Task) -> str:
    """Why it cannot run here, or nothing."""
    free = free_memory(next(iter(task.inputs.values())).device)
    if contender.scratch > 0.8 * free:
        return f"would need {contender.scratch / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free"
    return contender.why_not


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        return sys.maxsize


# correctness ---------------------------------------------------------------------------------------------------------


def _leaves(task: Task) -> list[Tensor]:
    """The inputs, fresh for autograd."""
    return [x.detach().requires_grad_(name in task.learned) for name, x in task.inputs.items()]


def _dout(task: Task) -> Tensor:
    with torch.no_grad():
        out = task.contenders[0].run(*task.inputs.values())[0]  # type: ignore[misc]
    generator = torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)


def _error(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, is_output: bool) -> Error:
    """In slices, as whole differences of large weights would not fit."""
    allowed = TOLERANCE[dtype][0 if is_output else 1]
    if got.shape != want.shape:
        return Error(name, float("nan"), float("nan"), allowed)
    squares, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for a, b in zip(got.split(4096), want.split(4096)):
        a, b = a.double(), b.double()
        squares += torch.stack([(a - b).square().sum(), b.square().sum()]).cpu()
        if b.numel():
            largest = torch.maximum(largest, torch.stack([(a - b).abs().max(), b.abs().max()]).float().cpu())
    (difference, norm), (apart, size) = squares.sqrt().tolist(), largest.tolist()
    return Error(name, difference / max(norm, 1e-30), apart / max(size, 1e-30), allowed)


# time ----------------------------------------------------------------------------------------------------------------


def _turns(
    runs: dict[int, Any], first: dict[int, list[float]], task: Task, dout: Tensor, repeats: int, say: Say
) -> dict[int, list[list[float]]]:
    """Milliseconds of `STAGES` for each turn of each contender; each turn another one begins.

    The first, cold turn counts only for a contender whose time it has used up.
    """
    spent = {i: [first[i]] for i in runs}
    order = list(runs)
    for turn in range(repeats):
        say(f"turn {turn + 1} of {repeats}")
        for i in order[turn % len(order) :] + order[: turn % len(order)]:
            if sum(forward + both for forward, *_, both in spent[i]) < 1e3 * PATIENCE:
                spent[i].append(_turn(runs[i], task, dout)[0])
    return {i: times[1:] or times for i, times in spent.items()}


def _turn(run: Run, task: Task, dout: Tensor) -> tuple[list[float], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Milliseconds of `STAGES`, outputs, and gradients of what is learned."""
    inputs = _leaves(task)
    learned = [x for x in inputs if x.requires_grad]
    _overwrite_caches(dout.device)
    with torch.no_grad():
        marks = [_mark(dout.device)]
        outputs = run(*inputs)
        marks += [_mark(dout.device)]
        del outputs
    _overwrite_caches(dout.device)
    marks += [_mark(dout.device)]
    outputs = run(*inputs)
    marks += [_mark(dout.device)]
    gradients = torch.autograd.grad(outputs[0], learned, dout)
    marks += [_mark(dout.device)]
    forward, _, training, backward = _milliseconds(marks)
    return [forward, training, backward, training + backward], tuple(t.detach() for t in outputs), gradients


def _overwrite_caches(device: torch.device) -> None:
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.uint8, device=device).zero_()


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _milliseconds(marks: list[Any]) -> list[float]:
    if isinstance(marks[0], float):
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few large products and copies, here and now."""
    size, length = (8192, 2**29) if device.type == "cuda" else (1536, 2**26)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: a @ b, device)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    return Peak(2e3 * size**3 / product, 2e3 * length / copy, "measured in this run: a large product, a copy")


def _best(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of the fastest of ten."""
    run()
    times = []
    for _ in range(10):
        marks = [_mark(device)]
        run()
        times += _milliseconds([*marks, _mark(device)])
    return min(times)


# memory --------------------------------------------------------------------------------------------------------------


def _memory(run: Run, task: Task, dout: Tensor) -> dict[str, int]:
    """Bytes above inputs and dout: `kept` between forward and backward besides the outputs, and at the `peak` of a
    step, with its outputs and gradients. On CUDA the allocator's numbers; on a CPU those of all tensors that operators
    return, without what one operator needs within itself.
    """
    inputs = _leaves(task)
    learned = [x for x in inputs if x.requires_grad]
    if dout.is_cuda:
        torch.cuda.synchronize(dout.device)
        torch.cuda.reset_peak_memory_stats(dout.device)
        before = torch.cuda.memory_allocated(dout.device)
        outputs = run(*inputs)
        kept = torch.cuda.memory_allocated(dout.device) - before - _bytes(outputs)
        gradients = torch.autograd.grad(outputs[0], learned, dout)
        peak = torch.cuda.max_memory_allocated(dout.device) - before
    else:
        with _LiveTensors([*inputs, dout]) as live:
            outputs = run(*inputs)
            kept = live.bytes - _bytes(outputs)
            gradients = torch.autograd.grad(outputs[0], learned, dout)
        peak = live.peak
    del outputs, gradients
    return {"kept": kept, "peak": peak}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages from the operator that returns them to their end; `known` ones are not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type != "meta":
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def end(_: Any) -> None:
            del self.seen[key]
            self.bytes -= size

        self.seen[key] = weakref.ref(storage, end)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
