"""Checkpoint interchange: folders of config.json and safetensors, as transformers and DeepSeek write them.

names           under which names a layout stores our tensors
formats         the released number formats of weights
files           safe reading and writing of a folder
place           a new folder in the place of the old one, all or nothing
parts           what several processes wrote of one model
counts          what is believed only when tensors bear it out
about           what else a folder says of its model
families        what differs between V4 and its lineage

Reading and writing go tensor by tensor: memory holds the model and one shard.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..folders import STATE, described_in, description, model_folder, naming, using
from ..foreign import refuse_foreign
from ..kept import kept
from ..tables import row_tables
from . import about, formats
from .counts import check_counts, check_numbers
from .families import V4, Config, Family, family_of, family_of_model
from .files import Folder, Header, write
from .names import LAYOUTS, Index, listed
from .place import tidy

if TYPE_CHECKING:
    from ..lineage import LineageTransformer
    from ..transformer import Transformer

__all__ = ["Stored", "convert_pretrained", "load_pretrained", "save_pretrained"]

SHARD = 5 * 10**9
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = ("I64", "I32")


def load_pretrained(
    folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> "Transformer | LineageTransformer":
    """The model in a folder with config.json and safetensors shards, in any layout, quantised as released or not.

    The folder may be a checkpoint of `abyssal train`, or the folder of a run: then it is the run's newest. Which
    generation it is, V4, V3.2 or V3, says `model_type` in config.json.

    Tensors go one by one to `device` (default: the CPU). `dtype` None keeps the file's types, with bfloat16 for
    quantised tensors, which holds them exactly; otherwise floating tensors are cast. Norms, mHC, sinks, slot biases and
    gate biases are float32 at least, whatever the file has. Without MTP tensors the model has no MTP block. Engram's
    tables are among the weights, also inside `row_tables`.

    Raises:
        FileNotFoundError: the folder has no config.json or no safetensors weights and is no run, or a shard is missing.
        ValueError: names of no known layout; missing or unexpected tensors (up to ten of each are named); a tensor of
            another shape or dtype; an expert that does not exist; a broken file or index; pickled weights; a
            configuration that is refused.
    """

    def load(found: Path) -> "Transformer | LineageTransformer":
        stored = Stored(found)
        model = _empty(stored.family, stored.config)
        state = {name: stored.tensor(name, dtype, torch.device(device or "cpu")) for name in stored.in_file_order()}
        stored.folder.close()
        model.load_state_dict(state, assign=True)
        if stored.stage != about.SPARSE:
            model.attention_stage = stored.stage
        return model

    return using(folder, load, located)


def config_in(path: str | Path) -> Config:
    """The configuration of the model that a path means (see `load_pretrained`), from headers alone."""
    folder = located(path)
    if (folder / STATE).is_file():
        return naming(described_in(folder), V4.load, description(folder), ["mtp."])
    return Stored(folder).config


def located(path: str | Path) -> Path:
    """The folder of weights that a path means. Raises FileNotFoundError where there is none."""
    if not Path(path).exists():
        tidy(Path(os.path.realpath(path)))
    return model_folder(path)


def save_pretrained(
    model: "Transformer | LineageTransformer",
    folder: str | Path,
    layout: str = "huggingface",
    max_shard_size: float = SHARD,
    *,
    weights: str = "exact",
) -> None:
    """Writes config.json, generation_config.json and safetensors shards of about `max_shard_size` bytes at most (one
    tensor at least).

    "huggingface" can be read by transformers: as its own `DeepseekV4ForCausalLM`, or, what that has no place for
    (Engram, several ratios of one kind of layer, several shared experts, a dense stage), in the layout "abyssal".
    "abyssal" has our own names, as the checkpoints of runs; transformers reads it once `abyssal.hf` is imported.
    "official" has DeepSeek's names. The folder is replaced as a whole, once all is on the disk; other files in it stay.

    Args:
        weights: "exact"; or quantised as released, in the official layout only: "fp8" (base models) or "fp4" (FP4
            experts, all else FP8). See `formats`.

    Raises:
        ValueError: an unknown layout or number format, or a model that the layout or the format cannot hold; a model
            with other tensors than its configuration says, which `load_pretrained` would refuse.
        OSError: the folder cannot be written, or the disk is full; it is what it was.
    """
    plain: Any = getattr(model, "_orig_mod", model)  # torch.compile(model) holds it
    if getattr(plain, "changed_by", ""):
        raise ValueError(f"the model was changed by {plain.changed_by}: a folder of weights does not hold that")
    family, state = family_of_model(plain), plain.state_dict()
    _check_model(family, plain.config, state)
    _save(
        folder,
        family,
        plain.config,
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()},
        lambda name, index: state[name][index].detach().to("cpu", copy=True),  # weights may share memory
        (layout, weights, max_shard_size),
        getattr(plain, "attention_stage", about.SPARSE),
    )


def convert_pretrained(
    source: str | Path,
    target: str | Path,
    layout: str = "huggingface",
    dtype: torch.dtype | None = None,
    max_shard_size: float = SHARD,
    *,
    weights: str = "exact",
) -> None:
    """Writes the checkpoint in folder `source` (or a run's newest) anew to `target`, without a model: memory holds one
    shard. The tokenizer's files come along.

    Raises:
        ValueError, OSError: as `load_pretrained` and `save_pretrained`; or both folders are the same.
    """
    if os.path.realpath(target) in map(os.path.realpath, (source, located(source))):
        raise ValueError(f"target={str(target)!r}: the checkpoint that is read must not be written over")
    stored = Stored(source)
    kinds = {name: (shape, stored.dtype(name, dtype)) for name, shape in stored.shapes.items()}
    get = lambda name, index: stored.tensor(name, dtype, index=index)  # noqa: E731
    how = (layout, weights, max_shard_size)
    _save(target, stored.family, stored.config, kinds, get, how, stored.stage, about.carried(stored.folder.path))


class Stored:
    """A checkpoint as tensors of our model, which are put together when they are asked for.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Folder(located(folder))
        with self.folder.unchanged():
            self._understand(self.folder.headers)

    def _understand(self, headers: Mapping[str, Header]) -> None:
        """Whose tensors they are, and in which parts they are stored."""
        path = self.folder.path
        told = description(path)
        if told.get("prepared"):
            raise ValueError(
                f"{str(path)!r}: its model was changed by {told['prepared']}: what opens runs and knows --trust-code"
                " builds it, and in Python abyssal.train.run.load.load_trained"
            )
        self.family, self.stage = family_of(told), told.get("attention_stage", about.SPARSE)
        self.layout = self.family.layout_of(headers)
        refuse_foreign(str(path), headers)
        self.config = naming(described_in(path), self.family.load, told, headers)
        check_counts(self.config, headers)
        self.shapes, self._is_float, self._kept = _shapes(self.family, self.config)
        self.scales = {
            name: self.family.scale_name(name)
            for name, header in headers.items()
            if header.dtype in formats.DTYPES and name.endswith(".weight")
        }
        self.parts = {name: self.family.sources(name, self.config, self.layout) for name in self.shapes}
        self._check({name: h for name, h in headers.items() if not self.family.is_left_out(name, self.config)})

    def dtype(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """That of one of our tensors when it is read as `dtype`."""
        if not self._is_float[name]:
            return torch.int64
        if dtype is not None:
            return torch.promote_types(dtype, torch.float32) if name in self._kept else dtype
        kinds = {_FLOATS.get(self.folder.headers[part].dtype, torch.bfloat16) for part in self.parts[name]}
        if len(kinds) > 1:
            raise ValueError(f"the parts of {name} are {', '.join(sorted(map(str, kinds)))}: say which dtype to read")
        return kinds.pop()

    def tensor(
        self,
        name: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        index: Index = (),
    ) -> Tensor:
        """One of our tensors, or a part of it that some layout stores.

        Raises:
            ValueError: a table of numbers has one that it cannot have; its parts are of several dtypes.
        """
        tensor = self._tensor(name, dtype, device, index)
        if not self._is_float[name]:
            check_numbers(name, tensor, self.config)
        return tensor

    def _tensor(self, name: str, dtype: torch.dtype | None, device: torch.device | str, index: Index) -> Tensor:
        kind, parts = self.dtype(name, dtype), self.parts[name]
        same = next((part for part, place in parts.items() if place == index), None)
        if same is not None:
            return self._part(same, (), kind, device)
        whole = next((part for part, place in parts.items() if place == ()), None)
        if whole is not None:
            return self._part(whole, index, kind, device)
        out = torch.empty(self.shapes[name], dtype=kind, device=device)
        for part, place in parts.items():
            out[place] = self._part(part, (), kind, device)
        return out[index]

    def in_file_order(self) -> list[str]:
        """Our names in the order in which files hold them, so that each is opened once or twice."""
        headers = self.folder.headers
        return sorted(self.shapes, key=lambda name: min(str(headers[part].file) for part in self.parts[name]))

    def _part(self, source: str, index: Index, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A copy, which needs the file no more."""
        codes = self.folder.read(source, index, device)
        if source not in self.scales:
            return codes.to(dtype, copy=codes.device.type == "cpu")
        return formats.decode(codes, self.folder.read(self.scales[source], device=device), dtype)

    def _check(self, headers: Mapping[str, Header]) -> None:
        """Every stored tensor is wanted, every wanted one is stored, in the right shape and kind."""
        wanted = {part: (name, place) for name, parts in self.parts.items() for part, place in parts.items()}
        needed = [*wanted, *(scale for part, scale in self.scales.items() if part in wanted)]
        _check_names("checkpoint", headers, needed)
        for part, (name, place) in wanted.items():
            shape = shape_of(self.shapes[name], place)
            header = headers[part]
            if part in self.scales:
                self._check_quantised(part, shape, header, headers[self.scales[part]])
                continue
            allowed = tuple(_FLOATS) if self._is_float[name] else _INTEGERS
            if header.dtype not in allowed:
                raise ValueError(f"{part} is {header.dtype}: allowed are {', '.join(allowed)} ({name})")
            if header.shape != shape:
                raise ValueError(f"{part} has shape {header.shape}: the configuration needs {shape} ({name})")

    def _check_quantised(self, part: str, shape: tuple[int, ...], codes: Header, scales: Header) -> None:
        format = formats.DTYPES[codes.dtype]
        if len(shape) != 2:
            raise ValueError(f"{part} is {codes.dtype}: only matrices are quantised, this has shape {shape}")
        for header, want, name in zip((codes, scales), formats.stored_shapes(shape, format), (part, self.scales[part])):
            if header.shape != want:
                raise ValueError(f"{name} has shape {header.shape}: a matrix {shape} in {format} needs {want}")
        if scales.dtype != self.family.scales:
            raise ValueError(f"{self.scales[part]} is {scales.dtype}: allowed is {self.family.scales}")


def _shapes(family: Family, config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, bool], set[str]]:
    """Our tensors' shapes, which of them hold floats, and which no cast narrows."""
    try:
        model = _empty(family, config)
    except (RuntimeError, TypeError):  # more values than an integer counts
        sizes = {key: value for key, value in config.to_dict().items() if isinstance(value, int)}
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(f"{largest}={sizes[largest]}: no model has tensors of the configuration's sizes") from None
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes, {name: tensor.is_floating_point() for name, tensor in state.items()}, kept(model)


def _empty(family: Family, config: Config) -> "Transformer | LineageTransformer":
    with torch.device("meta"), row_tables(None):
        return family.model(config)


def _check_model(family: Family, config: Config, state: Mapping[str, Tensor]) -> None:
    """A model's tensors are those that the configuration needs, in shape and kind."""
    shapes, is_float, _ = _shapes(family, config)
    if not any(name.startswith("mtp.") for name in state):  # loading leaves the block out, too
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("mtp.")}
    _check_names("model", state, shapes)
    for name, tensor in state.items():
        allowed = tuple(_FLOATS.values()) if is_float[name] else (torch.int64, torch.int32)
        if tensor.dtype not in allowed:
            raise ValueError(f"{name} is {tensor.dtype}: allowed are {', '.join(map(str, allowed))}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: the configuration needs {shapes[name]}")


def _check_names(whose: str, names: Collection[str], needed: Collection[str]) -> None:
    """There is each tensor that the configuration needs, and no other."""
    wanted = set(needed)
    found = {
        "missing": [name for name in needed if name not in names],
        "unexpected": [name for name in names if name not in wanted],
    }
    if any(found.values()):
        said = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names)
        raise ValueError(f"the {whose}'s tensors are not the configuration's: {said}")


def _save(
    folder: str | Path,
    family: Family,
    config: Config,
    kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    get: Callable[[str, Index], Tensor],
    how: tuple[str, str, float],
    stage: str = about.SPARSE,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes our tensors, of these shapes and dtypes, in the layout, number format and shard size that `how` says."""
    layout, weights, limit = how
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: allowed are {', '.join(map(repr, LAYOUTS))}")
    if weights not in formats.WEIGHTS:
        raise ValueError(f"weights={weights!r}: allowed are {', '.join(map(repr, formats.WEIGHTS))}")
    if weights != "exact" and layout != "official":
        raise ValueError(f"weights={weights!r}: the {layout} layout holds exact weights only; use layout='official'")
    if layout == "official" and stage != about.SPARSE:
        raise ValueError(f"attention_stage={stage!r}: allowed with layout='official' is {about.SPARSE!r}")
    if not limit >= 1:
        raise ValueError(f"max_shard_size={limit}: allowed are bytes, 1 or more")
    dtype = str(kinds["embed.weight"][1]).removeprefix("torch.")
    layout, written = about.config(family, config, layout, weights, dtype, stage)
    places = {part: (name, place) for name in kinds for part, place in family.sources(name, config, layout).items()}

    def make(part: str) -> dict[str, Tensor]:
        tensor, format = get(*places[part]), formats.format_of(part, weights)
        return formats.encode(part, tensor, format) if format else {part: tensor.contiguous()}

    shards: list[list[str]] = [[]]
    held = 0
    for part, (name, place) in places.items():
        planned = plan(part, shape_of(kinds[name][0], place), kinds[name][1], weights)
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in planned.values())
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(part)
        held += size
    write(folder, written, shards, make, {about.GENERATION: about.generation(config), **(others or {})})


def plan(
    part: str, shape: tuple[int, ...], dtype: torch.dtype, weights: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is stored for a tensor: itself, or codes and scales. Names to shapes and dtypes."""
    format = formats.format_of(part, weights)
    if not format:
        return {part: (shape, dtype)}
    codes, scales = formats.stored_shapes(shape, format)
    kind = torch.int8 if format == "e2m1" else torch.float8_e4m3fn
    return {part: (codes, kind), formats.scale_name(part): (scales, torch.float8_e8m0fnu)}


def shape_of(shape: tuple[int, ...], place: Index) -> tuple[int, ...]:
    """Of that part of a tensor."""
    return tuple(torch.empty(shape, device="meta")[place].shape)
