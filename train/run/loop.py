"""The training loop: step after step as the schedule says, one line of metrics each; and what surrounds it.

    DIR/run.json  metrics.jsonl  checkpoints/step-*/  sample.txt      and, as long as it runs, .writer
        opponents.json  curves.png                                    by the command, at the end

A step depends on the weights, the optimizer's moments, the random generators, what the run remembers of its losses and
its own number, nothing else: all of them are in a checkpoint, so on a CPU a run that was killed at any moment continues
with the same bits (same machine, same number of threads).
"""

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ...model import Transformer, generate
from ...model.disk import write_text
from ...model.folders import description
from ..data.rows import Batch
from ..data.source import Source
from ..data.tokenizers import ByteTokenizer, Tokenizer, canonical_ids
from ..distributed.shard import shard, split_by_mesh, whole_model
from ..distributed.world import ALONE, Nowhere, World, choose_device, own_device
from ..optim import build_optimizer
from ..recipe import Recipe, differences
from . import checkpoint, graph, metrics, provenance
from .checkpoint import NOTHING, Progress
from .diagnose import bad_weight, culprit
from .folder import nothing_to_check
from .graph import GraphStepper
from .line import Line, Lines, Stopwatch
from .load import prepared, start_from
from .loggers import Loggers
from .observe import Observer
from .progress import ProgressLine
from .schedule import Phase, Schedule
from .stability import Stability
from .step import BLIND, Experts, Outcome, Stepper
from .stop import Stopped
from .tables import Tables, places

SAMPLE = "sample.txt"


class TrainingDiverged(FloatingPointError):
    """A loss, a gradient norm, an evaluation or a weight that is not a finite number."""


@dataclass(frozen=True)
class Summary:
    """What a run reached: its source's scores, and those as lines for people; `cut`: by the clock."""

    out: Path
    checkpoint: Path
    progress: Progress
    steps: int
    cut: bool
    scores: dict[str, Any]
    report: dict[str, str]
    sample: str
    source: Source


