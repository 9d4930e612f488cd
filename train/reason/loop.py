"""Learning from what the model itself writes: ask, write, judge, update.

    step:  prompts x group completions  ->  rewards  ->  `updates` optimizer steps, each with a share of them

A run like any other (folder, checkpoints, metrics, resumption), whose step is this one. What an update learns is its
kind's: rewards (`grpo`) or a teacher (`distil`). Questions, draws and the shares of the updates are functions of
(seed, step), so that only weights and moments have to be remembered between steps.

An update takes the experts and the compressed entries that the rollout chose (keep_routing, keep_picks), so that its
log-probabilities are the rollout's but for rounding and for what updates before it have changed. Every
`train.observe_every` steps the last update of a step is looked at before it is made: `drift.py`.

Balance and indexer losses stay in the objective with their pre-training weights; an MTP module is left as it is.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model import Transformer
from ...model.generation.sampling import Sampling
from ...model.losses import LossShares, loss_counts, loss_shares
from ...model.routing import replay_picks, replay_routing
from ..data.source import Source
from ..data.tokenizers import load_tokenizer
from ..recipe import Recipe
from ..run import metrics
from ..run.checkpoint import Progress
from ..run.folder import nothing_to_check
from ..run.line import Line
from ..run.loop import Run
from ..run.schedule import Phase
from .conversations import prompt
from .drift import drift
from .policy import entropy, log_probabilities
from .reward import Verdict, judge
from .rollout import Rollouts, roll_out
from .tasks import Problem, problem

STAGE = -1  # of the problems: fine-tuning counts its stages from 0
Sums = dict[str, Tensor]  # by name of a metric, what some rows add to it


class RolloutRun(Run, ABC):
    """A run that learns from its rollouts. Its kinds say from how many of a question, and what."""

    group: int  # completions of each question
    measured: tuple[str, ...]  # of an update, for the metrics
    sampling: Sampling
    keep_mask = False  # whether rollouts note which tokens could be drawn

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        out: Path,
        resumed: Path | None,
        shown: bool,
        prepare: Callable[[Transformer], None] | None = None,
        held: Callable[[], None] = nothing_to_check,
    ):
        if resumed is None and not recipe.train.init:
            raise ValueError("train.init='': allowed is a trained run: new weights write nothing to learn from")
        super().__init__(recipe, source, out, resumed, shown, prepare, held=held)
        assert recipe.reason is not None and recipe.rollouts is not None
        self.reason, self.rollouts, self.tokenizer = recipe.reason, recipe.rollouts, load_tokenizer("bytes")

    @abstractmethod
    def weigh(self, rewards: Tensor) -> Tensor:
        """What each completion counts in `terms`, [b], from the rewards [b], group by group."""

    @abstractmethod
    def terms(self, rows: Rollouts, weights: Tensor, log_pi: Tensor) -> Sums:
        """Sums over the written tokens of some rows: "loss", to be differentiated, and others for the metrics.

        log_pi: [b, t, v] of the next token, with its gradient.
        """

    def worth_learning(self, weights: Tensor) -> Tensor:
        """Numbers of the completions that updates take, on the host."""
        return torch.arange(len(weights))

    def questions(self, step: int) -> list[tuple[Problem, str]]:
        """The problems of a step and the modes they are asked in: tasks take turns, then modes."""
        tasks, modes, first = self.reason.tasks, self.reason.modes, step * self.rollouts.prompts
        return [
            (problem(tasks, self.recipe.train.seed, STAGE, number), modes[number // len(tasks) % len(modes)])
            for number in range(first, first + self.rollouts.prompts)
        ]

    def step(self) -> Line:
        """A batch of completions, and what is learnt from it."""
        began, number = time.perf_counter(), self.progress.step
        asked = [question for question in self.questions(number) for _ in range(self.group)]
        rollouts = self.roll_out(asked, number)
        verdicts = [judge(*question, ids, self.tokenizer) for question, ids in zip(asked, rollouts.completions())]
        rewards = torch.tensor([verdict.reward for verdict in verdicts], device=self.device)
        rolled = time.perf_counter() - began
        phase = self.schedule.phase(number)
        measured = self.learn(rollouts, self.weigh(rewards), phase)
        tokens = int(rollouts.written.sum())
        self.progress = Progress(number + 1, self.progress.tokens + tokens, self.seconds())
        record = {
            "step": number + 1,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 3),
            **measured,
            **_outcome(asked, verdicts, rollouts),
            "lr": phase.lr,
            "rollout_seconds": round(rolled, 3),
            "tokens_per_second": round(tokens / (time.perf_counter() - began), 1),
            "peak_memory_gib": round(metrics.peak_memory_gib(self.device), 4),
        }
        return Line(record)

    def roll_out(self, asked: list[tuple[Problem, str]], step: int) -> Rollouts:
        """A completion for each question by the policy as it is."""
        self.model.eval()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return roll_out(
                self.model,
                [prompt(question, mode, self.tokenizer) for question, mode in asked],
                max_new_tokens=self.reason.max_new_tokens,
                sampling=self.sampling,
                seed=self._seed(step),
                stop=self.tokenizer.eos,
                keep_mask=self.keep_mask,
            )

    def _seed(self, step: int) -> int:
        return (self.recipe.train.seed << 32 | step) % 2**63

    def learn(self, rollouts: Rollouts, weights: Tensor, phase: Phase) -> dict[str, float]:
        """The optimizer steps on a batch, each with its share of the completions; means for the metrics."""
        rows = self.worth_learning(weights)
        order = torch.Generator().manual_seed(self._seed(phase.step))
        rows = rows[torch.randperm(len(rows), generator=order)]
        shares = [share for share in rows.tensor_split(self.rollouts.updates) if len(share)]
        found, every = dict.fromkeys(self.measured, 0.0), self.recipe.train.observe_every
        for share in shares:
            part, last = rollouts.rows(share), share is shares[-1]
            if last and every and (phase.step + 1) % every == 0:
                found |= drift(self, part)
            for name, value in self.update(part, weights[share.to(self.device)], phase).items():
                found[name] += value / len(shares)
        return {**found, "learnt_from": len(rows) / len(rollouts)}

    def update(self, rollouts: Rollouts, weights: Tensor, phase: Phase) -> dict[str, float]:
        """One optimizer step, whose numbers are waited for: rollouts, which come next, are of the host anyway."""
        split = passes(rollouts.lengths, self.rollouts.tokens_per_pass)
        parts = [rollouts.rows(rows) for rows in split]
        counts = [loss_counts(self.recipe.model, part.ids, part.next_ids, part.documents) for part in parts]
        shares = [loss_shares(count, torch.stack(counts).sum(0)) for count in counts]
        tokens = rollouts.written.sum()
        forwards = [
            (self.choosing(part), partial(self._loss, part, weights[rows], share, tokens))
            for rows, part, share in zip(split, parts, shares)
        ]
        sums, norm = self.stepper.accumulate(phase, forwards)
        self.stepper.update(phase)
        values = torch.stack([torch.stack([*each.values()]).double() for each in sums]).sum(0)
        found = {**dict(zip(sums[0], values.tolist())), "grad_norm": norm.item()}
        self._check_finite(phase.step + 1, found)
        return found

    @contextmanager
    def choosing(self, rows: Rollouts) -> Iterator[None]:
        """A pass over these rows takes the rollout's experts and entries, as far as the recipe keeps them."""
        experts = {layer: chosen.flatten(0, 1) for layer, chosen in rows.experts.items()}
        picks = rows.picks if self.rollouts.keep_picks else {}
        with replay_routing(self.model, experts if self.rollouts.keep_routing else {}), replay_picks(self.model, picks):
            yield

    def _loss(self, rows: Rollouts, weights: Tensor, shares: LossShares, tokens: Tensor) -> tuple[Tensor, Sums]:
        """What some rows add to an update's loss, a mean over its `tokens`, and to its metrics."""
        log_pi, extra = self.log_policy(self.model, rows, shares)
        sums = self.terms(rows, weights, log_pi)
        sums["entropy"] = torch.where(rows.written, entropy(log_pi.detach()), 0.0).sum()
        found = {name: value / tokens for name, value in sums.items()}
        return found["loss"] + extra, {name: value.detach() for name, value in found.items()}

    def log_policy(self, model: Transformer, rows: Rollouts, shares: LossShares | None = None) -> tuple[Tensor, Tensor]:
        """log pi [b, t, v] of the next token as the rollout draws it; router and index losses, given their shares."""
        targets = None if shares is None else rows.next_ids
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = model(rows.ids, targets=targets, documents=rows.documents, shares=shares)
        log_pi = log_probabilities(out.logits.float(), self.rollouts.temperature, rows.kept)
        nothing, c = log_pi.new_zeros(()), self.recipe.model
        weights = {"balance": c.balance_loss_weight, "index": c.index_loss_weight}
        extra = [weight * out.losses.get(name, nothing) for name, weight in weights.items()]
        return log_pi, torch.stack([part.float() for part in extra]).sum()


def passes(lengths: Tensor, most: int) -> list[Tensor]:
    """Row numbers by length, in as few runs as keep (rows x longest) at `most`; a longer row goes alone."""
    runs: list[list[int]] = [[]]
    for row in lengths.argsort(stable=True).tolist():
        if runs[-1] and (len(runs[-1]) + 1) * int(lengths[row]) > most:
            runs.append([])
        runs[-1].append(row)
    return [torch.tensor(run, device=lengths.device) for run in runs]


def _outcome(asked: list[tuple[Problem, str]], verdicts: list[Verdict], rollouts: Rollouts) -> dict[str, Any]:
    """What the completions were worth: means over all, and by mode."""
    lengths = rollouts.written.sum(-1).tolist()
    found: dict[str, Any] = {}
    for mode in ("", *dict.fromkeys(mode for _, mode in asked)):
        places = [i for i, (_, used) in enumerate(asked) if mode in ("", used)]
        end = f"_{mode}" if mode else ""
        found[f"reward{end}"] = sum(verdicts[i].reward for i in places) / len(places)
        found[f"well_formed{end}"] = sum(verdicts[i].well_formed for i in places) / len(places)
        found[f"length{end}"] = sum(lengths[i] for i in places) / len(places)
    return found
