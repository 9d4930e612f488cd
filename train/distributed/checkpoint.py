"""Tensors on the disk in parts, by torch's distributed checkpoints: every process writes what it holds, once.

    FOLDER/shard-00001-model-00001-of-00001.safetensors     of the first process, and so on

Each file is safetensors and says where in the whole its parts begin. Any number of processes, cut in any way, reads
them, and files that hold whole tensors too.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Size, Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from ...model.disk import os_error, tensor_shapes


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors` into a new folder; every process calls this with its own, at the same time.

    Raises:
        OSError: in each of them, where one could not write.
    """
    with _quiet():
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise cause if isinstance(cause, OSError) else os_error(cause, folder) from None


def read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place, each process what it holds of them, from a folder of parts or a file of whole ones.

    Raises:
        ValueError: a tensor that is not there, or of another shape.
    """
    found = shapes(path)
    for name, tensor in tensors.items():
        if found.get(name) != tensor.shape:
            there = f"has shape {list(found[name])}" if name in found else "is missing"
            raise ValueError(f"{path}: {name!r} {there}; expected is {list(tensor.shape)}")
    with _quiet():
        wanted = {name: tensor.detach() for name, tensor in tensors.items()}
        dcp.load(wanted, storage_reader=_reader(path), no_dist=True)


def shapes(path: Path) -> dict[str, Size]:
    """Names and whole shapes of the tensors in a folder of parts or a file of whole ones."""
    if path.is_file():
        return tensor_shapes(path)
    metadata = _reader(path).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in metadata.items()}  # type: ignore[union-attr]


def _reader(path: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(path if path.is_dir() else path.parent))


class _quiet(warnings.catch_warnings):
    """Without what torch says about its own machinery."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