class Run:
    """A training in progress: model, optimizer, data, files."""

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        out: Path,
        resumed: Path | None,
        shown: bool,
        prepare: Callable[[Transformer], None] | None = None,
        world: World = ALONE,
        held: Callable[[], None] = nothing_to_check,
    ):
        self.held = held
        self.asked: Sequence[int] = ()  # signals to end
        self.recipe, self.source, self.out, self.saved, self.world = recipe, source, out, resumed, world
        _check_folder(out, resumed)
        if resumed:
            _check_same_model(recipe, resumed)
            _check_same_kind(recipe, resumed)
        self.device = own_device(choose_device(recipe.train.device), world.size)
        if recipe.train.graph:
            graph.check(recipe, self.device, world)
        self.dtype = getattr(torch, recipe.train.dtype)
        changes = [change for change in (prepared(recipe), prepare) if change]
        _check_sample(recipe, source.tokenizer)
        if resumed:
            _check_same_tokenizer(self.source.tokenizer, resumed)
        if resumed and not changes:
            checkpoint.check_size(resumed, recipe.model)
        torch.manual_seed(recipe.train.seed)
        with places(recipe, out):
            self.model = Transformer(recipe.model).to(self.device)
        _compress_vocabulary(self.model, source.tokenizer)
        told = [recipe.train.prepare] if recipe.train.prepare else []
        for change in changes:
            before = _built_of(self.model)
            change(self.model)
            if change is prepare and _built_of(self.model) != before:
                told.append(getattr(prepare, "__qualname__", repr(prepare)))
        self.prepared = " and ".join(told)
        self.model.changed_by = self.prepared
        if resumed:
            _check_same_code(self.prepared, resumed)
        init = "" if resumed else recipe.train.init
        self.differs = start_from(init, self.model, self.prepared) if init else []
        self.model.recompute = recipe.train.recompute
        shard(self.model, world)
        self.optimizer = split_by_mesh(build_optimizer(self.model, recipe.optim))
        self.tables = Tables(self.model)
        self.observer = Observer(self.model)
        self.schedule = Schedule(recipe)
        self.stepper = Stepper(self.model, self.optimizer, recipe, self.device, world)
        self.graphs = GraphStepper(self.stepper) if recipe.train.graph else None
        self.stability = Stability(recipe.stability) if recipe.stability else None
        at_once = self.device.type == "cpu" or self.stability is not None
        self.lines = Lines(self._write, 0 if at_once else recipe.train.log_every)
        self.progress = Progress()
        if resumed:
            self._restore(resumed)
        self.model.attention_stage = self.schedule.last(self.progress.step).attention
        self._open(resumed, shown)

    def _restore(self, folder: Path) -> None:
        self.progress = checkpoint.read_state(folder)[1]
        checkpoint.restore(folder, self.model, self.optimizer)
        if self.stability:
            self.stability.load(checkpoint.read_memory(folder))

    def _open(self, resumed: Path | None, shown: bool) -> None:
        step, parameters = self.progress.step, sum(p.numel() for p in self.model.parameters()) + self.tables.numel()
        self.held()
        changed = _changes(self.recipe, self.source, self.out, resumed)
        self.world.barrier()  # every process has looked at the folder as it was
        origin = checkpoint.run_of(resumed) if resumed else None
        if self.world.first:
            metrics.up_to(origin or self.out, step)  # what is broken there is told before anything is written
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.tidy(self.out, self.recipe.train.keep)
            provenance.write(
                *(self.out, self.recipe, self.source, self.device, parameters, step, self.world.size),
                changed=changed,
            )
        self._open_metrics(origin)
        steps, every = self.recipe.train.steps, self.recipe.train.log_every
        in_bytes = isinstance(self.source.tokenizer, ByteTokenizer)
        self.line: Any = ProgressLine(step, steps, every, shown, in_bytes) if self.world.first else Nowhere()
        for text in changed:
            self.line.say(f"changed  {text}")
        if shown:
            start = f"step {step} of {resumed}" if resumed else self.recipe.train.init or "new weights"
            where = str(self.device) if self.world.size == 1 else f"{self.world.size} processes ({self.device.type})"
            self.line.say(f"{self.recipe.name}: {parameters:,} parameters on {where}, from {start}")
            for text in self.differs:
                self.line.say(f"differs  {text}")
            self.line.say(self.source.describe())
        self.began = time.perf_counter() - self.progress.seconds
        self.scores: dict[str, Any] = {}
        self.cut = False

    def _open_metrics(self, source: Path | None = None) -> None:
        """To be gone on with behind the present step."""
        step, first = self.progress.step, self.world.first
        self.metrics = metrics.MetricsFile(self.out, step, source) if first else Nowhere()
        self.loggers = Loggers(self.out, self.recipe, step) if first else Nowhere()

    def loop(self, stop: int) -> None:
        """Steps until `stop` or until the clock says so; evaluates and saves on the way and at the end.

        Raises:
            Stopped, BrokenPipeError: a signal asked for the end, or nobody reads what is said; all is saved.
        """
        steps, minutes = self.recipe.train.steps, self.recipe.train.minutes
        if self.stability and not checkpoint.checkpoints(self.out):
            self.save()
        asked = self._is_asked()
        while self.progress.step < stop and not (self.cut or asked):
            line = self.step()
            if line is None:
                asked = self._is_asked()
                continue
            step = self.progress.step
            self.cut = step < stop and bool(minutes) and self.world.agree(self.seconds()) >= 60 * minutes
            if step == steps or self.cut or _due(step, self.recipe.train.eval_every):
                self.lines.flush()
                self._check_line(line)
                line.record |= self.evaluate()
                self.line.report(step, self.source.report(self.scores))
            self.lines.add(line)
            asked = self._is_asked()
            if asked or self.cut or step == stop or _due(step, self.recipe.train.checkpoint_every):
                self.save()
        if asked:
            self._end()
        if self.cut:
            self.line.say(
                f"stopped by train.minutes={minutes:g} after step {self.progress.step} of {steps}: the learning rate"
                " had not fallen to its end; lower train.steps or raise train.minutes"
            )

    def _is_asked(self) -> bool:
        """Whether the run is to end before its time. One of several processes that is not heard ends at once."""
        lost = self.line.lost if self.world.first else None
        if lost and self.world.size > 1:
            raise lost
        return bool(self.asked or lost)

    def _end(self) -> NoReturn:
        if not checkpoint.checkpoints(self.out):
            self.save()
        if not self.asked:
            raise self.line.lost
        done = f"stopped after step {self.progress.step} of {self.recipe.train.steps}"
        raise Stopped(f"{done}; go on with: abyssal train --resume {shlex.quote(str(self.out))}", self.asked[0])

    def step(self) -> Line | None:
        """One optimizer step and its line; None if its loss was a spike and the run went back."""
        watch, began, number = Stopwatch(self.device), time.perf_counter(), self.progress.step
        phase, experts = self.schedule.phase(number), self._experts(number)
        chosen = time.perf_counter() - began
        batch = self.batch(number)
        self.tables.begin(number, self.batch)
        observed = _due(number + 1, self.recipe.train.observe_every)
        look = self.observer if observed else BLIND
        graphs = None if observed else self.graphs
        done = graphs.gradients(phase, batch) if graphs else self.stepper.gradients(phase, batch, experts, look)
        if self._is_spike(phase, done):
            self._go_back(number, float(done.losses["lm"]))
            return None
        graphs.update(phase) if graphs else self.stepper.update(phase, look)
        self.tables.end()
        self.progress = Progress(number + 1, self.progress.tokens + done.tokens, self.seconds())
        watch.stop()
        ahead = {} if experts is None else {"anticipatory": 1, "anticipation_seconds": round(chosen, 4)}
        record = {**self._record(phase, done, watch), **look.record, **ahead}
        return Line(record, lambda: self._again(phase, batch, experts))

    def _again(self, phase: Phase, batch: Batch, experts: list[Experts] | None) -> None:
        """The passes of a step once more, forward and backward."""
        self.stepper.forget()
        self.tables.begin(phase.step, self.batch)
        self.stepper.gradients(phase, batch, experts)

    def _write(self, line: Line) -> None:
        """A line whose step is over, to where lines go."""
        self._check_line(line)
        self.metrics.write(line.record)
        self.loggers.write(line.record)
        self.line.step(line.record)

    def _check_line(self, line: Line) -> None:
        """A run whose step was not finite ends."""
        again = line.again
        cause = (lambda: culprit(self.model, again, self.world)) if again else None
        self._check_finite(line.record["step"], line.numbers, cause)

    def batch(self, number: int) -> Batch:
        """This process' part of the batch of step `number` (from 0), on the host."""
        phase = self.schedule.phase(number)
        return self.source.batch(self.world.share(phase.rows), phase.length, phase.stage)

    def _record(self, phase: Phase, done: Outcome, watch: Stopwatch) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
            **done.losses,
            "lr": phase.lr,
            "grad_norm": done.norm,
            **metrics.model_record(done.metrics),
            "tokens_per_second": lambda tokens=done.tokens: round(tokens / watch.seconds(), 1),
            "peak_memory_gib": round(metrics.peak_memory_gib(self.device), 4),
        }
        if self.recipe.stages or self.recipe.schedule.batch_ramp_steps:
            rows, length = len(phase.rows), phase.length
            record |= {"stage": phase.stage, "attention": phase.attention, "rows": rows, "length": length}
        back = self.stability.watch.gone_back_to(phase.step) if self.stability else []
        return {**record, "went_back": back} if back else record

    def _experts(self, number: int) -> list[Experts] | None:
        """Those chosen ahead for a step with anticipatory routing, one set for each of its passes."""
        if self.stability is None:
            return None
        return self.stability.experts(
            number, lambda step: self.stepper.experts(self.schedule.phase(step), self.batch(step))
        )

    def _is_spike(self, phase: Phase, done: Outcome) -> bool:
        """Needs the loss before the update: a run with [stability] waits for it in every step."""
        if self.stability is None or phase.indexer_only:
            return False
        loss = float(done.losses["lm"])
        return math.isfinite(loss) and self.stability.watch.sees(phase.step, phase.stage, loss)

    def _go_back(self, number: int, loss: float) -> None:
        """Drops step `number` and goes on from the newest checkpoint before it."""
        assert self.stability is not None
        self.held()
        self.stepper.forget()
        self.tables.end()
        now, seconds = self.stability.watch, self.seconds()
        folder = checkpoint.go_back(self.out, number)
        self._restore(folder)
        self.stability.watch = now.went_back(number, loss, self.progress.step, self.stability.watch)
        self.progress = Progress(self.progress.step, self.progress.tokens, seconds)
        self.saved, self.tables = folder, Tables(self.model)
        self.close_metrics()
        self._open_metrics()
        spike, until = self.stability.watch.spikes[-1], self.stability.watch.until
        self.line.say(
            f"step {spike.step}: loss {loss:.3f} is a spike (median {spike.median:.3f}, limit {spike.limit:.3f});"
            f" back to step {spike.to}, experts by earlier weights until step {until}"
        )

    def evaluate(self) -> dict[str, Any]:
        """The source's scores of the model as it is now."""
        scores = self.source.evaluate(whole_model(self.model, self.world), self.dtype)
        self._check_finite(self.progress.step, {k: v for k, v in scores.items() if isinstance(v, float)})
        self.scores = scores
        return scores

    def save(self) -> Path:
        """A checkpoint of the run as it is; never one of weights that are not finite."""
        self.lines.flush()
        weight = self.world.heard(bad_weight(self.model))
        if weight:
            self._stop(f"after step {self.progress.step}: {weight} holds numbers that are not finite;")
        self.held()
        self.metrics.sync()
        self.progress = Progress(self.progress.step, self.progress.tokens, self.seconds())
        keep = self.recipe.train.keep
        memory = self.stability.memory() if self.stability else NOTHING
        self.saved = checkpoint.save(
            *(self.out, self.model, self.optimizer, self.recipe, self.progress, keep, self.world, memory),
            tokenizer=self.source.tokenizer,
            data=self.source.digest,
            prepared=self.prepared,
        )
        if self.world.first:
            provenance.mark_saved(self.out)
        return self.saved

    def finish(self) -> Summary:
        """The summary, with a sample; evaluates and saves if the loop had nothing left to do."""
        if not self.scores:
            self.evaluate()
        saved = self.saved or self.save()
        sample = self.sample()
        self.held()
        if sample:
            write_text(self.out / SAMPLE, sample)
        steps, report = self.recipe.train.steps, self.source.report(self.scores)
        return Summary(self.out, saved, self.progress, steps, self.cut, self.scores, report, sample, self.source)

    def sample(self) -> str:
        """Text that the model writes on from the recipe's prompt (temperature 0.8, top-p 0.95)."""
        count, prompt = self.recipe.train.sample_tokens, self.recipe.train.sample_prompt
        tokenizer = self.source.tokenizer
        if not count or tokenizer is None:
            return ""
        model = whole_model(self.model, self.world).eval()
        if not self.world.first:
            return ""
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]], device=self.device)
        seed = self.recipe.train.seed
        written = generate(model, ids, max_new_tokens=count, temperature=0.8, top_p=0.95, seed=seed)
        return prompt + tokenizer.decode((int(token) for token in written), continues=bool(prompt))

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def close(self) -> None:
        """Ends the run's files; steps that are over have their lines, whatever ended the loop."""
        try:
            self.lines.flush()
        finally:
            self.line.close()
            self.close_metrics()

    def close_metrics(self) -> None:
        self.metrics.close()
        self.loggers.close()

    def _check_finite(self, step: int, numbers: dict[str, float], cause: Callable[[], str] | None = None) -> None:
        """`cause()` says what else is known of a number that is not."""
        if all(map(math.isfinite, numbers.values())):
            return
        listed = ", ".join(f"{name}={value:g}" for name, value in numbers.items())
        known = f" {cause()};" if cause else ""
        self._stop(f"step {step}: not every number is finite ({listed});{known}")

    def _stop(self, why: str) -> NoReturn:
        self.lines.waiting.clear()  # of steps after the bad one
        last = checkpoint.checkpoints(self.out)
        raise TrainingDiverged(
            f"{why} training stopped before it could spread. The last checkpoint is {last[-1] if last else 'none'};"
            " try a lower optim.lr or more optim.warmup_steps"
        )


