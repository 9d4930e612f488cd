"""The model of a run, ready for use."""

from pathlib import Path

from ...model import Transformer
from ..distributed.world import choose_device
from ..recipe import Recipe
from . import checkpoint
from .schedule import Schedule
from .tables import places


def load_trained(path: Path | str, device: str = "auto") -> tuple[Transformer, Recipe]:
    """The model of a checkpoint (or of a run's newest), ready for inference, and its recipe.

    Where a run that goes on has removed its newest meanwhile, there is another.
    """
    folder = checkpoint.find(path)
    try:
        return _load(folder, device)
    except (OSError, ValueError, RuntimeError):
        if folder.exists():
            raise
        return load_trained(path, device)


def _load(folder: Path, device: str) -> tuple[Transformer, Recipe]:
    recipe, progress = checkpoint.read_state(folder)
    checkpoint.check_size(folder, recipe.model)
    with places(recipe, None):
        model = Transformer(recipe.model).to(choose_device(device))
    checkpoint.load_model(folder, model)
    model.attention_stage = Schedule(recipe).last(progress.step).attention
    return model.eval(), recipe
