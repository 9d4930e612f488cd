"""Where text and records lie: what data.source means.

    stdlib                  Python's own source files
    a file                  .jsonl and .parquet hold records; any other file is text
    a folder, a glob        all files below, of both kinds; folders that `datasets.save_to_disk` wrote hold records
    hf:NAME, hf:NAME:CONFIG the split `train` of a data set of the Hugging Face hub

Names are relative to the folder, or to the part of a glob that is the same for all, so that a corpus that is moved is
the same one. Hidden files and what is no file are left out.
"""

import glob
import os
import sysconfig
from collections.abc import Collection, Iterable
from pathlib import Path

from .records import READERS, RecordFile, from_hub, from_saved

STDLIB, HUB = "stdlib", "hf:"
STDLIB_SKIPS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
STDLIB_SKIPS |= {"encodings"}  # generated tables, near copies of one another: a held-out one is known from its siblings
SOURCES = (
    f"'{STDLIB}', existing paths (files, folders, globs such as '~/notes/**/*.md'), {HUB}NAME and {HUB}NAME:CONFIG"
)


def locate(source: str, fields: Collection[str]) -> tuple[list[tuple[str, Path]], list[RecordFile]]:
    """Text files with their names, and what holds records, each in the order of names.

    Args:
        fields: of a table's columns, those that are read.

    Raises:
        FileNotFoundError: `source` is none of the above, or nothing is there.
        ValueError: a table has none of the columns.
        ModuleNotFoundError: a library that reads it is not installed.
    """
    if source.startswith(HUB):
        return [], [from_hub(source, source.removeprefix(HUB), fields)]
    path = Path(os.path.expanduser(source))
    if source == STDLIB:
        path = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in path.rglob("*.py") if not STDLIB_SKIPS & set(p.relative_to(path).parts[:-1])]
        return _named(path, found), []
    if path.is_file():
        return _by_kind(path.parent, [(path.name, path)], fields)
    if path.is_dir():
        return _by_kind(path, _named(path, path.rglob("*")), fields)
    root, found = _globbed(path)
    if not found:
        what = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise FileNotFoundError(f"data.source={source!r}: {what}; allowed are {SOURCES}")
    return _by_kind(root, _named(root, found), fields)


def _globbed(path: Path) -> tuple[Path, list[Path]]:
    """The part of a glob that is the same for all, and what it finds; `**` follows no links."""
    if not glob.has_magic(str(path)):
        return path, []
    root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
    pattern = str(path.relative_to(root))
    return root, list(root.glob(f"{pattern}/*" if path.name == "**" else pattern))


def absolute(name: str) -> str:
    """An existing path, or a glob that finds something, from the root on; any other name as it is."""
    path = os.path.expanduser(name)
    there = os.path.exists(path) or bool(_globbed(Path(path))[1])
    return os.path.abspath(path) if there else name


def _named(root: Path, paths: Iterable[Path]) -> list[tuple[str, Path]]:
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    return [(name, path) for name, path in named if not any(part.startswith(".") for part in name.split("/"))]


def _by_kind(
    root: Path, named: list[tuple[str, Path]], fields: Collection[str]
) -> tuple[list[tuple[str, Path]], list[RecordFile]]:
    """Text files, and readers of what holds records."""
    saved = {path.parent for _, path in named if _says_saved(path)}
    saved -= {folder for folder in saved if saved & {*folder.parents}}
    records: list[RecordFile] = [from_saved(_name(folder, root), folder, fields) for folder in sorted(saved)]
    texts = []
    for name, path in named:
        read = READERS.get(path.suffix.lower())
        if saved & {*path.parents}:
            continue
        if read:
            records.append(read(name, path, fields))
        else:
            texts.append((name, path))
    return texts, records


def _says_saved(path: Path) -> bool:
    """Whether a file marks its folder as one that `datasets.save_to_disk` wrote."""
    if path.name == "state.json":
        return path.with_name("dataset_info.json").is_file()
    return path.name == "dataset_dict.json"


def _name(folder: Path, root: Path) -> str:
    return "dataset" if folder == root else folder.relative_to(root).as_posix()
