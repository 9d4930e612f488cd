"""Which implementation an op runs: its PyTorch reference or its Triton twin."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
log = logging.getLogger("abyssal.kernels")


def implementation(op: str, backend: str | None, tensor: Tensor) -> ModuleType:
    """The module that computes `op`: `kernels/<op>/reference.py` or `kernels/<op>/triton.py`.

    `auto` takes Triton for CUDA tensors where the op has a Triton twin, the reference otherwise, and logs its choice
    once. `None` reads the environment variable `ABYSSAL_BACKEND` (default `auto`).

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: `triton` was asked for by name and cannot run here.
    """
    backend = backend or os.environ.get("ABYSSAL_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    if backend == "reference":
        return _load(op, "reference")
    runs = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton":
        if not _has_triton(op):
            raise RuntimeError(f"backend='triton': {op} has no Triton kernel; use 'reference' or 'auto'")
        if not runs:
            raise RuntimeError(f"backend='triton': {op} got a {tensor.device.type} tensor; Triton needs a CUDA device")
        return _load(op, "triton")
    chosen = "triton" if tensor.is_cuda and _has_triton(op) else "reference"
    _announce(op, chosen, tensor.device.type)
    return _load(op, chosen)


@functools.cache
def _load(op: str, name: str) -> ModuleType:
    return importlib.import_module(f".{op}.{name}", __package__)


@functools.cache
def _has_triton(op: str) -> bool:
    return (
        importlib.util.find_spec(f"{__package__}.{op}.triton") is not None
        and importlib.util.find_spec("triton") is not None
    )


@functools.cache
def _announce(op: str, chosen: str, device: str) -> None:
    log.info("%s: %s on %s", op, chosen, device)
