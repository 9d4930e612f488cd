"""The training loop: batch, forward, backward, clip, AdamW, router bias, one line of metrics; and what surrounds it.

    DIR/run.json  metrics.jsonl  checkpoints/step-*/  curves.png  sample.txt

A step depends on the weights, the optimizer's moments, the random generators and its own number, nothing else: all of
them are in a checkpoint, so on a CPU a resumed run continues with the same bits (same machine, same number of threads).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ..model import Transformer, generate
from . import checkpoint, metrics, provenance
from .checkpoint import Progress
from .data import IGNORED, Batch
from .observe import Blind, Observer
from .optim import build_optimizer, learning_rate, set_learning_rate
from .progress import ProgressLine
from .recipe import Recipe, differences
from .source import open_source
from .tables import Tables, places
from .tensorboard import TensorBoard
from .tokens import decode, encode

SAMPLE = "sample.txt"


class TrainingDiverged(FloatingPointError):
    """A loss, a gradient norm or an evaluation that is not a finite number."""


@dataclass(frozen=True)
class Summary:
    """What a run reached: the source's scores, and those as lines for people; `cut`: by the clock."""

    out: Path
    checkpoint: Path
    progress: Progress
    steps: int
    cut: bool
    scores: dict[str, Any]
    report: dict[str, str]
    sample: str


def train(
    recipe: Recipe,
    out: Path | str,
    resume: Path | str | None = None,
    stop_at: int | None = None,
    shown: bool = True,
    prepare: Callable[[Transformer], None] | None = None,
) -> Summary:
    """Trains `recipe` in folder `out`, from the start or from the checkpoint (or newest of the run) `resume`.

    `stop_at` ends the run early after that step, with a checkpoint, as if it had been interrupted there. `prepare` may
    change the model as soon as it is built: an experiment's variant of it.

    Raises:
        FileExistsError: `out` holds a run and this is no resumption of it.
        ValueError: the checkpoint's model is another one, or later checkpoints lie in `out`.
        TrainingDiverged: a loss, a gradient norm or an evaluation is not finite; the message names the step.
    """
    run = _kind(recipe)(recipe, Path(out), checkpoint.find(resume) if resume else None, shown, prepare)
    try:
        run.loop(stop_at or recipe.train.steps)
    finally:
        run.close()
    return run.finish()


def _kind(recipe: Recipe) -> type["Run"]:
    """The kind of run that a recipe asks for."""
    if recipe.grpo is None:
        return Run
    from .reason.loop import GrpoRun

    return GrpoRun


