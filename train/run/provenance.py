"""run.json: what made a run, so that it can be made again: recipe, data, source, versions, machine."""

import hashlib
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...model.disk import write_json
from ...model.folders import read_json
from ..data.source import Source, TextSource
from ..recipe import Recipe

FILE = "run.json"
PACKAGES = ("torch", "numpy", "safetensors", "einops", "triton")


def write(
    folder: Path,
    recipe: Recipe,
    data: Source,
    device: torch.device,
    parameters: int,
    step: int,
    processes: int = 1,
    changed: Sequence[str] = (),
) -> None:
    """Writes run.json, or adds this start, with what it has changed, to the `starts` of a resumed run's."""
    path = folder / FILE
    earlier = starts(folder) if path.is_file() else []
    start = {
        "step": step,
        "changed": list(changed),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "recipe": recipe.to_dict(),
        "parameters": parameters,
        "data": {"digest": data.digest, "contents": data.describe(), **_of_text(data)},
        "source": source(),
        "versions": versions(),
        "machine": machine(device),
        "processes": processes,
    }
    write_json(path, {"saved": False, **(read_json(path) if earlier else {}), "starts": [*earlier, start]})


def _of_text(data: Source) -> dict[str, float]:
    return {"bytes_per_token": data.bytes_per_token} if isinstance(data, TextSource) else {}


def bytes_per_token(folder: Path) -> float:
    """Of the run's text; 1 where nothing else is known."""
    if not (folder / FILE).is_file():
        return 1.0
    return float(starts(folder)[-1].get("data", {}).get("bytes_per_token", 1.0))


def mark_saved(folder: Path) -> None:
    """Says in run.json that the run has had a checkpoint: it never starts over then."""
    path = folder / FILE
    try:
        values = read_json(path)
        if not values.get("saved"):
            write_json(path, {**values, "saved": True})
    except (OSError, ValueError) as error:
        warnings.warn(f"run.json cannot say that there is a checkpoint: {error}", stacklevel=2)


def saved(folder: Path) -> bool | None:
    """Whether the run in that folder has ever had a checkpoint, one elsewhere that it began from included.

    None of runs of earlier versions, which did not say.
    """
    return starts(folder)[-1]["step"] > 0 or read_json(folder / FILE).get("saved")


def recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the latest start of the run in that folder, None if there is no run."""
    return starts(folder)[-1]["recipe"] if (folder / FILE).is_file() else None


def starts(folder: Path) -> list[dict[str, Any]]:
    """What was written at each start of the run in that folder. Raises ValueError where it is broken."""
    found = read_json(folder / FILE).get("starts")
    listed = isinstance(found, list) and all(isinstance(s, dict) and isinstance(s.get("recipe"), dict) for s in found)
    if not found or not listed:
        raise ValueError(f"{str(folder / FILE)!r} holds no list of the run's starts")
    return found


def source() -> dict[str, Any]:
    """A digest of the package's Python files, and the commit if they lie in a git checkout."""
    package = Path(__file__).resolve().parents[2]
    sha = hashlib.sha256()
    for folder in ("kernels", "model", "train"):
        for path in sorted((package / folder).rglob("*.py")):
            sha.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    commit = _git(package, "rev-parse", "HEAD")
    dirty = bool(_git(package, "status", "--porcelain", "--untracked-files=no")) if commit else None
    return {"digest": sha.hexdigest(), "commit": commit, "uncommitted_changes": dirty}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": str(device), "name": name, "system": platform.platform(), "threads": torch.get_num_threads()}


def _processor() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        told = None
    return told[1] if told else platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer, or None where the package does not lie in a checkout of its own or git is not there."""
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
