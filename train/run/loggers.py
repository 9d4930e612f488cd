"""metrics.jsonl's lines to other programs as they are written, for those who watch their runs there (`train.log`).

    tensorboard    event files in DIR/tensorboard
    trackio        its database on this machine (TRACKIO_DIR), or wherever it is told to write; project "abyssal"
    wandb          DIR/wandb, and its server; WANDB_MODE=offline needs no account; project "abyssal"

{"lm": 2.1, "load_max": [1.2, 1.4], "grad_by": {"attn": 0.3}}   ->   lm, load_max/0, load_max/1, grad_by/attn

A run has the name of its folder there, and a resumed one goes on where it was.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ..recipe import Recipe
from . import provenance
from .metrics import FILE

PROJECT = "abyssal"


class Logger(Protocol):
    """What takes the numbers of a run, step by step."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """A resumed run hides what was written after `step`."""

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A resumed run is the latest of its name."""

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        import trackio

        name, resume, quiet = folder.resolve().name, "allow" if step else "never", {"embed": False}
        quiet |= {"auto_log_gpu": False, "auto_log_cpu": False}
        self.run = trackio.init(PROJECT, name, config=recipe.to_dict(), resume=resume, **quiet)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class WandB:
    """A run is known by its folder's name and the time of its first start."""

    def __init__(self, folder: Path, recipe: Recipe, step: int) -> None:
        import wandb

        name = folder.resolve().name
        identity = hashlib.sha256(f"{name} {provenance.starts(folder)[0]['time']}".encode()).hexdigest()[:16]
        where = {"project": PROJECT, "name": name, "id": identity, "resume": "allow", "dir": str(folder)}
        self.run = wandb.init(**where, config=recipe.to_dict(), settings=wandb.Settings(console="off"))
        self.run.define_metric("*", step_metric="step")  # its own steps only grow: a run may be resumed further back

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, Callable[[Path, Recipe, int], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


class Loggers:
    """Those that a recipe asks for. One that fails while the run goes on is given up, aloud.

    Raises:
        ModuleNotFoundError: a library is not installed.
        ValueError: it is, and cannot begin: an account is missing, say.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int = 0) -> None:
        self.open: dict[str, Logger] = {}
        for name in recipe.train.log:
            try:
                self.open[name] = LOGGERS[name](folder, recipe, step)
            except ModuleNotFoundError as error:
                needed = f"train.log={list(recipe.train.log)}: {error.name} is not installed"
                raise ModuleNotFoundError(f"{needed} (pip install 'abyssal[{name}]')", name=error.name) from error
            except Exception as error:
                raise ValueError(f"train.log: {name} cannot begin: {' '.join(str(error).split())}") from error

    def write(self, record: dict[str, Any]) -> None:
        numbers = dict(scalars(record))
        for name in [*self.open]:
            self._try(name, lambda logger: logger.write(record["step"], numbers))

    def close(self) -> None:
        for name in [*self.open]:
            self._try(name, lambda logger: logger.close())

    def _try(self, name: str, do: Callable[[Logger], None]) -> None:
        """A run does not end for a copy of its metrics."""
        try:
            do(self.open[name])
        except Exception as error:
            del self.open[name]
            warnings.warn(f"nothing more is written for {name}: {error}; {FILE} has it all", stacklevel=3)


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a record but its step, under its own tag; what is missing (None) or no number is left out."""
    for name, value in record.items():
        if name == "step":
            continue
        for suffix, number in _parts(value):
            if isinstance(number, int | float):
                yield f"{name}{suffix}", float(number)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"/{key}", part) for key, part in value.items()]
    if isinstance(value, list):
        return [(f"/{index}", part) for index, part in enumerate(value)]
    return [("", value)]