class Run:
    """A training in progress: model, optimizer, data, files."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        resumed: Path | None,
        shown: bool,
        prepare: Callable[[Transformer], None] | None = None,
    ):
        self.recipe, self.out, self.saved = recipe, out, resumed
        _check_folder(out, resumed)
        if resumed:
            _check_same_model(recipe, resumed)
        self.device = choose_device(recipe.train.device)
        self.dtype = getattr(torch, recipe.train.dtype)
        self.source = open_source(recipe)
        torch.manual_seed(recipe.train.seed)
        with places(recipe, out):
            self.model = Transformer(recipe.model).to(self.device)
        if prepare:
            prepare(self.model)
        self.model.recompute = recipe.train.recompute
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.tables = Tables(self.model)
        self.observer = Observer(self.model)
        self.progress = Progress()
        if resumed:
            self.progress = checkpoint.read_state(resumed)[1]
            checkpoint.restore(resumed, self.model, self.optimizer)
        elif recipe.train.init:
            initial = checkpoint.find(recipe.train.init)
            _check_same_model(recipe, initial)
            checkpoint.load_model(initial, self.model)
        self._open(resumed, shown)

    def _open(self, resumed: Path | None, shown: bool) -> None:
        step, parameters = self.progress.step, sum(p.numel() for p in self.model.parameters()) + self.tables.numel()
        self.out.mkdir(parents=True, exist_ok=True)
        self.metrics = metrics.MetricsFile(self.out, step, resumed.parents[1] if resumed else None)
        self.board = TensorBoard(self.out, step) if self.recipe.train.tensorboard else None
        provenance.write(self.out, self.recipe, self.source, self.device, parameters, step)
        self.line = ProgressLine(step, self.recipe.train.steps, self.recipe.train.log_every, shown)
        if shown:
            start = f"step {step} of {resumed}" if resumed else self.recipe.train.init or "new weights"
            self.line.say(f"{self.recipe.name}: {parameters:,} parameters on {self.device}, from {start}")
            self.line.say(self.source.describe())
        self.began = time.perf_counter() - self.progress.seconds
        self.scores: dict[str, Any] = {}
        self.cut = False

    def loop(self, stop: int) -> None:
        """Steps until `stop` or until the clock says so; evaluates and saves on the way and at the end."""
        steps, minutes = self.recipe.train.steps, self.recipe.train.minutes
        while self.progress.step < stop and not self.cut:
            record = self.step()
            step = self.progress.step
            self.cut = step < stop and bool(minutes) and self.seconds() >= 60 * minutes
            last = self.cut or step == stop
            if step == steps or self.cut or _due(step, self.recipe.train.eval_every):
                record |= self.evaluate()
                self.line.report(step, self.source.report(self.scores))
            self.metrics.write(record)
            if self.board:
                self.board.write(record)
            self.line.step(record)
            if last or _due(step, self.recipe.train.checkpoint_every):
                self.save()
        if self.cut:
            self.line.say(
                f"stopped by train.minutes={minutes:g} after step {self.progress.step} of {steps}: the learning rate"
                " had not fallen to its end; lower train.steps or raise train.minutes"
            )

    def step(self) -> dict[str, Any]:
        """One optimizer step and its record."""
        began, number = time.perf_counter(), self.progress.step
        optim, train = self.recipe.optim, self.recipe.train
        batch = self.batch(number).to(self.device)
        self.tables.begin(number, self.batch)
        lr = learning_rate(number, train.steps, optim)
        set_learning_rate(self.optimizer, lr)
        self.model.train()
        look = self.observer if _due(number + 1, train.observe_every) else Blind()
        with look.watching(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(batch.ids, targets=batch.targets, documents=batch.documents)
        losses = {"loss": out.loss.item(), **{name: part.item() for name, part in out.losses.items()}}
        out.loss.backward()
        look.gradients()
        norm = clip_grad_norm_(self.model.parameters(), optim.grad_clip or math.inf).item()
        self._check_finite(number + 1, {**losses, "grad_norm": norm})
        with look.updating():
            self.optimizer.step()
        self.tables.end()
        self.optimizer.zero_grad()
        self.model.update_router_bias(self.recipe.model.router_bias_update_speed)
        tokens = int((batch.targets != IGNORED).sum())
        self.progress = Progress(number + 1, self.progress.tokens + tokens, self.seconds())
        speed = tokens / (time.perf_counter() - began)
        return self._record(losses, norm, lr, speed, out.metrics) | look.record

    def batch(self, number: int) -> Batch:
        """The batch of step `number` (from 0), on the host."""
        rows = self.recipe.data.batch_size
        return self.source.batch(range(number * rows, (number + 1) * rows), self.recipe.data.sequence_length)

    def _record(
        self, losses: dict[str, float], norm: float, lr: float, speed: float, measured: dict[str, Tensor]
    ) -> dict[str, Any]:
        so_far = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
        }
        speeds = {
            "tokens_per_second": round(speed, 1),
            "peak_memory_gib": round(metrics.peak_memory_gib(self.device), 4),
        }
        return {**so_far, **losses, "lr": lr, "grad_norm": norm, **metrics.model_record(measured), **speeds}

    def evaluate(self) -> dict[str, Any]:
        """The source's scores of the model as it is now."""
        scores = self.source.evaluate(self.model, self.dtype)
        self._check_finite(self.progress.step, {k: v for k, v in scores.items() if isinstance(v, float)})
        self.scores = scores
        return scores

    def save(self) -> Path:
        self.metrics.sync()
        self.progress = Progress(self.progress.step, self.progress.tokens, self.seconds())
        keep = self.recipe.train.keep
        self.saved = checkpoint.save(self.out, self.model, self.optimizer, self.recipe, self.progress, keep)
        return self.saved

    def finish(self) -> Summary:
        """The summary, with a sample; evaluates and saves if the loop had nothing left to do."""
        if not self.scores:
            self.evaluate()
        saved = self.saved or self.save()
        sample = self.sample()
        if sample:
            (self.out / SAMPLE).write_text(sample)
        steps, report = self.recipe.train.steps, self.source.report(self.scores)
        return Summary(self.out, saved, self.progress, steps, self.cut, self.scores, report, sample)

    def sample(self) -> str:
        """Text that the model writes on from the recipe's prompt (temperature 0.8, top-p 0.95)."""
        count, prompt = self.recipe.train.sample_tokens, self.recipe.train.sample_prompt
        if not count:
            return ""
        ids = torch.tensor([encode(prompt)], device=self.device)
        self.model.eval()
        seed = self.recipe.train.seed
        written = generate(self.model, ids, max_new_tokens=count, temperature=0.8, top_p=0.95, seed=seed)
        return prompt + decode(int(token) for token in written)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def close(self) -> None:
        self.line.close()
        self.metrics.close()
        if self.board:
            self.board.close()

    def _check_finite(self, step: int, numbers: dict[str, float]) -> None:
        if all(map(math.isfinite, numbers.values())):
            return
        listed = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
        last = checkpoint.checkpoints(self.out)
        raise TrainingDiverged(
            f"step {step}: not every number is finite ({listed}); training stopped before it could spread. "
            f"The last checkpoint is {last[-1] if last else 'none'}; try a lower optim.lr or more optim.warmup_steps"
        )


def load_trained(path: Path | str, device: str = "auto") -> tuple[Transformer, Recipe]:
    """The model of a checkpoint (or of a run's newest), ready for inference, and its recipe."""
    folder = checkpoint.find(path)
    recipe = checkpoint.read_state(folder)[0]
    with places(recipe, None):
        model = Transformer(recipe.model).to(choose_device(device))
    checkpoint.load_model(folder, model)
    return model.eval(), recipe


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is a device. Raises ValueError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"train.device={name!r}: allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _check_folder(out: Path, resumed: Path | None) -> None:
    """A folder takes one run: a new one, or the continuation of its own newest checkpoint."""
    if resumed is None or resumed.resolve().parents[1] != out.resolve():
        if (out / metrics.FILE).exists() or checkpoint.checkpoints(out):
            raise FileExistsError(
                f"{str(out)!r} already holds a run: resume it (--resume {out}) or choose another --out"
            )
    elif checkpoint.find(out).name != resumed.name:
        newest = checkpoint.find(out).name
        raise ValueError(f"{str(out)!r} holds a later checkpoint ({newest}): resume from that, or choose another --out")


def _check_same_model(recipe: Recipe, resumed: Path) -> None:
    changed = [text for text in differences(checkpoint.read_state(resumed)[0], recipe) if text.startswith("model.")]
    if changed:
        raise ValueError(f"{str(resumed)!r} is a checkpoint of another model: {'; '.join(changed)}")
