"""Checkpoints: safetensors and JSON, no pickle; complete or not there at all.

    DIR/checkpoints/step-000200/config.json             with generation_config.json: a checkpoint is a model's folder
                                model.safetensors       the model's state_dict
                                optimizer.safetensors   of every parameter what its rule keeps (`train.optim`)
                                                        adam      NAME.exp_avg, NAME.exp_avg_sq, NAME.step; in tables
                                                                  whose rows count for themselves NAME.updates for it
                                                        muon      NAME.momentum
                                                        balanced  NAME.exp_avg
                                random.safetensors      states of the random generators
                                tokenizer.json ...      of a trained tokenizer (`train.data.tokenizers`)
                                memory.safetensors      experts chosen ahead (`train.run.stability`), if there are any
                                checkpoint.json         step, recipe, tokens and seconds so far, the data's digest, and
                                                        what else is remembered

A run of several processes writes folders model/ and optimizer/ of the same tensors in parts, a file for each process
(`distributed.checkpoint`); one process, or another number of them, goes on from either.

A checkpoint is written to a hidden folder, flushed to the disk, and renamed: a run that is killed at any moment leaves
whole checkpoints only, and what was left half-written is swept up by the next save. Tables that are kept apart from the
weights are in it like any other tensor, whole, wherever the run had them: nothing is ever written into a checkpoint's
files again, and a run that resumes makes its own copy of them.

Whatever else lies in DIR/checkpoints (copies of checkpoints under other names, files, links) is nobody's business: it
is never read, and never removed.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.accounting import account
from ...model.config import ModelConfig
from ...model.disk import flush, naming, read_tensors, tensor_shapes, write_tensors
from ...model.folders import CHECKPOINTS, STATE, STEP, checkpoints, named, read_json, step_of
from ...model.interchange import about
from ...model.interchange.files import checked_parts
from ...model.tables import RowTable
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..distributed.world import ALONE, World
from ..optim import Optimizers
from ..recipe import Recipe
from ..settings import PLANTED
from .tables import named_tables

FOLDER = CHECKPOINTS
_LEFT = re.compile(r"\.(writing|removing-step)-\d{6,}")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps done, tokens read, seconds of training."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Memory:
    """What a run remembers beside weights, moments and random generators: JSON values, and tensors."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


NOTHING = Memory()


def save(
    run: Path,
    model: nn.Module,
    optimizer: Optimizers,
    recipe: Recipe,
    progress: Progress,
    keep: int,
    world: World = ALONE,
    memory: Memory = NOTHING,
    tokenizer: Tokenizer | None = None,
    data: str = "",
    prepared: str = "",
) -> Path:
    """Writes checkpoint `progress.step` of the run in folder `run`, then removes all but the newest `keep`.

    `data` is the digest of what the run learns from, `prepared` what has changed the model. Every process of `world`
    calls this; the first one names the checkpoint once all have written their parts.

    Raises:
        OSError: a full disk, say; what there was is there still, whole.
    """
    parent = run / FOLDER
    folder, writing = parent / f"step-{progress.step:06d}", parent / f".writing-{progress.step:06d}"
    if world.first:
        parent.mkdir(exist_ok=True)
        tidy(run, keep)
        writing.mkdir()
    world.barrier()
    try:
        _write_tensors(writing / "model", model.state_dict(), world)
        _write_tensors(writing / "optimizer", _optimizer_tensors(model, optimizer), world)
        if world.first:
            state = {"recipe": recipe.to_dict(), "progress": asdict(progress), "torch": torch.__version__}
            state |= {"data": data, "memory": memory.values}
            stage = getattr(model, "attention_stage", about.SPARSE)
            described = about.checkpoint(recipe.model, next(model.parameters()).dtype, stage, prepared)
            _write_rest(writing, state, memory, tokenizer, described)
            _move_aside(folder)
            os.rename(writing, folder)
            flush(parent)
            tidy(run, keep)
    except OSError:
        shutil.rmtree(writing, ignore_errors=True)  # on a full disk it takes room that others want
        raise
    world.barrier()
    return folder


