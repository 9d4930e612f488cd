"""Checkpoints: safetensors and JSON, no pickle; complete or not there at all.

    DIR/checkpoints/step-000200/model.safetensors       the model's state_dict
                                optimizer.safetensors   NAME.exp_avg, NAME.exp_avg_sq, NAME.step of every parameter;
                                                        NAME.updates for step where rows have their own (`RowAdam`)
                                random.safetensors      states of the random generators
                                checkpoint.json         step, recipe, tokens and seconds so far

A checkpoint is written to a hidden folder, flushed to the disk, and renamed: a run that is killed at any moment leaves
whole checkpoints only, and what was left half-written is swept up by the next save. Tables that are kept apart from the
weights are in it like any other tensor, whole, wherever the run had them: nothing is ever written into a checkpoint's
files again, and a run that resumes makes its own copy of them.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.tables import RowTable
from .optim import Optimizers
from .recipe import Recipe
from .tables import named_tables

FOLDER = "checkpoints"
STATE = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps done, tokens read, seconds of training."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    recipe: Recipe,
    progress: Progress,
    keep: int,
) -> Path:
    """Writes checkpoint `progress.step` of the run in folder `run`, then removes all but the newest `keep`."""
    parent = run / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".writing-*"):
        shutil.rmtree(leftover)
    folder, writing = parent / f"step-{progress.step:06d}", parent / f".writing-{progress.step:06d}"
    if folder.exists():
        return folder
    writing.mkdir()
    state = {"recipe": recipe.to_dict(), "progress": asdict(progress), "torch": torch.__version__}
    _write(writing / "model.safetensors", lambda path: save_file(_contiguous(model.state_dict()), path))
    _write(writing / "optimizer.safetensors", lambda path: save_file(_optimizer_tensors(model, optimizer), path))
    _write(writing / "random.safetensors", lambda path: save_file(_random_states(), path))
    _write(writing / STATE, lambda path: path.write_text(json.dumps(state, indent=1) + "\n"))
    _flush(writing)
    os.rename(writing, folder)
    _flush(parent)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def find(path: Path | str) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run in that folder. Raises FileNotFoundError."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} is no checkpoint (a folder with {STATE}) and no run with {FOLDER}/step-* in it"
        )
    return found[-1]


def read_state(folder: Path) -> tuple[Recipe, Progress]:
    """The recipe and the progress of a checkpoint."""
    state = json.loads((folder / STATE).read_text())
    return Recipe.from_dict(state["recipe"]), Progress(**state["progress"])


def load_model(folder: Path, model: nn.Module) -> None:
    """Copies a checkpoint's weights and buffers into `model`. Raises RuntimeError naming what does not fit."""
    model.load_state_dict(load_file(folder / "model.safetensors"))


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> None:
    """Puts model, optimizer and random generators back to where they were.

    Raises:
        RuntimeError: they do not fit.
        ValueError: the Engram tables were updated by another `optim.engram_rows`.
    """
    load_model(folder, model)
    tensors = load_file(folder / "optimizer.safetensors")
    parameters, tables = dict(model.named_parameters()), named_tables(model)
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        if name in tables or moment == "updates":
            _restore_column(folder, name, moment, tensor, tables)
            continue
        if name not in parameters:
            raise RuntimeError(f"{folder / 'optimizer.safetensors'}: {key!r} belongs to no parameter of the model")
        parameter = parameters[name]
        # AdamW counts its steps in float32 on the parameter's device; moments have the parameter's dtype
        optimizer.state[parameter][moment] = tensor.to(parameter.device)
    states = load_file(folder / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> dict[str, Tensor]:
    tensors = {
        f"{name}.{moment}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }
    for name, table in named_tables(model).items():
        table.wait()
        tensors |= {f"{name}.{column}": tensor for column, tensor in table.store.items() if column != "weight"}
    return tensors


def _restore_column(folder: Path, name: str, column: str, tensor: Tensor, tables: Mapping[str, RowTable]) -> None:
    if name not in tables or column not in tables[name].store:
        rule = "touched" if column == "updates" else "all"
        raise ValueError(f"{str(folder)!r}: {name} was trained with optim.engram_rows={rule!r}: go on with that")
    tables[name].store[column].copy_(tensor)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _contiguous(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    write(path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