def _built_of(model: Transformer) -> list[Any]:
    """What a model is built of: its modules, their functions of their own, its tensors. Hooks, which look, are none."""
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if callable(value) and key[0] != "_"})
        for name, module in model.named_modules()
    ]
    return [modules, [(name, tensor.shape) for name, tensor in model.state_dict().items()]]


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _check_folder(out: Path, resumed: Path | None) -> None:
    """A folder takes one run: a new one, or the continuation of its own newest checkpoint."""
    origin = checkpoint.run_of(resumed) if resumed else None
    if resumed is None or origin is None or origin.resolve() != out.resolve():
        if (out / metrics.FILE).exists() or checkpoint.checkpoints(out):
            raise FileExistsError(
                f"{str(out)!r} already holds a run: resume it (--resume {out}) or choose another --out"
            )
    elif not (newest := checkpoint.find(out)).samefile(resumed):
        raise ValueError(
            f"{str(out)!r} holds a later checkpoint ({newest.name}): resume from that, or choose another --out"
        )


def _check_same_model(recipe: Recipe, resumed: Path) -> None:
    changed = [text for text in differences(checkpoint.read_state(resumed)[0], recipe) if text.startswith("model.")]
    if changed:
        raise ValueError(f"{str(resumed)!r} is a checkpoint of another model: {'; '.join(changed)}")


