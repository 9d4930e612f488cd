"""A model with its tokenizer, ready for use: of a run, of a checkpoint, or of any folder of weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...model import Transformer, load_pretrained
from ...model.config import ModelConfig
from ...model.fields import shown
from ...model.folders import STATE, description, using
from ...model.interchange import config_in, located
from ...model.kept import kept
from .. import own
from ..data.conversations import are_conversations
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..distributed.world import choose_device
from ..recipe import Recipe
from ..settings import ChatConfig, DataConfig
from . import checkpoint
from .schedule import Schedule
from .tables import places

# keys of [model] in which a run may differ from the weights that it starts from: what is stored, and what is learnt
FREE = (
    *("torch_dtype", "expert_dtype", "quantization_config", "quantization_aware", "initializer_range"),
    *("mtp_loss_weight", "balance_loss_weight", "balance_picks", "index_loss_weight"),
    *("router_bias_update_speed", "router_bias_rule"),
)


@dataclass(frozen=True)
class Loaded:
    """A model in inference mode, and what is known of it.

    `tokenizer` is None where nothing says how its tokens are spelt, `recipe` where no run of ours made it.
    """

    folder: Path
    model: Any  # Transformer, or of V3 and V3.2 LineageTransformer
    tokenizer: Tokenizer | None
    recipe: Recipe | None

    @property
    def name(self) -> str:
        """The run's, else the folder's."""
        return (checkpoint.run_of(self.folder) or self.folder).resolve().name

    def learning(self, **data: Any) -> Recipe:
        """The run's recipe, or the default text's, with the checkpoint's own tokens and what else is given of [data].

        Raises:
            ValueError: a value that is not allowed, or a model of a generation that is not trained here.
        """
        recipe = self.recipe or self._plain()
        in_bytes = self.tokenizer is None or self.tokenizer.name == "bytes"
        given = replace(recipe.data, tokenizer="bytes" if in_bytes else str(self.folder), **data)
        recipe = replace(recipe, data=given, grpo=None, distil=None)
        if "source" in data:
            chat = (recipe.chat or ChatConfig()) if are_conversations(given.source) else None
            recipe = replace(recipe, reason=None, chat=chat)
        return recipe.with_absolute_paths()

    def _plain(self) -> Recipe:
        config = self.model.config
        if not isinstance(config, ModelConfig):
            raise ValueError(f"{str(self.folder)!r} is of {config.model_type}: allowed are models of V4")
        self.spelling()
        length = min(DataConfig.sequence_length, config.max_position_embeddings)
        return Recipe(self.name, config, DataConfig(sequence_length=length, tokenizer=str(self.folder)))

    def spelling(self) -> Tokenizer:
        """Its tokenizer. Raises ValueError, or FileNotFoundError, where there is none."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.recipe is not None:
            raise ValueError(f"{str(self.folder)!r} was trained on {self.recipe.data.source}: its tokens spell no text")
        raise FileNotFoundError(f"{str(self.folder)!r} has no tokenizer.json: say which to take (--tokenizer)")


def open_model(path: Path | str, device: str = "auto", tokenizer: str | None = None) -> Loaded:
    """The model that a path means: a run (its newest checkpoint), a checkpoint, or a folder with config.json.

    Args:
        tokenizer: "bytes" or a path; None = the folder's own.

    Raises:
        FileNotFoundError: none of them.
        ValueError: what is there is broken or not whole, or the tokenizer does not fit the model.
    """

    def load(folder: Path) -> Loaded:
        if (folder / STATE).is_file():
            recipe = checkpoint.read_state(folder)[0]
            tokens = tokenizer_of(folder) if tokenizer is None else load_tokenizer(tokenizer)
            return Loaded(folder, _load(folder, device)[0], tokens, recipe)
        tokens = load_tokenizer(tokenizer or folder) if tokenizer or (folder / "tokenizer.json").is_file() else None
        model = load_pretrained(folder, device=choose_device(device)).eval()
        if len({tensor.dtype for name, tensor in model.named_parameters() if name not in kept(model)}) > 1:
            model = model.float()  # of quantised weights beside others, to compute in one dtype
        return Loaded(folder, model, tokens, None)

    return using(path, load, located)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """That of a checkpoint; None where it was trained on a planted task."""
    return None if checkpoint.spells_nothing(folder) else checkpoint.tokenizer_of(folder)


def load_trained(path: Path | str, device: str = "auto") -> tuple[Transformer, Recipe]:
    """The model of a checkpoint (or of a run's newest), ready for inference, and its recipe."""
    return using(path, lambda folder: _load(folder, device), checkpoint.find)


def prepared(recipe: Recipe) -> Callable[[Transformer], None] | None:
    """The code of one's own that changes a recipe's model. Raises PermissionError where it is not allowed."""
    return own.load(recipe.train.prepare) if recipe.train.prepare else None


def _load(folder: Path, device: str) -> tuple[Transformer, Recipe]:
    recipe, progress = checkpoint.read_state(folder)
    prepare, changed = prepared(recipe), description(folder).get("prepared", "")
    if changed != recipe.train.prepare:
        raise ValueError(f"{str(folder)!r}: its model was changed by {changed}, which its recipe does not name")
    if not prepare:
        checkpoint.check_size(folder, recipe.model)
    with places(recipe, None):
        model = Transformer(recipe.model).to(choose_device(device))
    if prepare:
        prepare(model)
        model.changed_by = changed
    checkpoint.load_model(folder, model)
    model.attention_stage = Schedule(recipe).last(progress.step).attention
    return model.eval(), recipe


def start_from(path: Path | str, model: Transformer, changed: str = "") -> list[str]:
    """Gives a new model the weights of a run, a checkpoint or a folder of weights; says what its [model] has otherwise.

    changed: by which code of one's own the model was.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of another model; the message names the keys that differ.
    """

    def load(folder: Path) -> list[str]:
        before = description(folder).get("prepared", "")
        if before and not changed:
            raise ValueError(f"train.init={str(folder)!r}: its model was changed by {before}: give train.prepare too")
        told = _told(folder, model.config)
        if before != changed:
            told.append(f"train.prepare: {before!r} -> {changed!r}")
        if (folder / STATE).is_file():
            checkpoint.load_model(folder, model)
        else:
            model.load_state_dict(load_pretrained(folder, dtype=torch.float32).state_dict())
        return told

    return using(path, load, located)


def _told(folder: Path, config: ModelConfig) -> list[str]:
    there, here = config_in(folder).to_dict(), config.to_dict()
    changed = {
        key: (there.get(key), here.get(key)) for key in sorted({*there, *here}) if there.get(key) != here.get(key)
    }
    texts = {key: f"model.{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items()}
    wrong = [text for key, text in texts.items() if key not in FREE]
    if wrong:
        raise ValueError(f"train.init={str(folder)!r} is of another model: {'; '.join(wrong)}")
    return [text for key, text in texts.items() if key != "torch_dtype"]