def _write_rest(
    writing: Path, state: dict[str, Any], memory: Memory, tokenizer: Tokenizer | None, described: Mapping[str, bytes]
) -> None:
    """All but weights and moments, and everything onto the disk."""
    if memory.tensors:
        write_tensors(memory.tensors, writing / "memory.safetensors")
    write_tensors(_random_states(), writing / "random.safetensors")
    texts = {**(tokenizer.files() if tokenizer else {}), STATE: json.dumps(state, indent=1) + "\n"}
    for name, contents in {**{name: text.encode() for name, text in texts.items()}, **described}.items():
        with naming(writing / name):
            (writing / name).write_bytes(contents)
    for path in (*writing.iterdir(), writing):
        flush(path)


def _move_aside(folder: Path) -> None:
    """Whatever has the name of a checkpoint that the run has yet to write gets another one."""
    if os.path.lexists(folder):
        numbers = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
        aside = next(path for path in numbers if not os.path.lexists(path))
        warnings.warn(f"{str(folder)!r} is not of this run: moved to {aside.name!r}", stacklevel=2)
        os.rename(folder, aside)


def tidy(run: Path, keep: int) -> None:
    """Removes what a killed run left behind, and all checkpoints but the newest `keep`."""
    for leftover in named(run, _LEFT):
        shutil.rmtree(leftover)
    for old in checkpoints(run)[:-keep]:
        remove(old)


def remove(folder: Path) -> None:
    """A checkpoint is gone at once, or still there whole, if the run is killed meanwhile."""
    removing = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(removing, ignore_errors=True)
    os.rename(folder, removing)
    shutil.rmtree(removing)


def go_back(run: Path, step: int) -> Path:
    """The newest checkpoint of the run from before step `step`, or else its oldest; later ones are removed."""
    found = checkpoints(run)
    if not found:
        raise FileNotFoundError(f"{str(run / FOLDER)!r} holds no checkpoint any more to go back to")
    target = max((path for path in found if step_of(path) < step), key=step_of, default=found[0])
    for path in reversed(found):
        if step_of(path) > step_of(target):
            remove(path)
    return target


def find(path: Path | str) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run in that folder. Raises FileNotFoundError."""
    path = Path(path)
    if (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(
            f"{str(path)!r} is no checkpoint (a folder with {STATE}) and no run with {FOLDER}/step-* in it"
        )
    return found[-1]


def run_of(folder: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, by whatever path; None for one that lies in no run."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):  # `checkpoints` itself may be a link
        if path.parent.name == FOLDER:
            return path.parent.parent
    return None


def require_run(folder: Path) -> Path:
    """As `run_of`. Raises ValueError where there is none."""
    run = run_of(folder)
    if run is None:
        raise ValueError(f"{str(folder)!r} lies in no run: give --out, or a checkpoint where its run has it")
    return run


def read_state(folder: Path) -> tuple[Recipe, Progress]:
    """The recipe and the progress of a checkpoint. Raises ValueError where its file is broken."""
    path, values = folder / STATE, read_json(folder / STATE)
    try:
        recipe, progress = Recipe.from_dict(values["recipe"]), Progress(**values["progress"])
    except KeyError as error:
        raise ValueError(f"{str(path)!r} has no {error}: it is no checkpoint's, or not whole") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is broken, or of another version: {error}") from None
    counts = (progress.step, progress.tokens)
    timed = type(progress.seconds) in (int, float) and 0 <= progress.seconds < math.inf
    if len(values["progress"]) < 3 or not timed or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{str(path)!r} is broken: progress={values['progress']}")
    if STEP.fullmatch(folder.name) and step_of(folder) != progress.step:
        raise ValueError(f"{str(path)!r} is broken, or another's: its step is {progress.step}")
    return recipe, progress


def read_memory(folder: Path) -> Memory:
    """What the run remembered at a checkpoint."""
    path = folder / "memory.safetensors"
    values = read_json(folder / STATE).get("memory", {})
    if not isinstance(values, dict):
        raise ValueError(f"{str(folder / STATE)!r} is broken: memory={values!r}")
    return Memory(values, read_tensors(path) if path.is_file() else {})


def read_data(folder: Path) -> str:
    """The digest of what a checkpoint's run learnt from; '' where it was not told."""
    data = read_json(folder / STATE).get("data", "")
    if not isinstance(data, str):
        raise ValueError(f"{str(folder / STATE)!r} is broken: data={data!r}")
    return data


