"""A profile from its options to its files: profile.json with every number, profile.png drawn from it, trace.json.

Turns without and with instrumentation alternate, so that what slows the machine down for a while slows both down. A
number is the mean over the faster half of the turns.
"""

import gc
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....model import Transformer
from ....model.disk import write_json
from ...run import folder as folders
from ...run import provenance
from ..bench.measure import measured_peak
from ..roofline import Peak, datasheet
from . import report, trace
from .clock import Clock, Times, typical
from .limits import decode_limits, document_lengths, training_limits
from .mechanisms import attached, owners
from .memory import Memory
from .observe import Observer
from .preset import Preset, check_fits, load_preset
from .steps import DecodeStep, TrainingStep, cycle, memory_of, to_decode

WARM = 2  # turns of either kind before one counts
DECODED = 32  # tokens for each turn asked for, if a cycle is not longer
BYTES = ("parameters", "gradients", "optimizer", "kept")


def run(
    name: str, *, device: str | None = None, repeats: int | None = None, out: Path | None = None, **cut: Any
) -> Path:
    """Profiles the preset `name` and writes the files; returns the JSON's path. `cut`: options of `load_preset`.

    Raises:
        ValueError: an option that is not allowed, or a preset that does not fit the device.
    """
    on = choose_device(device)
    preset = load_preset(name, on, **cut)
    repeats = (20 if on.type == "cuda" else 7) if repeats is None else repeats
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1")
    check_fits(preset, on)
    folder = out or folders.fresh(f"profile-{preset.name}")
    folder.mkdir(parents=True, exist_ok=True)
    result = describe(preset, on, repeats)
    print(report.heading(result), flush=True)
    peak = Peak(**result["peak"])
    result["training"], training_trace, model = profile_training(preset, on, repeats, peak, folder)
    print("\n" + report.training_table(result["training"]), flush=True)
    result["decode"], decode_trace = profile_decode(preset, model, on, repeats, peak, folder)
    print("\n" + report.decode_table(result["decode"]), flush=True)
    path = folder / "profile.json"
    write_json(path, result)
    print(f"\nnumbers  {path}\npicture  {_try_draw(path)}\ntraces   {training_trace}\n         {decode_trace}")
    return path


def choose_device(name: str | None) -> torch.device:
    """Raises ValueError for a device that is not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: allowed are cpu, cuda, cuda:0, ... (a step cannot run on another)")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch finds no CUDA device; allowed here is cpu")
    return torch.device(name)


def describe(preset: Preset, device: torch.device, repeats: int) -> dict[str, Any]:
    """The JSON document without its steps: what is profiled, where and when, and what the machine reaches."""
    machine = provenance.machine(device)
    peak = datasheet(machine["name"], preset.dtype) or measured_peak(device, getattr(torch, preset.dtype))
    return {
        "preset": preset.to_dict(),
        "repeats": repeats,
        "provenance": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "source": provenance.source(),
            "versions": provenance.versions(),
            "machine": machine,
        },
        "peak": peak._asdict(),
    }


def profile_training(
    preset: Preset, device: torch.device, repeats: int, peak: Peak, folder: Path
) -> tuple[dict[str, Any], Path, Transformer]:
    """One training step: its part of the JSON document, its trace's path, and the model that it trained."""
    say = _Progress("training step")
    say("model and batch")
    step = TrainingStep(preset, device, folder)
    plain, parts = _turns(step.run, partial(attached, step.model), 1, repeats, device, say)
    say("memory")
    memory = _memory(step, device)
    say("trace")
    path = folder / "trace.json"
    ranges = trace.Ranges()
    with attached(step.model, ranges):
        kernels = trace.record(lambda: step.run(ranges), device, path)
    documents, size = document_lengths(step.batch.documents), getattr(torch, preset.dtype).itemsize
    works = training_limits(preset.recipe.model, documents, size)
    rows = report.mechanism_rows("training", parts, works, peak)
    for name, row in rows.items():
        row |= dict.fromkeys(BYTES, 0) | memory["mechanisms"].get(name, {})
    if device.type == "cuda":
        report.add_kernels(rows, kernels)
    say("")
    return (
        {
            "rows": len(preset.phase.rows),
            "tokens": preset.phase.length,
            "text": preset.recipe.data.source if preset.reads_text else "random tokens",
            "documents": len(documents),
            "plain_ms": report.by_phase(plain),
            "parts_ms": report.by_phase(parts),
            "mechanisms": rows,
            "memory": memory["totals"],
        },
        path,
        step.model,
    )


