"""Which folder of weights a path means, what describes the model in it, and JSON objects in files.

    FOLDER/config.json  model.safetensors ...                       a model: transformers', DeepSeek's, or written here
    RUN/checkpoints/step-000200/config.json  checkpoint.json ...    a run of `abyssal train`: its newest checkpoint

Checkpoints are models too. Those of early versions have no config.json: their checkpoint.json holds the recipe's.
"""

import json
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from .fields import shown

CONFIG, STATE, CHECKPOINTS = "config.json", "checkpoint.json", "checkpoints"
STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,})")
T = TypeVar("T")


def model_folder(path: str | Path) -> Path:
    """The folder of weights that a path means: itself, or the newest checkpoint of the run in it.

    Raises:
        FileNotFoundError: neither; the message says what was looked for.
    """
    path = Path(path)
    if (path / CONFIG).is_file() or (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} is no checkpoint and no model (it has no {CONFIG}), and no run (it has no"
            f" {CHECKPOINTS}/step-*)"
        )
    return found[-1]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((path for path in named(run, STEP) if (path / STATE).is_file()), key=step_of)


def named(run: Path, name: re.Pattern[str]) -> list[Path]:
    """Folders beside the checkpoints whose whole names are like that."""
    parent = run / CHECKPOINTS
    found = list(parent.iterdir()) if parent.is_dir() else []
    return [path for path in found if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def step_of(folder: Path) -> int:
    """The step of the checkpoint in that folder, from its name."""
    return int(folder.name.partition("-")[2])


def using(path: str | Path, function: Callable[[Path], T], locate: Callable[[str | Path], Path] = model_folder) -> T:
    """What the function makes of the folder that a path means; where a run has removed its newest meanwhile, there is
    another.
    """
    folder = locate(path)
    try:
        return function(folder)
    except (OSError, ValueError, RuntimeError):
        if folder.exists() or folder == Path(path):
            raise
        return using(path, function, locate)


def described_in(folder: Path) -> Path:
    """The file that describes the model in a folder of weights. Raises FileNotFoundError where there is none."""
    for name in (CONFIG, STATE):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {CONFIG}")


def description(folder: Path) -> dict[str, Any]:
    """The keys of a folder's config.json, or of an early checkpoint's. Raises ValueError where there are none."""
    path = described_in(folder)
    values = read_json(path)
    if path.name == CONFIG:
        return values
    try:
        recipe, step = values["recipe"], values["progress"]["step"]
        return {**recipe["model"], "attention_stage": _stage(recipe.get("stages", []), step)}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} holds no recipe of a model: it is no checkpoint's, or not whole") from None


def _stage(stages: list[dict[str, Any]], step: int) -> str:
    """What CSA layers read in the last of so many steps."""
    ends = accumulate(stage["steps"] for stage in stages)
    reads = [stage.get("attention", "sparse") for stage in stages]
    return next((read for end, read in zip(ends, reads) if step <= end), reads[-1] if reads else "sparse")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming it, where there is something else, or a key twice."""
    return naming(path, lambda: json_object(Path(path).read_text("utf-8")))


def json_object(text: str) -> dict[str, Any]:
    """The object that a JSON text is. Raises ValueError where it is something else, or has a key twice."""
    try:
        found = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is cut off, or no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)} is no JSON object")
    return found


def naming(path: str | Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives. A TypeError or ValueError of it names the file too, in one line."""
    try:
        return function(*arguments)
    except RecursionError:
        raise ValueError(f"{path}: it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {' '.join(str(error).split())}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key)} is there twice")
        found[key] = value
    return found