def _check_same_code(prepared: str, resumed: Path) -> None:
    """A model that code of one's own has changed goes on with that code."""
    before = description(resumed).get("prepared", "")
    if before and not prepared:
        raise ValueError(f"{str(resumed)!r}: its model was changed by {before}: go on with train.prepare, or that code")


def _check_same_kind(recipe: Recipe, resumed: Path) -> None:
    """Weights and moments of one kind of run go on in another by train.init alone."""
    before = checkpoint.read_state(resumed)[0]
    for table in ("chat", "reason", "grpo", "distil"):
        if (getattr(before, table) is None) != (getattr(recipe, table) is None):
            there = "without" if getattr(before, table) is None else "with"
            raise ValueError(f"{str(resumed)!r} is of a run {there} [{table}]: start a new one with train.init instead")


def _changes(recipe: Recipe, source: Source, out: Path, resumed: Path | None) -> list[str]:
    """What a resumed run does otherwise from here on than before, a line each."""
    if resumed is None:
        begun = provenance.recipe(out)
        return differences(Recipe.from_dict(begun).with_absolute_paths(), recipe) if begun else []
    before = checkpoint.read_state(resumed)[0].with_absolute_paths()
    found, data = differences(before, recipe), checkpoint.read_data(resumed)
    if data and data != source.digest:
        found.append(f"contents of data.source={recipe.data.source!r}: {_short(data)} -> {_short(source.digest)}")
    return found