def tokenizer_of(path: Path | str) -> Tokenizer:
    """The tokenizer that a checkpoint's model (or that of a run's newest) was trained with.

    Raises:
        ValueError: it was trained on a planted task, whose tokens spell nothing.
    """
    folder = find(path)
    data = read_state(folder)[0].data
    if spells_nothing(folder):
        raise ValueError(f"{str(folder)!r} was trained on {data.source}: its tokens spell no text")
    return load_tokenizer("bytes" if data.tokenizer == "bytes" else folder)


def spells_nothing(folder: Path) -> bool:
    """Whether a checkpoint's run learnt a planted task, whose tokens are no text."""
    return read_state(folder)[0].data.source.startswith(PLANTED)


def check_size(folder: Path, config: ModelConfig) -> None:
    """Raises ValueError where a model has more numbers than its checkpoint: built in vain, it may fill the memory."""
    path = _tensors(folder, "model")
    if path.is_dir():
        from ..distributed.checkpoint import shapes
    else:
        shapes = tensor_shapes
    held, needed = sum(shape.numel() for shape in shapes(path).values()), account(config).total_with_mtp
    if needed > held:
        raise ValueError(f"{str(path)!r} is not of its recipe's model: {held:,} numbers, where that has {needed:,}")


def load_model(folder: Path, model: nn.Module) -> None:
    """Copies a checkpoint's weights and buffers into `model`. Raises ValueError naming what does not fit."""
    path = _tensors(folder, "model")
    if path.is_file() and not _shared_out(model):
        fit(model, path)
        return
    from ..distributed import checkpoint as parts

    if path.is_dir():
        checked_parts(path)
    state = model.state_dict()
    unexpected = parts.shapes(path).keys() - state.keys()
    if unexpected:
        raise ValueError(f"{path}: {sorted(unexpected)[0]!r} is no tensor of the model")
    parts.read(path, state)


def fit(model: nn.Module, path: Path) -> None:
    """Copies the tensors of a file into `model`. Raises ValueError, which says what does not fit."""
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        wrong = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not fit the model: {wrong.partition(': ')[2][:300]}") from None


def restore(folder: Path, model: nn.Module, optimizer: Optimizers) -> None:
    """Puts model, optimizer and random generators back to where they were.

    Raises:
        FileNotFoundError: one of the checkpoint's files is missing.
        ValueError: they do not fit, or a parameter was updated by another rule than the one it has now.
    """
    tensors = _read_moments(folder, model)
    parameters, tables, state = dict(model.named_parameters()), named_tables(model), optimizer.state
    _check_rules(folder, tensors, parameters, tables, optimizer)
    _check_moments(folder, tensors, parameters, tables)
    load_model(folder, model)
    for moments in state.values():
        moments.clear()
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        if name in tables:
            tables[name].store[moment].copy_(tensor)
        else:
            # AdamW counts its steps in float32 on the parameter's device; moments have the parameter's dtype
            state[parameters[name]][moment] = tensor.to(parameters[name].device)
    path = folder / "random.safetensors"
    states = read_tensors(path)
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} holds no states of random generators: {error}") from None


