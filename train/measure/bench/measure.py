"""Correctness, time and memory of a task's contenders, in one process, on the same inputs.

A contender whose output or gradients differ from those of eager is reported as wrong and not timed. Contenders take
turns, each a forward without gradients and a training step (forward, then backward), so that what slows the machine
down for a while slows all of them down; the first turns are not counted. On a GPU, time is that between events, with
the caches overwritten before. The first call of all, which compiles, is told apart: it is neither time nor patience.
"""

import functools
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..roofline import Peak
from .task import Contender, NotHere, Run, Task

# relative error up to which a result is right: of outputs, and of gradients, where a clamp that rounding makes two
# implementations decide differently changes whole elements; fp32 results of tf32 products are wrong
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (3e-3, 2e-2), torch.bfloat16: (2e-2, 6e-2)}
SAME_SCORE = 1e-4  # of the mean score: picks whose scores differ by less are as good as each other
WORSE_PICKS = 1e-4  # share of picks with another score up to which a result is right
WARM_UP = {"cuda": 25, "cpu": 1}  # turns that are not counted, the first call among them, unless they are half of all
PATIENCE = 10.0  # seconds in all after which a contender takes no more turns, unless others are asked for
SLICE = 1 << 24  # values that are compared at once
STAGES = ("forward", "training forward", "backward", "forward + backward")
Say = Callable[[str], None]


class Error(NamedTuple):
    """Of one tensor: the norm of its difference over that of eager's result, and the same of largest elements."""

    tensor: str
    relative: float
    largest: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.relative <= self.allowed  # NaN is not


def measure(
    task: Task, dtype: torch.dtype, repeats: int, say: Say = print, patience: float = PATIENCE
) -> list[dict[str, Any]]:
    """A row for each contender: `status` is "ok", "wrong", "failed" or "not run", with a `note` that says why.

    `first_call` is the seconds of its first turn, compilation included, where it came to its end.

    Raises whatever eager raises.
    """
    rows: list[dict[str, Any]] = []
    wanted: dict[str, Tensor] = {}
    dout = _dout(task)
    for i, contender in enumerate(task.contenders):
        say(f"checking {contender.name}")
        try:
            row = _check(contender, task, dtype, dout, wanted)
        except Exception as error:  # a foreign library's: a row of the table, not the end of the run
            if i == 0:
                raise
            row = {"status": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}
            if isinstance(error, NotHere):
                row = {"status": "not run", "note": str(error)}
        rows.append({"contender": contender.name} | row)
    wanted.clear()
    stages = STAGES if task.learned else STAGES[:1]
    runs: dict[int, Any] = {i: task.contenders[i].run for i, row in enumerate(rows) if row["status"] == "ok"}
    for i, times in _turns(runs, task, dout, repeats, say, patience).items():
        rows[i]["turns"] = len(times)
        rows[i]["milliseconds"] = {
            stage: dict(zip(("min", "p20", "median", "p80"), np.percentile(column, (0, 20, 50, 80)).tolist()))
            for stage, column in zip(stages, zip(*times))
        }
        say(f"memory of {task.contenders[i].name}")
        rows[i]["memory"] = _memory(runs[i], task, dout)
    return rows


def _check(
    contender: Contender, task: Task, dtype: torch.dtype, dout: Tensor | None, wanted: dict[str, Tensor]
) -> dict[str, Any]:
    """The row's status, and the seconds of this first turn; an empty `wanted` is filled with the results."""
    note = _cannot(contender, task)
    if note or contender.run is None:
        return {"status": "not run", "note": note}
    began = time.perf_counter()
    _, outputs, gradients = _turn(contender.run, task, dout)
    seconds = time.perf_counter() - began
    got = dict(zip([*task.outputs, *(f"d{name}" for name in task.learned)], [*outputs, *gradients]))
    got |= {name: _scores_of_picks(got[name], score) for name, score in task.picks.items()}
    wanted |= {} if wanted else {name: x.cpu() for name, x in got.items()}
    errors = [_error(name, got[name], wanted[name], dtype, task) for name in wanted]
    del outputs, gradients, got
    errors += _errors_without_gradients(contender.run, task, dtype, wanted) if task.learned else []
    worst = max(errors, key=lambda e: (not e.right, e.relative / max(e.allowed, 1e-30)))
    row = {"status": "ok", "note": "", "first_call": seconds}
    row["error"] = worst._asdict() | {"largest": max(e.largest for e in errors)}
    if not worst.right:
        off = f"{worst.tensor} is off by {worst.relative:.1e}, allowed is {worst.allowed:.0e}"
        row |= {"status": "wrong", "note": off}
    return row


def _errors_without_gradients(run: Run, task: Task, dtype: torch.dtype, wanted: dict[str, Tensor]) -> list[Error]:
    """Of the outputs where nobody asks for gradients, which is timed as "forward" and may be another kernel."""
    with torch.no_grad():
        got = dict(zip(task.outputs, run(*_leaves(task))))
    got |= {name: _scores_of_picks(got[name], score) for name, score in task.picks.items() if name in got}
    found = [_error(name, x, wanted[name], dtype, task) for name, x in got.items()]
    return [error._replace(tensor=f"{error.tensor} without gradients") for error in found]


def _cannot(contender: Contender, task: Task) -> str:
    """Why it cannot run here, or nothing."""
    free = free_memory(next(iter(task.inputs.values())).device)
    if contender.scratch > 0.8 * free:
        return f"would need {contender.scratch / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free"
    return contender.why_not