def _short(digest: str) -> str:
    return " ".join(part[:12] for part in digest.split())


def _compress_vocabulary(model: Transformer, tokenizer: Tokenizer | None) -> None:
    """Gives Engram the tokenizer's classes where the configuration asks for some. A checkpoint brings its own."""
    memory = model.config.engram
    if memory is None or memory.canonical_vocab_size is None:
        return
    if tokenizer is None:
        raise ValueError(f"engram.canonical_vocab_size={memory.canonical_vocab_size}: allowed with text only")
    lookup = canonical_ids(tokenizer, model.config.vocab_size)
    for layer in memory.layers:
        model.layers[layer].engram.set_canonical(lookup)


def _check_sample(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError where the text at the end would be longer than the model reads: told now, not then."""
    count, most = recipe.train.sample_tokens, recipe.model.max_position_embeddings
    if count and tokenizer and len(tokenizer.encode(recipe.train.sample_prompt)) + 1 + count > most:
        raise ValueError(
            f"train.sample_tokens={count} behind train.sample_prompt: together at most {most - 1} are allowed"
            f" (model.max_position_embeddings={most})"
        )


def _check_same_tokenizer(tokenizer: Tokenizer | None, resumed: Path) -> None:
    if tokenizer and tokenizer.digest != checkpoint.tokenizer_of(resumed).digest:
        raise ValueError(
            f"data.tokenizer={tokenizer.name!r} is not the tokenizer of {str(resumed)!r}: go on with its own"
            f" (data.tokenizer={str(resumed)!r})"
        )
