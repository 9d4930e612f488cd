"""What each step of a run does, as pure functions of its number: rows, length, attention, learning rate, loss weights.

    dense     CSA layers read all visible entries; no indexer learns             V4 4.2.2: the first 1T tokens
    warmup    as dense, and only the indexers learn, from all visible entries    V3.2 2.1: 1000 steps
    sparse    CSA layers read the indexer's picks; all learn                     the rest

A run has stages, one after another, each with its length, batch and attention; without [[stages]] it is one sparse
stage. Rows are numbered from 0 within a stage. A ramp, at the start of the run, lets the batch grow:

    rows(s) = start + (batch - start) s / ramp, down to a multiple of start      s < ramp;  then batch

Where the report is silent (spec C.2, H.3) we chose: one learning-rate curve over the whole run, which a stage's `lr`
only scales; a ramp that is linear in steps and, in multiples of its start, suits the processes that the start
suits; in the warm-up the main model has no gradient at all, so that neither decay nor momentum touches it, router
biases rest, and the indexer's loss keeps its weight, so that its moments go on in the sparse stage as they are. The MTP
weight drops with the first step of the learning rate's tail (V4: 0.3 to 0.1); router biases rest at the end (V3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from ..recipe import Recipe
from ..settings import OptimConfig, StageConfig


@dataclass(frozen=True)
class Phase:
    """What one step does."""

    step: int  # from 0
    stage: int
    rows: range  # numbered within the stage
    length: int
    attention: str  # of `Transformer.attention_stage`
    lr: float
    weights: Mapping[str, float]  # of the parts of the loss that are learnt from; others are only measured
    bias_speed: float  # of the router biases

    @property
    def indexer_only(self) -> bool:
        return self.attention == "warmup"


class Schedule:
    """The phases of a recipe's steps; past its end the last stage goes on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, recipe.train.steps
        self.stages = stages(recipe)
        self.starts = [0, *accumulate(stage.steps for stage in self.stages)]
        self._ramped = [self._ramp(first, stage) for first, stage in zip(self.starts, self.stages)]

    def phase(self, step: int) -> Phase:
        """That of step `step`, from 0."""
        number = self.stage(step)
        stage, optim = self.stages[number], self.recipe.optim
        lr = learning_rate(step, self.steps, replace(optim, lr=stage.lr or optim.lr))
        rests = stage.attention == "warmup" or step >= self.rest
        return Phase(
            step,
            number,
            self._rows(step, number),
            stage.sequence_length,
            stage.attention,
            lr,
            self.weights(step),
            0.0 if rests else self.recipe.model.router_bias_update_speed,
        )

    def last(self, steps: int) -> Phase:
        """That of the last of `steps` steps; of the first step before it."""
        return self.phase(max(steps - 1, 0))

    def stage(self, step: int) -> int:
        """The stage that a step is in."""
        return sum(step >= start for start in self.starts[1:-1])

    def count(self, step: int, stage: StageConfig) -> int:
        """Rows of a step in the given stage."""
        first, ramp = self.recipe.schedule.batch_start, self.recipe.schedule.batch_ramp_steps
        if step >= ramp:
            return stage.batch_size
        return (first * ramp + (stage.batch_size - first) * step) // (first * ramp) * first

    def weights(self, step: int) -> dict[str, float]:
        """Of the parts of the loss that a step learns from."""
        model = self.recipe.model
        index = {"index": model.index_loss_weight}
        if self.stages[self.stage(step)].attention == "warmup":
            return index
        share = self.recipe.schedule.mtp_final_share if step >= self.tail else 1.0
        mtp = model.mtp_loss_weight * share
        return {"lm": 1.0, "mtp": mtp, "balance": model.balance_loss_weight, **index}

    @property
    def tail(self) -> int:
        """The first step of the learning rate's tail."""
        return self.steps - round(self.recipe.optim.decay_share * self.steps)

    @property
    def rest(self) -> int:
        """The first step after which router biases no longer move."""
        return self.steps - round(self.recipe.schedule.bias_rest_share * self.steps)

    def tokens(self, stage: int) -> int:
        """Tokens of a stage, padding and all."""
        last = self.phase(self.starts[stage + 1] - 1)
        return last.rows.stop * last.length

    def _rows(self, step: int, number: int) -> range:
        """Those of a step, numbered within its stage."""
        stage, before, within = self.stages[number], self._ramped[number], step - self.starts[number]
        ramped = min(within, len(before) - 1)
        first = before[ramped] + (within - ramped) * stage.batch_size
        return range(first, first + self.count(step, stage))

    def _ramp(self, first: int, stage: StageConfig) -> list[int]:
        """Rows of a stage before each of its steps in the ramp, and before the step behind it."""
        ramp = range(first, min(first + stage.steps, self.recipe.schedule.batch_ramp_steps))
        return [0, *accumulate(self.count(step, stage) for step in ramp)]


def stages(recipe: Recipe) -> tuple[StageConfig, ...]:
    """The stages of a run, with what they take from [data] filled in."""
    whole = (StageConfig(steps=recipe.train.steps),)
    data = recipe.data
    return tuple(
        replace(
            stage,
            sequence_length=stage.sequence_length or data.sequence_length,
            batch_size=stage.batch_size or data.batch_size,
        )
        for stage in recipe.stages or whole
    )


def plan(recipe: Recipe) -> str:
    """The schedule as a table for people."""
    schedule, optim = Schedule(recipe), recipe.optim
    rows = [("stage", "steps", "rows", "length", "attention", "learning rate", "tokens")]
    for number, (first, stop) in enumerate(zip(schedule.starts, schedule.starts[1:])):
        a, b = schedule.phase(first), schedule.phase(stop - 1)
        counts = _span(len(a.rows), len(b.rows))
        rates = _span(f"{a.lr:.2e}", f"{b.lr:.2e}")
        tokens = f"{schedule.tokens(number):,}"
        rows.append((str(number), f"{first + 1} to {stop}", counts, str(a.length), a.attention, rates, tokens))
    total = sum(map(schedule.tokens, range(len(schedule.stages))))
    rows.append(("all", str(schedule.steps), "", "", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*table, "", *_events(schedule, optim.warmup_steps)])


def _events(schedule: Schedule, warmup: int) -> list[str]:
    """What else changes on the way."""
    recipe, steps, tail, rest = schedule.recipe, schedule.steps, schedule.tail, schedule.rest
    falls = f", falls from step {tail + 1} on" if tail < steps else ""
    events = [f"learning rate: rises over {warmup} steps, constant{falls}"]
    if recipe.schedule.mtp_final_share != 1 and tail < steps:
        weight = recipe.model.mtp_loss_weight
        after = weight * recipe.schedule.mtp_final_share
        events.append(f"MTP weight: {weight:g}, from step {tail + 1} on {after:g}")
    if rest < steps:
        events.append(f"router biases: rest from step {rest + 1} on")
    return events


def _span(a: object, b: object) -> str:
    return str(a) if a == b else f"{a} to {b}"


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of step `step` (from 0) in a run of `steps`: linear warm-up, constant, cosine tail (V4 4.2.2).

    lr(s) = peak · (s + 1) / warmup                               s < warmup
            peak                                                  until the tail begins, at steps · (1 - decay_share)
            final + (peak - final) · (1 + cos(π p)) / 2           p from 0 to 1 over the tail
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    tail = round(config.decay_share * steps)
    progress = max(0.0, (step + 1 - (steps - tail)) / tail) if tail else 0.0
    share = config.final_lr_share
    return config.lr * min(warm, share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2)
