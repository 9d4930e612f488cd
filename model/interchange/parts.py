"""Tensors in parts: the files that several processes wrote of one model, each with what it held (torch's distributed
checkpoints). A file says of each of its tensors where in the whole it begins.
"""

import json
import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

OFFSETS = "DCP_SHARDING_INFO"  # in a file's metadata


class Part(NamedTuple):
    """One of them: where it is kept and where it belongs."""

    file: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


def parts_of(folder: Path, opened: Any) -> dict[str, list[Part]]:
    """The parts of each tensor in the files of a folder, which `opened(file)` opens.

    Raises:
        ValueError: files that do not say where their tensors belong, or parts that do not make up a whole.
    """
    found: dict[str, list[Part]] = defaultdict(list)
    for file in sorted(folder.glob("*.safetensors")):
        handle = opened(file)
        offsets = json.loads((handle.metadata() or {}).get(OFFSETS, "{}"))
        for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
            view, told = handle.get_slice(name), offsets.get(name) if isinstance(offsets, dict) else None
            shape, start = tuple(view.get_shape()), told.get("saved_offsets") if isinstance(told, dict) else None
            if not isinstance(start, list) or len(start) != len(shape) or any(type(at) is not int for at in start):
                raise ValueError(f"{file} does not say where its part of {name} belongs")
            found[name].append(Part(file, tuple(start), shape, view.get_dtype()))
    for name, parts in found.items():
        _check_whole(folder, name, parts)
    return dict(found)


def _check_whole(folder: Path, name: str, parts: list[Part]) -> None:
    """Parts of one dtype that lie side by side and fill the whole."""
    filled = sum(math.prod(part.shape) for part in parts) == math.prod(whole_shape(parts))
    apart = not any(_overlap(a, b) for a, b in combinations(parts, 2))
    inside = all(at >= 0 for part in parts for at in part.start)
    if not (filled and apart and inside):
        raise ValueError(f"{folder} does not hold all parts of {name}, each once")
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(f"{folder}: the parts of {name} are {', '.join(sorted({part.dtype for part in parts}))}")


def _overlap(a: Part, b: Part) -> bool:
    sides = zip(a.start, a.shape, b.start, b.shape)
    return all(i < j + m and j < i + n for i, n, j, m in sides)


def whole_shape(parts: list[Part]) -> tuple[int, ...]:
    ends = ([start + size for start, size in zip(part.start, part.shape)] for part in parts)
    return tuple(map(max, zip(*ends)))


def joined(name: str, parts: list[Part], opened: Any) -> Tensor:
    """The whole tensor."""
    out = None
    for part in parts:
        tensor = opened(part.file).get_tensor(name)
        out = torch.empty(whole_shape(parts), dtype=tensor.dtype) if out is None else out
        out[tuple(slice(start, start + size) for start, size in zip(part.start, part.shape))] = tensor
    assert out is not None
    return out
