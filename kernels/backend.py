"""Which implementation an op runs: its definition, its PyTorch engine or its Triton engine."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from .watch import ToldEngine, is_watched
from .whole import whole

BACKENDS = ("auto", "reference", "eager", "triton")
OLDEST = (8, 0)  # compute capability: bf16 in tensor cores, asynchronous copies
log = logging.getLogger("abyssal.kernels")


def implementation(op: str, backend: str | None, tensor: Tensor) -> ModuleType:
    """The module that computes `op`: `kernels/<op>/reference.py`, `eager.py` or `triton/`.

    `reference` is the op as the paper writes it: every pair at once, slow and exact, for reading and for doubt. `auto`
    takes Triton for CUDA tensors where the op has such an engine, eager otherwise, also for float64, which Triton does
    not compute, and on GPUs before Ampere; it logs its choice once. `None` reads the environment variable
    `ABYSSAL_BACKEND` (default `auto`).

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: `triton` was asked for by name and cannot run here.
    """
    backend = backend or os.environ.get("ABYSSAL_BACKEND", "auto")
    compiling, is_double = torch.compiler.is_dynamo_compiling(), tensor.dtype == torch.float64
    engine = getattr(_Found, _find(op, backend, tensor.device.type, is_double, compiling))
    return ToldEngine(engine) if is_watched() else engine


class _Found:
    """The modules in use, as attributes: compiled code can look them up, but not import them."""


def _find(op: str, backend: str, device: str, is_double: bool, compiling: bool) -> str:
    chosen = _choose(op, backend, device, is_double)
    opaque = compiling and chosen == "eager"
    name = f"{op}_{chosen}_whole" if opaque else f"{op}_{chosen}"
    if not hasattr(_Found, name):
        module = importlib.import_module(f".{op}" if opaque else f".{op}.{chosen}", __package__)
        setattr(_Found, name, whole(module) if opaque else module)
    return name


# torch.compiler.assume_constant_result does just this, but its first use imports torch._dynamo and triton: two seconds
_find._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(op: str, backend: str, device: str, is_double: bool) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "triton":
        if not _has_triton(op):
            raise RuntimeError(f"backend='triton': {op} has no Triton kernel; use 'eager' or 'auto'")
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(f"backend='triton': {op} got a {device} tensor; Triton needs a CUDA device")
        if is_double:
            raise RuntimeError(f"backend='triton': {op} got a float64 tensor; use 'eager' or 'auto'")
        if old := _too_old(device):
            raise RuntimeError(f"backend='triton': {op} got a tensor on a GPU of {old}; use 'eager' or 'auto'")
    if backend != "auto":
        return backend
    old = _too_old(device)
    chosen = "triton" if device == "cuda" and not is_double and not old and _has_triton(op) else "eager"
    log.info("%s: %s on %s%s", op, chosen, device, f" of {old}" if old else "")
    return chosen


def _too_old(device: str) -> str:
    """What is wrong with the current GPU, nothing where Triton's kernels can run on it."""
    if device != "cuda" or (found := torch.cuda.get_device_capability()) >= OLDEST:
        return ""
    return "compute capability {}.{}, allowed is {}.{} or more".format(*found, *OLDEST)


def _has_triton(op: str) -> bool:
    names = f"{__package__}.{op}.triton", "triton"
    return all(importlib.util.find_spec(name) is not None for name in names)
