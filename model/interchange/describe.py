"""What a checkpoint folder holds, from its headers alone: nothing is loaded."""

import math
from collections import Counter
from pathlib import Path

import torch

from . import Stored


def describe(folder: str | Path, free: int | None = None) -> str:
    """Layout, files, number formats, parameters, and how much memory the model takes, as lines of text.

    Args:
        free: bytes of memory there are; says of each dtype whether the model fits.

    Raises:
        FileNotFoundError, ValueError: the checkpoint could not be loaded; see `load_pretrained`.
    """
    stored = Stored(folder)
    headers = stored.folder.headers
    files = stored.folder.files()
    kinds: Counter[str] = Counter()
    for header in headers.values():
        kinds[header.dtype] += math.prod(header.shape)
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    rows = [
        ("folder", str(stored.folder.path)),
        ("model", stored.config.to_dict().get("model_type", "")),
        ("layout", stored.layout + (", quantised" if stored.scales else "")),
        ("files", f"{len(files)}, {_gib(stored.folder.nbytes())}"),
        ("stored", ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())),
        ("tensors", f"{len(headers):,} stored, {len(stored.shapes):,} of the model"),
        ("values of the model", f"{parameters:,}"),
    ]
    for dtype in (torch.bfloat16, torch.float32):
        size = sum(math.prod(shape) * stored.dtype(name, dtype).itemsize for name, shape in stored.shapes.items())
        fits = "" if free is None else f": {'fits' if size < free else 'does not fit'} into {_gib(free)}"
        rows.append((f"as {str(dtype).removeprefix('torch.')}", _gib(size) + fits))
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
