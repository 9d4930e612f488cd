"""The folder of a run: a name of its own, and one writer at a time.

DIR/.writer     says which process writes the run, and is locked by it; gone when the run has ended
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ...model.disk import lock, naming
from ..distributed.world import World

LOCK = ".writer"
RUNS = Path("runs")


class FolderLost(OSError):
    """The folder of a run was moved or removed while it was written: what lies there now is another's."""


def nothing_to_check() -> None:
    """For who holds no folder."""


def fresh(name: str) -> Path:
    """A new folder runs/NAME-DATE-TIME that no other process has got: -2, -3, ... follow within one second."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    RUNS.mkdir(exist_ok=True)
    numbers = count(2)
    folder = RUNS / stem
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        folder = RUNS / f"{stem}-{next(numbers)}"


@contextmanager
def written(out: Path | None, name: str, world: World) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder of a run, `out` or a fresh one: until the block ends, or the process, nobody else writes it.

    With it comes what raises FolderLost once the path no longer leads to that folder, to be called before writing.
    A folder that was made for a run of which nothing came is removed. The first process of `world` holds the lock.

    Raises:
        BlockingIOError: another process writes the run; the message names it.
        ValueError: a name that is no UTF-8, from which safetensors could not be read.
    """
    held, problem = None, None
    if world.first:
        try:
            held = _Held(out, name)
        except (OSError, ValueError) as error:
            problem = error
    problem = world.agree(problem)
    if problem:
        raise problem
    try:
        yield world.agree(held.folder if held else Path()), held.check if held else nothing_to_check
    finally:
        if held:
            held.release()


class _Held:
    """The lock of a folder, which is made where it is missing."""

    def __init__(self, out: Path | None, name: str) -> None:
        self.made = _missing(out or RUNS)
        self.folder = out or fresh(name)
        self.made[:0] = [] if out else [self.folder]
        try:
            os.path.realpath(self.folder).encode()
            with naming(self.folder):
                self.descriptor = self._lock()
        except UnicodeEncodeError:
            self._remove_made()
            raise ValueError(f"out={str(self.folder)!r}: allowed are names in UTF-8") from None
        except OSError:
            self._remove_made()
            raise

    def _lock(self) -> int:
        path = self.folder / LOCK
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch()
            with suppress(FileNotFoundError):  # its last writer ends in this very moment
                descriptor = lock(path)
                break
        if descriptor is None:
            writer = path.read_text("utf-8") or "another process"
            raise BlockingIOError(
                f"{str(self.folder)!r} is being written by {writer}: wait for its end, or choose another"
            )
        with suppress(OSError):  # it only serves others' messages
            path.write_text(f"process {os.getpid()} on {platform.node()}", "utf-8")
        return descriptor

    def check(self) -> None:
        with suppress(OSError):
            if os.path.samestat(os.fstat(self.descriptor), os.stat(self.folder / LOCK)):
                return
        raise FolderLost(f"{str(self.folder)!r} was moved or removed meanwhile: go on from where its checkpoints are")

    def release(self) -> None:
        with suppress(OSError):
            self.check()
            (self.folder / LOCK).unlink()
        os.close(self.descriptor)
        self._remove_made()

    def _remove_made(self) -> None:
        """Of the folders that were made those that are still empty."""
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made for this one to be there, from itself outwards."""
    return [part for part in (folder, *folder.parents) if not part.exists()]
