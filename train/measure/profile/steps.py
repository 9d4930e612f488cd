"""The two steps that are profiled, as training and generation run them; observers are told where their phases begin."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....model import Transformer
from ....model.config import ModelConfig
from ....model.decode import decoder
from ....model.generation.prefill import prefill
from ...data.rows import Batch
from ...optim import build_optimizer
from ...run.step import Stepper
from ...run.tables import Tables, named_tables, places
from ...start import open_source
from .observe import Observer
from .preset import Preset


class TrainingStep:
    """The first step of a recipe's training, again and again, from new weights."""

    def __init__(self, preset: Preset, device: torch.device, folder: Path) -> None:
        """folder: of Engram tables that are mapped to a file."""
        self.preset, self.recipe, self.number = preset, preset.recipe, 0
        self.phase, self.batch = preset.phase, make_batch(preset)
        torch.manual_seed(self.recipe.train.seed)
        with places(self.recipe, folder), device:
            self.model = Transformer(self.recipe.model)
        self.model.recompute = self.recipe.train.recompute
        self.optimizer = build_optimizer(self.model, self.recipe.optim)
        self.tables = Tables(self.model)
        self.stepper = Stepper(self.model, self.optimizer, self.recipe, device)
        self.stepper.dtype = getattr(torch, preset.dtype)

    def run(self, observer: Observer) -> dict[str, float]:
        """One step; returns its losses. The weights move: in time and memory a step is like the one before."""
        observer.phase("forward")
        if self.tables.tables:
            observer.enter("Engram")
            self.tables.begin(self.number, lambda _: self.batch)
            observer.leave()
        done = self.stepper.gradients(self.phase, self.batch, look=observer)
        self.stepper.update(self.phase, observer)
        self.tables.end()
        observer.phase(None)
        self.number += 1
        return {name: float(loss) for name, loss in done.losses.items()}

    def bytes_by_owner(self, owner: dict[Tensor, str]) -> dict[str, dict[str, int]]:
        """Bytes of parameters, gradients and optimizer states by mechanism; gradients are of the parameters' size.

        Tables whose rows are kept apart count with all rows, wherever they lie; they have no gradient between steps.
        """
        found: dict[str, dict[str, int]] = {}
        for parameter, mechanism in owner.items():
            row = found.setdefault(mechanism, {"parameters": 0, "gradients": 0, "optimizer": 0})
            states = self.optimizer.state.get(parameter, {}).values()
            row["parameters"] += parameter.nbytes
            row["gradients"] += parameter.nbytes
            row["optimizer"] += sum(x.nbytes for x in states if isinstance(x, Tensor))
        for table in named_tables(self.model).values():
            found["Engram"]["parameters"] += table.weight.nbytes
            found["Engram"]["optimizer"] += sum(x.nbytes for name, x in table.store.items() if name != "weight")
        return found


class DecodeStep:
    """One token after another behind `length` tokens, for each sequence of the batch, with logits.

    An entry is written every m tokens: only a whole `cycle` of tokens costs what decoding costs on average.
    """

    def __init__(self, preset: Preset, model: Transformer, tokens: int) -> None:
        """tokens: how many will be decoded in all. Reads `preset.decode_length` random tokens first."""
        config, seed, device = preset.recipe.model, preset.recipe.train.seed, model.head.weight.device
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(config.vocab_size, (preset.decode_batch, preset.decode_length + 1), generator=generator)
        ids = ids.to(device)
        self.cache = self.model.new_cache(preset.decode_batch, preset.decode_length + tokens)
        prefill(self.model, ids[:, :-1], self.cache)
        self.token = ids[:, -1:]

    @property
    def path(self) -> str:
        """ "numpy" where the model decodes in `model.decode`, "torch" where its modules run."""
        step = self.cache.begin(self.model.config, self.token, None)
        return "numpy" if self.cache.dtype == torch.float32 and decoder(self.model, step) else "torch"

    @torch.no_grad()
    def run(self, observer: Observer) -> None:
        observer.phase("decode")
        out = self.model(self.token, cache=self.cache)
        observer.enter("loss and head")
        logits = out.logits
        observer.leave()
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        observer.phase(None)


def cycle(config: ModelConfig) -> int:
    """Tokens after which every compressor has written the same number of entries again."""
    return math.lcm(*(ratio for ratio in config.compress_ratios if ratio))


def to_decode(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A trained model's weights in `dtype`, but for those that the release keeps in float32, for generation."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            like = dict(Transformer(model.config).named_parameters())
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        weight.grad = None
        if name in like:
            weight.data = weight.data.to(like[name].dtype)
    for name, table in named_tables(model).items():  # its moments are not needed any more
        table.store = {"weight": table.weight.to(like[name].dtype)}
    model.recompute, model.attention_stage = 0, "sparse"
    return model.eval()


def make_batch(preset: Preset) -> Batch:
    """The first batch of a recipe's training; of a released configuration, random tokens of one document each."""
    phase, recipe = preset.phase, preset.recipe
    if preset.reads_text:
        return open_source(recipe).batch(phase.rows, phase.length, phase.stage)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    ids = torch.randint(recipe.model.vocab_size, (len(phase.rows), phase.length + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, 1:]))


def memory_of(device: torch.device) -> dict[str, Any]:
    """What CUDA's allocator holds now and held at most since its peak was reset; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }
