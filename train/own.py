"""Code of one's own, named in a recipe or a suite: "tasks/mine.py:Task", or "my_module:Task" for an importable module.

    data.source = "planted:mine.py:Task"     a planted task (`data.planted.Task`)
    train.prepare = "mine.py:swap"           a function that changes the model as soon as it is built

A recipe that you write or name on the command line is trusted, one that lies in a checkpoint is not: whoever made that
folder would choose which code runs here. Its references are refused until they are allowed (`allow`, --trust-code).
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

_allowed: set[Any] = set()
_ANY = object()


def allow(*references: str) -> None:
    """Lets the code of these references run in this process; without any, whatever code is named. What is no reference
    is passed over.
    """
    _allowed.update(map(absolute, filter(is_own, references)) if references else [_ANY])


def forget() -> None:
    """Nothing is allowed any more."""
    _allowed.clear()


def is_own(reference: str) -> bool:
    """Whether it has the form of a reference: FILE.py:NAME or MODULE:NAME."""
    return bool(reference.rpartition(":")[0])


def absolute(reference: str) -> str:
    """With the file's path from the root on, so that it means the same from everywhere; a module in the working
    directory is its file.
    """
    where, _, name = reference.rpartition(":")
    path = _file(where)
    return f"{path.resolve()}:{name}" if path else reference


def named(thing: Any) -> str:
    """The reference to a function or class at the top of a file. Raises ValueError for another one."""
    name, file = getattr(thing, "__qualname__", ""), inspect.getsourcefile(thing)
    if not name.isidentifier() or file is None:
        raise ValueError(f"{thing!r}: allowed are functions and classes at the top of a file")
    return f"{Path(file).resolve()}:{name}"


def load(reference: str) -> Any:
    """What a reference names.

    Raises:
        PermissionError: it was not allowed.
        ValueError: no reference, or nothing of that name.
        FileNotFoundError: no such file or module.
    """
    reference = absolute(reference)
    where, _, name = reference.rpartition(":")
    if not where:
        raise ValueError(f"{reference!r}: allowed are FILE.py:NAME and MODULE:NAME")
    if not _allowed & {reference, _ANY}:
        raise PermissionError(f"its recipe runs the code {reference}: allow that with --trust-code if it is yours")
    module = module_of(where)
    if not hasattr(module, name):
        raise ValueError(f"{reference!r}: {where} has no {name}")
    return getattr(module, name)


def module_of(where: str) -> Any:
    """The module in a file, or of a name. Raises FileNotFoundError where there is none."""
    path = _file(where)
    if path is None:
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name != where.partition(".")[0] and error.name != where:
                raise
            raise FileNotFoundError(f"{where!r}: no such file in {Path.cwd()}, and no module of that name") from None
    name = f"own_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def digest(reference: str) -> str:
    """Of the file that the code lies in, so that a change is noticed."""
    where = absolute(reference).rpartition(":")[0]
    file = _file(where) or Path(inspect.getsourcefile(module_of(where)) or "")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _file(where: str) -> Path | None:
    path = Path(os.path.expanduser(where))
    path = path if path.suffix == ".py" else path.with_name(f"{path.name}.py") if path.name else path
    return path if path.is_file() else None
