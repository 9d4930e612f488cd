"""The two steps that are profiled, as training and generation run them; observers are told where their phases begin."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ....model import Transformer
from ....model import transformer as transformer_module
from ....model.config import ModelConfig
from ....model.generation.prefill import prefill
from ...data.corpus import load_corpus
from ...data.rows import Batch, train_batch
from ...optim import build_optimizer, set_learning_rate
from ...recipe import Recipe
from ...run.schedule import learning_rate
from ...run.tables import Tables, named_tables, places
from .observe import OPTIMIZER, Observer
from .preset import Preset


class TrainingStep:
    """Forward, backward, clipping, AdamW and the router's bias, again and again on one batch, from new weights."""

    def __init__(self, preset: Preset, device: torch.device, folder: Path) -> None:
        """folder: of Engram tables that are mapped to a file."""
        self.preset, self.device, self.number = preset, device, 0
        self.dtype = getattr(torch, preset.dtype)
        self.host_batch = make_batch(preset)
        self.batch = self.host_batch.to(device)
        torch.manual_seed(preset.train.seed)
        with places(cast(Recipe, preset), folder):
            self.model = Transformer(preset.model).to(device)
        self.model.recompute = preset.train.recompute
        self.optimizer = build_optimizer(self.model, preset.optim)
        self.tables = Tables(self.model)
        set_learning_rate(self.optimizer, learning_rate(0, preset.train.steps, preset.optim))

    def run(self, observer: Observer) -> dict[str, float]:
        """One step; returns its losses. The weights move: in time and memory a step is like the one before."""
        batch, model = self.batch, self.model.train()
        observer.phase("forward")
        if self.tables.tables:
            observer.enter("Engram")
            self.tables.begin(self.number, lambda _: self.host_batch)
            observer.leave()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = model(batch.ids, targets=batch.targets, documents=batch.documents)
        losses = {"loss": out.loss.item(), **{name: part.item() for name, part in out.losses.items()}}
        observer.phase(None)
        observer.follow(out.loss)
        observer.phase("backward")
        out.loss.backward()
        observer.phase(OPTIMIZER)
        clip_grad_norm_(model.parameters(), self.preset.optim.grad_clip or math.inf).item()
        self.optimizer.step()
        self.tables.end()
        self.optimizer.zero_grad()
        model.update_router_bias(self.preset.model.router_bias_update_speed)
        observer.phase(None)
        self.number += 1
        return losses

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

    def __init__(self, preset: Preset, device: torch.device, tokens: int) -> None:
        """tokens: how many will be decoded in all. Reads `preset.decode_length` random tokens first."""
        self.device, config = device, preset.model
        self.model = new_model(config, getattr(torch, preset.dtype), device, preset.train.seed)
        generator = torch.Generator().manual_seed(preset.train.seed)
        ids = torch.randint(config.vocab_size, (preset.decode_batch, preset.decode_length + 1), generator=generator)
        ids = ids.to(device)
        self.cache = self.model.new_cache(preset.decode_batch, preset.decode_length + tokens)
        prefill(self.model, ids[:, :-1], self.cache)
        self.token = ids[:, -1:]

    @property
    def path(self) -> str:
        """ "numpy" where the model decodes in `model.decode`, "torch" where its modules run."""
        step = self.cache.begin(self.model.config, self.token, None)
        numpy = self.cache.dtype == torch.float32 and transformer_module.decoder(self.model, step)
        return "numpy" if numpy else "torch"

    @torch.no_grad()
    def run(self, observer: Observer) -> None:
        observer.phase("decode")
        self.token = self.model(self.token, cache=self.cache).logits[:, -1].argmax(-1, keepdim=True)
        observer.phase(None)


def cycle(config: ModelConfig) -> int:
    """Tokens after which every compressor has written the same number of entries again."""
    return math.lcm(*(ratio for ratio in config.compress_ratios if ratio))


def new_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Transformer:
    """New weights in `dtype`, but for those that the release keeps in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(seed)
        return Transformer(config).to(device).eval()
    finally:
        torch.set_default_dtype(before)


def make_batch(preset: Preset) -> Batch:
    """The first batch of a recipe's training; of a released configuration, random tokens of one document each."""
    length, rows = preset.data.sequence_length, preset.data.batch_size
    if preset.reads_text:
        corpus = load_corpus(preset.data.source, preset.data.held_out_fraction)
        return train_batch(corpus, length, rows, preset.train.seed, 0)
    generator = torch.Generator().manual_seed(preset.train.seed)
    ids = torch.randint(preset.model.vocab_size, (rows, length + 1), generator=generator)
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