def _read_moments(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of the parameters, cut as they are."""
    path = _tensors(folder, "optimizer")
    if path.is_file() and not _shared_out(model):
        return read_tensors(path)
    from ..distributed import checkpoint as parts

    tensors, parameters = {}, dict(model.named_parameters())
    for key, shape in parts.shapes(path).items():
        like = parameters.get(key.rpartition(".")[0])
        whole = like is None or like.shape != shape  # AdamW's count of steps
        tensors[key] = torch.zeros(shape) if whole else torch.zeros_like(like)  # type: ignore[arg-type]
    parts.read(path, tensors)
    return tensors


def _tensors(folder: Path, name: str) -> Path:
    """The file of whole tensors, or the folder of their parts. Raises FileNotFoundError where there is neither."""
    for path in (folder / name, folder / f"{name}.safetensors"):
        if path.is_dir() or path.is_file():  # a pipe would be waited for
            return path
    raise FileNotFoundError(f"{str(folder)!r} has no {path.name}: the checkpoint is not whole")


def _shared_out(model: nn.Module) -> bool:
    return any(type(parameter.data) is not Tensor for parameter in model.parameters())


def _write_tensors(path: Path, tensors: Mapping[str, Any], world: World) -> None:
    if world.size == 1:
        write_tensors(_contiguous(tensors), path.with_suffix(".safetensors"))
        return
    from ..distributed import checkpoint as parts

    parts.write(path, tensors)
    if world.first:
        flush(path)


def _optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    state = optimizer.state
    tensors = {
        f"{name}.{moment}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for moment, tensor in state.get(parameter, {}).items()
    }
    for name, table in named_tables(model).items():
        table.wait()
        tensors |= {f"{name}.{column}": tensor for column, tensor in table.store.items() if column != "weight"}
    return tensors


def _check_rules(
    folder: Path,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    tables: Mapping[str, RowTable],
    optimizer: Optimizers,
) -> None:
    """What a parameter's rule keeps is in the file whole, or (it never had a gradient) not at all."""
    saved: dict[str, set[str]] = {}
    for key in tensors:
        name, _, moment = key.rpartition(".")
        saved.setdefault(name, set()).add(moment)
    for name, moments in saved.items():
        if name in tables:
            kept = frozenset(tables[name].store) - {"weight"}
        elif name in parameters:
            kept = optimizer.moments.get(parameters[name], frozenset())
        else:
            file = folder / "optimizer.safetensors"
            raise ValueError(f"{file}: {name!r} of {sorted(moments)} is no parameter of the model")
        if moments != kept:
            raise ValueError(f"{str(folder)!r}: {name} was trained with {_rule_of(name, moments)}: go on with that")


def _check_moments(
    folder: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], tables: Mapping[str, RowTable]
) -> None:
    """Moments have their parameter's shape and are no integers; a run that has learnt has some."""
    path, (recipe, progress) = folder / "optimizer.safetensors", read_state(folder)
    if progress.step and not tensors and recipe.grpo is None:  # rewards that are all alike teach nothing
        raise ValueError(f"{str(path)!r} holds nothing after {progress.step} steps: it is not whole")
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        like = tables[name].store[moment] if name in tables else parameters[name]
        shape = torch.Size() if moment == "step" else like.shape
        if tensor.shape != shape or tensor.is_floating_point() != like.is_floating_point():
            found = f"{str(tensor.dtype).partition('.')[2]} {list(tensor.shape)}"
            raise ValueError(f"{str(path)!r}: {key} is {found}: allowed is {list(shape)}, as the parameter")


def _rule_of(name: str, moments: set[str]) -> str:
    """The recipe's key under which a parameter has these moments."""
    if ".engram." in f".{name}" and "table" in name:
        if moments == {"exp_avg"}:
            return "optim.engram_rule='balanced'"
        return f"optim.engram_rule='adam' and optim.engram_rows={'touched' if 'updates' in moments else 'all'!r}"
    if name in ("embed.weight", "head.weight"):
        return f"optim.embedding_rule={'balanced' if moments == {'exp_avg'} else 'adamw'!r}"
    return f"optim.rule={'muon' if moments == {'momentum'} else 'adamw'!r}"


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _contiguous(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
