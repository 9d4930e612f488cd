"""Our own contenders: eager, Triton where it can run, and both of another commit where one was asked for."""

import importlib.util
from collections.abc import Callable
from types import ModuleType

from .... import kernels
from .task import Contender, Run, Setting

BASE = "base "  # before the name of another commit's contender
Make = Callable[[ModuleType, str], Run]


def ours(setting: Setting, make: Make, *ops: str) -> list[Contender]:
    """`make(kernels, backend)` gives the run; `ops` are the folders of kernels/ that it calls."""
    found = _backends(setting, kernels, make, ops, "")
    return found + (_backends(setting, setting.base, make, ops, BASE) if setting.base else [])


def is_ours(name: str) -> bool:
    return name.removeprefix(BASE) in ("eager", "triton")


def _backends(setting: Setting, package: ModuleType, make: Make, ops: tuple[str, ...], prefix: str) -> list[Contender]:
    missing = [op for op in ops if not (_has(package, op, "eager") or _has(package, op, "reference"))]
    if missing:
        return [Contender(f"{prefix}eager", None, f"that commit has no {missing[0]}")]
    eager = "eager" if _has(package, ops[0], "eager") else "reference"  # what commits called it before
    without = [op for op in ops if not _has(package, op, "triton")]
    why_not = "" if setting.device.type == "cuda" else "needs a CUDA device"
    if without:
        why_not = f"{without[0]} has no Triton kernel"
    if not importlib.util.find_spec("triton"):
        why_not = "triton is not installed"
    return [
        Contender(f"{prefix}eager", make(package, eager)),
        Contender(f"{prefix}triton", make(package, "triton"), why_not),
    ]


def _has(package: ModuleType, op: str, backend: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package.__name__}.{op}.{backend}") is not None
    except ModuleNotFoundError:
        return False
