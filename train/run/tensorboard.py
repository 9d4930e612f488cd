"""metrics.jsonl's lines to TensorBoard as they are written, for those who watch their runs there (`train.tensorboard`).

{"lm": 2.1, "load_max": [1.2, 1.4], "grad_by": {"attn": 0.3}}   ->   lm, load_max/0, load_max/1, grad_by/attn
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .metrics import FILE

FOLDER = "tensorboard"
EVERYWHERE = ("step",)


class TensorBoard:
    """Event files in `folder`/tensorboard; a resumed run hides what was written after `step`.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("train.tensorboard: pip install tensorboard", name="tensorboard") from error
        self.writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        for tag, value in scalars(record):
            self._try("add_scalar", tag, value, record["step"])

    def close(self) -> None:
        self._try("close")

    def _try(self, method: str, *arguments: Any) -> None:
        """A run does not end for a copy of its metrics: what cannot be written is given up, aloud."""
        try:
            if self.writer is not None:
                getattr(self.writer, method)(*arguments)
        except OSError as error:
            self.writer = None
            warnings.warn(f"nothing more is written for TensorBoard: {error}; {FILE} has it all", stacklevel=2)


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a record under its own tag; what is missing (None) or no number is left out."""
    for name, value in record.items():
        if name in EVERYWHERE:
            continue
        parts = _parts(value)
        for suffix, number in parts:
            if isinstance(number, int | float):
                yield f"{name}{suffix}", float(number)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"/{key}", part) for key, part in value.items()]
    if isinstance(value, list):
        return [(f"/{index}", part) for index, part in enumerate(value)]
    return [("", value)]