def profile_decode(
    preset: Preset, model: Transformer, device: torch.device, repeats: int, peak: Peak, folder: Path
) -> tuple[dict[str, Any], Path]:
    """One decode step, on average over a cycle of the compressors: its part of the document, and its trace's path."""
    gc.collect()
    say = _Progress("decode step")
    say(f"reading {preset.decode_length:,} tokens")
    tokens = cycle(preset.recipe.model)
    turns = max(2, repeats * DECODED // tokens)
    model = to_decode(model, getattr(torch, preset.dtype))
    step = DecodeStep(preset, model, tokens * (2 * turns + 2 * WARM) + 1)
    path = step.path
    watch = partial(attached, step.model, in_numpy=path == "numpy")
    plain, parts = _turns(step.run, watch, tokens, turns, device, say)
    say("trace")
    trace_path = folder / "trace-decode.json"
    ranges = trace.Ranges()
    with watch(ranges):
        kernels = trace.record(lambda: step.run(ranges), device, trace_path)
    size = getattr(torch, preset.dtype).itemsize
    works = decode_limits(preset.recipe.model, preset.decode_batch, preset.decode_length, size)
    rows = report.mechanism_rows("decode", parts, works, peak)
    if device.type == "cuda":
        report.add_kernels(rows, kernels)
    say("")
    return {
        "rows": preset.decode_batch,
        "length": preset.decode_length,
        "path": "numpy (model/decode.py)" if path == "numpy" else "torch (the modules)",
        "averaged_over_tokens": tokens,
        "cache_bytes": step.cache.nbytes(),
        "plain_ms": report.by_phase(plain),
        "parts_ms": report.by_phase(parts),
        "mechanisms": rows,
    }, trace_path


def _turns(
    step: Callable[[Clock], Any],
    watch: Callable[[Observer], AbstractContextManager[None]],
    count: int,
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Times, Times]:
    """Milliseconds of a step without and with instrumentation; each turn is `count` steps, both kinds alternate."""
    clock, plain, parts = Clock(device), [], []

    def turn() -> Times:
        for _ in range(count):
            step(clock)
        return {key: ms / count for key, ms in clock.times().items()}

    for number in range(repeats + WARM):
        say(f"turn {number + 1 - WARM} of {repeats}" if number >= WARM else "warming up")
        plain.append(turn())
        with watch(clock):
            parts.append(turn())
    return typical(plain[WARM:]), typical(parts[WARM:])


def _memory(step: TrainingStep, device: torch.device) -> dict[str, Any]:
    """Bytes by mechanism and in all. The peak counts parameters and optimizer states, too."""
    owner = owners(step.model)
    mechanisms: dict[str, dict[str, int]] = step.bytes_by_owner(owner)
    known = [*step.model.parameters(), *step.model.buffers(), *vars(step.batch).values()]
    known += [x for states in step.optimizer.state.values() for x in states.values()]
    fixed = sum(row[kind] for row in mechanisms.values() for kind in ("parameters", "optimizer"))
    memory = Memory(known)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step.run(Observer())
    allocator = memory_of(device)
    with attached(step.model, memory), memory.counting():
        step.run(memory)
    for name, kept in memory.kept.items():
        mechanisms.setdefault(name, {})["kept"] = kept
    totals: dict[str, Any] = {kind: sum(row.get(kind, 0) for row in mechanisms.values()) for kind in BYTES}
    totals |= {"peak": allocator.get("peak", fixed + memory.peak), "peak_at": memory.peak_at}
    return {"mechanisms": mechanisms, "totals": totals | ({"allocator": allocator} if allocator else {})}


def _try_draw(path: Path) -> str:
    from .draw import draw

    try:
        return str(draw(path))
    except ModuleNotFoundError as error:
        return f"not drawn: {error.name} is not installed (pip install matplotlib)"


class _Progress:
    """What is going on: one line that changes on a terminal; elsewhere the step's name alone."""

    def __init__(self, title: str) -> None:
        self.title, self.live = title, sys.stderr.isatty()
        if not self.live:
            print(f"{title} ...", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{self.title}: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)
