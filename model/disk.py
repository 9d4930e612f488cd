"""Files that are whole or not there, errors that name them, and locks that end with the process that holds them."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Size, Tensor

WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_NUMBER = re.compile(r"os error (\d+)")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system that name no file, as those of writing, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` once it is whole and on the disk; the later of two writers wins."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device, or a folder, which says so itself
        yield path
        return
    for left, dead in left_beside(path):
        _remove(left, dead)
    try:
        folder, held = open_beside(path)  # a folder: the libraries that write have leftovers of their own
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with naming(path):
            yield folder / path.name
            flush(folder / path.name)
            os.replace(folder / path.name, path)
    finally:
        _remove(folder, held)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with whole(path) as writing:
        writing.write_text(text, "utf-8")


def write_json(path: Path, values: Any) -> None:
    """Likewise, of JSON."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def open_beside(path: Path) -> tuple[Path, int]:
    """A new hidden folder beside `path`, and its lock, which ends with this process."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_hidden(path), dir=path.parent))
        with suppress(FileNotFoundError):  # another writer took it for a dead one's, before it was locked
            held = lock(folder)
            if held is not None:
                return folder, held


def left_beside(path: Path) -> Iterator[tuple[Path, int]]:
    """Such folders that processes left when they died, locked now by this one; without locks nobody knows which."""
    for folder in path.parent.glob(glob.escape(_hidden(path)) + "[a-z0-9_]" * 8):
        with suppress(OSError):
            held = lock(folder)
            if held is None:
                continue
            again = lock(folder)
            if again is None:
                yield folder, held
            else:
                os.close(again)
                os.close(held)


def _hidden(path: Path) -> str:
    """How their names begin, in at most 255 bytes with what follows."""
    return os.fsdecode(os.fsencode(f".{path.name}")[:230]) + ".writing-"


def _remove(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(held)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, readable by whom other new files are. Raises OSError, as every writer does."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})  # transformers asks for this
    except SafetensorError as error:
        raise os_error(error, path) from error
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        OSError: there is none, or none that may be read.
        ValueError: it is broken.
    """
    path.open("rb").close()  # of what cannot be read the library says that it is not there
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is cut off, or no safetensors file: {error}") from None


def tensor_shapes(path: Path) -> dict[str, Size]:
    """Names and shapes of a safetensors file's tensors. Raises as `read_tensors`."""
    path.open("rb").close()
    try:
        with safe_open(path, "pt") as file:
            return {name: Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is cut off, or no safetensors file: {error}") from None


def os_error(error: BaseException, path: Path | None = None) -> OSError:
    """The system's error that a library tells of in words, with its notes."""
    number, where = _NUMBER.search(str(error)), str(path) if path else None
    found = OSError(int(number[1]), os.strerror(int(number[1])), where) if number else OSError(str(error))
    for note in getattr(error, "__notes__", []):
        found.add_note(note)
    return found


def flush(path: Path) -> None:
    """Onto the disk: a file's contents, a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int | None:
    """A descriptor that locks a file or folder until it is closed, or the process ends; None where another does.

    A file is opened for writing, without which NFS locks none. Where the file system has no locks, a warning says so.
    Raises FileNotFoundError where `path` is not there, or no longer, and other OSErrors for links.
    """
    kind = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, kind | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            unlocked = f"{str(path)!r} cannot be locked here ({error.strerror})"
            warnings.warn(f"{unlocked}: let one process at a time write there", stacklevel=2)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
