"""Putting a folder into its place: at any moment it is the old one or the new one, whole, however its writer ends.

    PARENT/NAME                       what is read
          /.NAME.writing-XXXXXXXX/    what a save has beside it, hidden; locked by the writer, released by its death
              new/                    filled and flushed to the disk, then exchanged with NAME in one step (renameat2)
              old/                    NAME, on a file system that has no such step, between two renames

A save first removes what dead writers left. Where one died between its two renames, the next load or save puts its
`old` back. Of two that save to one place at once, the later one's folder stays.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk import flush, left_beside, open_beside

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_C = ctypes.CDLL(None, use_errno=True)


@contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends, if it ends without an error.

    Raises:
        OSError: the place cannot be written. Nothing has changed then, and nothing is left behind.
    """
    folder = Path(os.path.realpath(folder))
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{str(there)!r} is no folder")
        if folder.is_mount() or Path.cwd().is_relative_to(folder):
            raise OSError(errno.EBUSY, "A mounted disk, or a working directory, is not replaced: choose a folder in it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        beside, held = open_beside(folder)
        try:
            (beside / "new").mkdir()
            yield beside / "new"
            if folder.is_dir():
                shutil.copymode(folder, beside / "new")
            flush(beside / "new")
            _exchange(beside / "new", folder, beside / "old")
            flush(folder.parent)
        finally:
            _clear(beside, held, folder)
    except BaseException as error:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, f"{error.strerror} (nothing was changed)", str(folder)) from error
        raise


def tidy(folder: Path) -> None:
    """Removes what dead writers left beside a folder; where it is missing, it is what one of them had moved away."""
    for beside, held in left_beside(folder):
        with suppress(OSError):
            _clear(beside, held, folder)


def link(source: str | Path, target: str | Path) -> None:
    """A further link to a file, or a copy of it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _clear(beside: Path, held: int, folder: Path) -> None:
    if (beside / "old").is_dir() and not folder.exists():
        os.rename(beside / "old", folder)
    shutil.rmtree(beside, ignore_errors=True)
    os.close(held)


def _exchange(new: Path, folder: Path, old: Path) -> None:
    try:
        os.rename(new, folder)  # nothing is there, or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _swap(new, folder):
            os.rename(folder, old)
            os.rename(new, folder)


def _swap(one: Path, other: Path) -> bool:
    """Whether the file system exchanges two folders in one step, done."""
    if not hasattr(_C, "renameat2"):
        return False
    if not _C.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))
