"""Folders of safetensors files: what they hold, tensor by tensor, and writing a new one whole or not at all.

    DIR/config.json                             and generation_config.json
        model.safetensors                       or model-00001-of-00003.safetensors, ... and
        model.safetensors.index.json            {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
        model/shard-00001-model-*.safetensors   or, of a run of several processes, what each of them held

An index decides: each tensor is read from the file that it names for it. What else lies in the folder, other copies and
tensors that it does not list included, is not read. transformers reads `model.safetensors` before it looks for an
index, so one beside an index that does not list it could be either's weights, and is refused.

Nothing is trusted: names in an index stay inside the folder, what it promises has to be there, files end where their
headers say. Pickled weights are not read, since reading them can run any code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..disk import flush, write_tensors
from ..folders import CONFIG, described_in, read_json
from . import place
from .names import Index, listed
from .parts import Part, joined, parts_of, whole_shape

WEIGHTS, SHARDS, PARTS = "model.safetensors", "model.safetensors.index.json", "model"
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Header(NamedTuple):
    """What a file says about one of its tensors: `dtype` is safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Folder:
    """The tensors stored in a folder. Headers are read at once, tensors when they are asked for.

    Raises:
        FileNotFoundError: the folder has no config.json or no safetensors weights, or a shard is missing.
        ValueError: a broken or cut-off file, an index that is none, leads out of the folder, promises a tensor that its
            file does not hold, or does not list a `model.safetensors` beside it; pickled weights alone; the folder was
            replaced by another one meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            place.tidy(Path(os.path.realpath(self.path)))
        described_in(self.path)
        self._open: tuple[Path, str, Any] | None = None
        self._written = self._stamp()
        self.headers: dict[str, Header] = {}
        self._parts: dict[str, list[Part]] = {}
        with self.unchanged():
            self._read_headers()

    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files())

    def files(self) -> set[Path]:
        """Those that hold the weights."""
        kept = {part.file for parts in self._parts.values() for part in parts}
        return kept or {header.file for header in self.headers.values()}

    def read(self, name: str, index: Index = (), device: torch.device | str = "cpu") -> Tensor:
        """A tensor, or a part of it; on a CPU it is the file's memory, not a copy. One file is open at a time.

        Raises:
            ValueError: the folder was replaced by another one since its headers were read.
        """
        if name in self._parts:
            with self.unchanged():
                return joined(name, self._parts[name], _opened)[index].to(device)
        file = self.headers[name].file
        if self._open is None or self._open[:2] != (file, str(device)):
            self._open = None  # the last file is closed before the next is mapped
            with self.unchanged():
                self._open = file, str(device), _opened(file, str(device))
        handle = self._open[2]
        return handle.get_slice(name)[index] if index else handle.get_tensor(name)

    def close(self) -> None:
        self._open = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises ValueError where the folder is another one than at first, whatever that may have broken within."""
        try:
            yield
        except Exception:
            self._check_unchanged()
            raise
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self._stamp() != self._written:
            raise ValueError(f"{self.path} was written anew while it was read: read it again")

    def _stamp(self) -> tuple[int, ...]:
        """Another number after every save: each writes its own config.json."""
        try:
            found = described_in(self.path).stat()
        except FileNotFoundError:  # between the two renames of a save
            return ()
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def _read_headers(self) -> None:
        if (self.path / PARTS).is_dir() and not (self.path / WEIGHTS).exists():
            self._parts = checked_parts(self.path / PARTS)
            self.headers = {
                name: Header(parts[0].file, parts[0].dtype, whole_shape(parts)) for name, parts in self._parts.items()
            }
            return
        places = self._weight_map()
        for file in sorted(set(places.values())) or [WEIGHTS]:
            found = _headers(self.path / file)
            self.headers |= {name: h for name, h in found.items() if not places or places.get(name) == file}
        lost = [name for name in places if name not in self.headers]
        if lost:
            raise ValueError(f"{SHARDS} promises tensors that their files do not hold: {listed(lost)}")

    def _weight_map(self) -> dict[str, str]:
        """Tensor to file, from the index; empty where there is one file."""
        path = self.path / SHARDS
        if not os.path.lexists(path):
            self._check_single()
            return {}
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise ValueError(f"{path} is no index of shards: weight_map has to be a table of tensors and their files")
        if not places:
            raise ValueError(f"{path} lists no tensor")
        files = sorted(set(places.values()))
        outside = [file for file in files if Path(file).name != file or file in ("", ".", "..") or "\0" in file]
        if outside:
            raise ValueError(f"{path} leads to {listed(map(repr, outside))}: allowed are names of files beside it")
        if WEIGHTS not in files and os.path.lexists(self.path / WEIGHTS):
            raise ValueError(
                f"{self.path} has {WEIGHTS} beside an index that does not list it: delete {SHARDS} to read {WEIGHTS},"
                f" as transformers does, or delete {WEIGHTS} to read the index's {listed(files)}"
            )
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.path} has no {listed(missing)}")
        return places

    def _check_single(self) -> None:
        if (self.path / WEIGHTS).is_file():
            return
        shards = sorted(file.name for file in self.path.glob("*.safetensors"))
        if shards:
            raise FileNotFoundError(f"{self.path} has {listed(shards)}, but no {SHARDS}")
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{self.path} has {listed(pickles)}: pickled weights are refused, because reading them can run any"
                f" code; have their author save them as safetensors"
            )
        raise FileNotFoundError(f"{self.path} has no {WEIGHTS}")


def write(
    folder: str | Path,
    config: Mapping[str, Any],
    shards: list[list[str]],
    make: Callable[[str], Mapping[str, Tensor]],
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes config.json and a file for each shard, of what `make` returns for the names listed, and other
    files by name.

    The new folder takes the place of the old one as a whole (`place`), whose other files it keeps.

    Raises:
        OSError: the folder cannot be written; it is what it was.
    """
    with place.replaced(folder) as new:
        _write_json(new / CONFIG, config)
        places: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held: dict[str, Tensor] = {}
            for name in names:
                held |= make(name)
            write_tensors(held, new / file)
            places |= dict.fromkeys(held, file)
            total += sum(tensor.nbytes for tensor in held.values())
        if len(shards) > 1:
            _write_json(new / SHARDS, {"metadata": {"total_size": total}, "weight_map": places})
        for name, contents in (others or {}).items():
            (new / name).write_bytes(contents)
        for path in new.iterdir():
            flush(path)
        _keep_others(Path(folder), new)


def _keep_others(folder: Path, new: Path) -> None:
    """Whatever else the folder holds, as further links to the same files."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if (new / entry.name).exists() or _OURS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=place.link)
        else:
            place.link(entry, new / entry.name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _headers(file: Path) -> dict[str, Header]:
    tensors = _opened(file)
    views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (the handle is no mapping)
    return {name: Header(file, view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}


def checked_parts(folder: Path) -> dict[str, list[Part]]:
    """See `parts_of`."""
    return parts_of(folder, _opened)


def _opened(file: Path, device: str = "cpu") -> Any:
    try:
        return safe_open(file, "pt", device=device)
    except SafetensorError as error:
        raise ValueError(f"{file} is broken or cut off: {error}") from None
