"""metrics.jsonl: one JSON object per optimizer step, from which every curve is drawn.

step, tokens, seconds                 so far; steps count from 1
loss, lm, mtp, balance, index         the weighted total and its raw parts, in nats
lr, grad_norm                         grad_norm before clipping
load_max, load_cv      [moe layers]   busiest expert's load over the mean load; standard deviation over mean
spread                 [layers]       relative distance of the residual streams from one another
captured               [csa layers]   share of attention mass on compressed entries that the indexer's picks hold
tokens_per_second, peak_memory_gib    of this step; of the process so far (on CUDA: by the device's clock; of the
                                      device's allocator)
grad_by, update_by, sinkhorn, gain, recall, gate, collisions      of mechanisms, every `train.observe_every` steps:
                                      see `observe.py`
stage, attention, rows, length        of the step, in runs with stages or a batch that grows
went_back                             spikes of the loss that led back to the step before this one (`stability.py`)
anticipatory, anticipation_seconds    1, and the time it took, where experts are chosen by earlier weights
held_out, trigram, clean              bits per byte, only on steps that evaluated; `clean` of the bytes alone that no
                                      training document has in a match of 32 or more, and not there if none is such
                                      (`train/data/overlap.py`); other sources have other scores
"""

import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ...model.disk import naming, write_text

FILE = "metrics.jsonl"
OF_ALL = ("tokens", "seconds", "tokens_per_second", "peak_memory_gib")
OF_SOME = ("loss", "lm", "mtp", "balance", "index", "lr", "grad_norm", "held_out", "trigram", "clean")
OF_LAYERS = ("load_max", "load_cv", "spread", "captured", "sinkhorn", "gain", "recall", "gate", "collisions")
KINDS: dict[str, type] = dict.fromkeys(OF_ALL + OF_SOME, float)
KINDS |= dict.fromkeys(OF_LAYERS, list) | dict.fromkeys(("grad_by", "update_by"), dict)


def model_record(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own measurements: "load" fractions [layers, E] become `load_max` and `load_cv` [layers]."""
    record = {name: values.float() for name, values in metrics.items() if name != "load"}
    load = metrics.get("load")
    if load is not None and load.numel():
        share = load.float() * load.shape[-1]
        record |= {"load_max": share.amax(-1), "load_cv": share.std(-1, unbiased=False)}
    return record


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory so far: CUDA's allocator, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsFile:
    """Appends records to `folder`/metrics.jsonl, each flushed at once.

    A resumed run keeps the lines up to `step` (taken from `source`, by default the same folder) and drops what follows,
    a half-written last line included; it warns of lines that are missing.

    Raises:
        ValueError: a line up to `step` is broken.
    """

    def __init__(self, folder: Path, step: int = 0, source: Path | None = None):
        self.path = folder / FILE
        kept = up_to(source or folder, step)
        if len(kept) < step:
            warnings.warn(f"{str((source or folder) / FILE)!r} has {len(kept)} of {step} steps so far", stacklevel=2)
        write_text(self.path, "".join(map(_line, kept)))
        self.folder = os.stat(folder)
        self.file = self._open()

    def _open(self) -> TextIO:
        return open(self.path, "a", encoding="utf-8")  # stays open as long as the run

    def _follow(self) -> None:
        """Goes on in the file that has come into this one's place: an editor's, or none."""
        with suppress(FileNotFoundError):  # the folder, too: that is the run's affair
            if not os.path.samestat(os.stat(self.path.parent), self.folder):
                return
            if self.path.exists() and os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
            warnings.warn(f"{str(self.path)!r} was replaced or removed: lines are added to what is there", stacklevel=3)
            self.file.close()
            self.file = self._open()

    def write(self, record: dict[str, Any]) -> None:
        with naming(self.path):
            self._follow()
            self.file.write(_line(record))
            self.file.flush()

    def sync(self) -> None:
        """Onto the disk, before a checkpoint that counts on these lines."""
        with naming(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        with naming(self.path):
            self.file.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """All complete records of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is no record.
    """
    return list(_records(folder))


def up_to(folder: Path, step: int) -> list[dict[str, Any]]:
    """Records up to that step; what follows is not looked at. Raises ValueError where one is broken."""
    kept: list[dict[str, Any]] = []
    for record in _records(folder) if step and (folder / FILE).is_file() else ():
        if record["step"] <= step:
            kept.append(record)
        if record["step"] >= step:
            break
    return kept


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {FILE}; give the folder of a training run")
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line, parse_constant=_no_number)
            good = type(record["step"]) is int and all(_is(kind, record.get(name)) for name, kind in KINDS.items())
        except (ValueError, TypeError, LookupError, RecursionError):
            good = False
        if not good:
            raise ValueError(f"{str(path)!r}: line {number} is no record of a step: remove it to go on without")
        yield record


def _no_number(name: str) -> float:
    raise ValueError(name)


def _is(kind: type, value: Any) -> bool:
    """Whether a value is a number or not there, or else a list or a dict of such."""
    if kind is float:
        return value is None or type(value) in (int, float)
    parts = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, kind) and all(_is(float, part) for part in parts))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