def free_memory(device: torch.device | str) -> int:
    if torch.device(device).type == "cuda":
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


def _dout(task: Task) -> Tensor | None:
    """What gradients start from: 1 for a loss, else normal; None where nothing is learned."""
    if not task.learned:
        return None
    with torch.no_grad():
        out = task.contenders[0].run(*task.inputs.values())[0]  # type: ignore[misc]
    generator = torch.Generator(out.device).manual_seed(1)
    return torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator) if out.ndim else out * 0 + 1


def _error(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, task: Task) -> Error:
    """In slices, as whole differences of large tensors would not fit."""
    allowed = task.tolerance * TOLERANCE[dtype][0 if name in task.outputs else 1]
    if got.shape != want.shape:
        return Error(name, float("nan"), float("nan"), allowed)
    if name in task.picks:
        return Error(name, _worse_picks(got, want), 0.0, WORSE_PICKS)
    if name in task.exact:
        bits = torch.uint8 if got.itemsize == 1 else got.dtype
        share = (got.cpu().view(bits) != want.view(bits)).double().mean().item() if got.numel() else 0.0
        return Error(name, share, 0.0, 0.0)
    squares, largest = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for a, b in zip(got.reshape(-1).split(SLICE), want.reshape(-1).split(SLICE)):
        a, b = a.double(), b.to(a.device).double()
        squares += torch.stack([(a - b).square().sum(), b.square().sum()]).cpu()
        if b.numel():
            largest = torch.maximum(largest, torch.stack([(a - b).abs().max(), b.abs().max()]).float().cpu())
    (difference, norm), (apart, size) = squares.sqrt().tolist(), largest.tolist()
    return Error(name, difference / max(norm, 1e-30), apart / max(size, 1e-30), allowed)


def _scores_of_picks(picks: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Descending; -inf for no pick and NaN for an index that is listed twice."""
    picks = picks.sort(-1).values
    scores = score(picks.clamp_min(0)).float().masked_fill(picks < 0, -torch.inf)
    twice = (picks[..., 1:] == picks[..., :-1]) & (picks[..., 1:] >= 0)
    scores[..., 1:].masked_fill_(twice, torch.nan)
    return scores.sort(-1, descending=True).values.cpu()


def _worse_picks(got: Tensor, want: Tensor) -> float:
    """The share of picks with another score, beyond rounding."""
    if want.numel() == 0:
        return 0.0
    size = want[want.isfinite()].abs().mean().item() if want.isfinite().any() else 1.0
    same = (got == want) | ((got - want).abs() <= SAME_SCORE * size)
    return 1 - same.double().mean().item()


# time ----------------------------------------------------------------------------------------------------------------


def _turns(
    runs: dict[int, Any], task: Task, dout: Tensor | None, repeats: int, say: Say, patience: float
) -> dict[int, list[list[float]]]:
    """Milliseconds of `STAGES` for each turn of each contender that counts; each turn another one begins.

    The first turns, to warm up, count only for a contender whose time is up before it has made twice as many.
    """
    spent: dict[int, list[list[float]]] = {i: [] for i in runs}
    order, warm_up = list(runs), WARM_UP[next(iter(task.inputs.values())).device.type] - 1  # the check was one
    turns = repeats + warm_up
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        for i in order[turn % len(order) :] + order[: turn % len(order)]:
            if not spent[i] or sum(sum(times[:3]) for times in spent[i]) < 1e3 * patience:
                spent[i].append(_turn(runs[i], task, dout)[0])
    return {i: times[min(warm_up, len(times) // 2) :] for i, times in spent.items()}


def _turn(run: Run, task: Task, dout: Tensor | None) -> tuple[list[float], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Milliseconds of `STAGES`, outputs, and gradients of what is learned."""
    inputs = _leaves(task)
    device = inputs[0].device
    learned = [x for x in inputs if x.requires_grad]
    _overwrite_caches(device)
    with torch.no_grad():
        marks = [_mark(device)]
        outputs = run(*inputs)
        marks += [_mark(device)]
    if dout is None:
        return _milliseconds(marks), outputs, ()
    del outputs
    _overwrite_caches(device)
    marks += [_mark(device)]
    outputs = run(*inputs)
    marks += [_mark(device)]
    gradients = torch.autograd.grad(outputs[0], learned, dout)
    marks += [_mark(device)]
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


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few large products and copies, here and, once in a process, now."""
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


def _memory(run: Run, task: Task, dout: Tensor | None) -> dict[str, int]:
    """Bytes above inputs and dout: `kept` between forward and backward besides the outputs, and at the `peak` of a
    step, with its outputs and gradients. On CUDA the allocator's numbers; on a CPU those of all tensors that operators
    return, without what one operator needs within itself. Where nothing is learned, of the forward pass.
    """
    inputs = _leaves(task)
    learned = [x for x in inputs if x.requires_grad]
    device = inputs[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.set_grad_enabled(dout is not None):
            outputs = run(*inputs)
        kept = torch.cuda.memory_allocated(device) - before - _bytes(outputs)
        gradients = () if dout is None else torch.autograd.grad(outputs[0], learned, dout)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _LiveTensors([*inputs, *([] if dout is None else [dout])]) as live:
            with torch.set_grad_enabled(dout is not None):
                outputs = run(*inputs)
            kept = live.bytes - _bytes(outputs)
            gradients = () if dout is None else torch.autograd.grad(outputs[0], learned, dout)
        peak = live.peak
    del outputs, gradients
    return {"kept": kept if dout is not None else 0, "peak": peak}


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
