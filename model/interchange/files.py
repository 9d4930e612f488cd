"""Folders of safetensors files: what they hold, tensor by tensor, and writing a new one whole or not at all.

    DIR/config.json
        model.safetensors                       or model-00001-of-00003.safetensors, ... and
        model.safetensors.index.json            {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

Nothing is trusted: names in an index stay inside the folder, what it promises has to be there, files end where their
headers say. Pickled weights are not read, since reading them can run any code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .names import Index, listed

CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
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
        ValueError: a broken or cut-off file, an index that is none or leads out of the folder, a tensor that an index
            promises and its file does not hold, or that two files hold; pickled weights alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise FileNotFoundError(f"{self.path} has no {CONFIG}")
        self._open: tuple[Path, str, Any] | None = None
        self.headers: dict[str, Header] = {}
        places = self._weight_map()
        for file in sorted(set(places.values())) if places else [WEIGHTS]:
            self._add(self.path / file)
        lost = [
            name for name, file in places.items() if self.headers.get(name, Header(Path(), "", ())).file.name != file
        ]
        if lost:
            raise ValueError(f"{SHARDS} promises tensors that their files do not hold: {listed(lost)}")

    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in {header.file for header in self.headers.values()})

    def read(self, name: str, index: Index = (), device: torch.device | str = "cpu") -> Tensor:
        """A tensor, or a part of it; on a CPU it is the file's memory, not a copy. One file is open at a time."""
        file = self.headers[name].file
        if self._open is None or self._open[:2] != (file, str(device)):
            self._open = None  # the last file is closed before the next is mapped
            self._open = file, str(device), safe_open(file, "pt", device=str(device))
        handle = self._open[2]
        return handle.get_slice(name)[index] if index else handle.get_tensor(name)

    def close(self) -> None:
        self._open = None

    def _weight_map(self) -> dict[str, str]:
        """Tensor to file, from the index; empty where there is one file."""
        path = self.path / SHARDS
        if not path.is_file():
            self._check_single()
            return {}
        try:
            places = json.loads(path.read_text("utf-8"))["weight_map"]
            named = {str(name): str(file) for name, file in places.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of shards: {type(error).__name__}: {error}") from None
        outside = sorted({file for file in named.values() if Path(file).name != file or file in ("", ".", "..")})
        if outside:
            raise ValueError(f"{path} leads to {listed(map(repr, outside))}: allowed are names of files beside it")
        missing = sorted(file for file in set(named.values()) if not (self.path / file).is_file())
        if missing:
            raise FileNotFoundError(f"{self.path} has no {listed(missing)}")
        if not named:
            raise ValueError(f"{path} lists no tensor")
        return named

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

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (the handle is no mapping)
                    view = tensors.get_slice(name)
                    if name in self.headers:
                        raise ValueError(f"{name} is in {self.headers[name].file.name} and in {file.name}")
                    self.headers[name] = Header(file, view.get_dtype(), tuple(view.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file} is broken or cut off: {error}") from None


def write(
    folder: Path, config: Mapping[str, Any], shards: list[list[str]], make: Callable[[str], Mapping[str, Tensor]]
) -> None:
    """Writes config.json and a file for each shard, of what `make` returns for the names listed.

    All is written beside the folder first and flushed to the disk; then the new folder takes the place of the old one,
    whose other files it keeps. Whenever this is interrupted, no folder is half old and half new.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, before = (folder.parent / f".{folder.name}.{os.getpid()}.{word}" for word in ("new", "old"))
    beside.mkdir()
    try:
        places: dict[str, str] = {}
        total = 0
        for number, names in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            held: dict[str, Tensor] = {}
            for name in names:
                held |= make(name)
            save_file(held, beside / file, metadata={"format": "pt"})
            places |= dict.fromkeys(held, file)
            total += sum(tensor.nbytes for tensor in held.values())
        if len(shards) > 1:
            _write_json(beside / SHARDS, {"metadata": {"total_size": total}, "weight_map": places})
        _write_json(beside / CONFIG, config)
        _flush([*beside.iterdir(), beside])
        if folder.exists():
            _keep_others(folder, beside)
            os.rename(folder, before)
        os.rename(beside, folder)
        _flush([folder.parent])
    finally:
        if before.exists() and not folder.exists():
            os.rename(before, folder)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def _keep_others(folder: Path, beside: Path) -> None:
    """Whatever else the folder holds, as further links to the same files."""
    for entry in folder.iterdir():
        if entry.name == CONFIG or _OURS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, beside / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, beside / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
