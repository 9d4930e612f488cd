"""Reinforcement learning with GRPO: ask, write, judge, update.

    step:  prompts x group completions at temperature 1  ->  rewards  ->  advantages  ->  `updates` optimizer steps

A run like any other (folder, checkpoints, metrics, resumption), whose step is this one. Questions, draws and the shares
of the updates are functions of (seed, step), so that only weights and moments have to be remembered between steps;
the reference policy, the weights the run started from, lies in its folder:

    DIR/reference.safetensors

Groups whose completions are all right, or all wrong, have no advantage; updates leave them out by default, and their KL
with them, which on a small machine buys more steps. `learnt_from` is the share of the completions that updates took.

Balance and indexer losses stay in the objective with their pre-training weights; an MTP module is left as it is.
"""

import copy
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model import Transformer
from ...model.disk import whole, write_tensors
from ...model.generation.sampling import Sampling
from ...model.losses import LossShares, loss_counts, loss_shares
from ..data.source import Source
from ..data.tokenizers import load_tokenizer
from ..recipe import Recipe
from ..run import metrics
from ..run.checkpoint import Progress, fit, require_run
from ..run.folder import nothing_to_check
from ..run.line import Line
from ..run.loop import Run
from ..run.schedule import Phase
from ..run.step import Experts
from .conversations import prompt
from .grpo import Terms, advantages, grpo_terms
from .policy import entropy, log_probabilities, of_tokens
from .reward import Verdict, judge
from .rollout import Rollouts, roll_out
from .tasks import Problem, problem

REFERENCE = "reference.safetensors"
MEASURED = ("loss", "kl", "entropy", "clip_fraction", "off_policy", "grad_norm")  # of an update
STAGE = -1  # of the problems: fine-tuning counts its stages from 0


class GrpoRun(Run):
    """A reinforcement learning in progress."""

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
            raise ValueError("train.init='': allowed is a trained run: new weights write nothing that is ever rewarded")
        super().__init__(recipe, source, out, resumed, shown, prepare, held=held)
        assert recipe.reason is not None and recipe.grpo is not None
        self.reason, self.grpo, self.tokenizer = recipe.reason, recipe.grpo, load_tokenizer("bytes")
        self.sampling = Sampling(recipe.grpo.temperature, recipe.grpo.top_k, recipe.grpo.top_p)
        self.reference = self._reference(resumed) if recipe.grpo.kl_weight else None

    def _reference(self, resumed: Path | None) -> Transformer:
        """The weights that the run started from, frozen."""
        path = self.out / REFERENCE
        if resumed is None:
            with whole(path) as writing:
                write_tensors({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, writing)
        elif not path.exists():
            with whole(path) as writing:
                shutil.copyfile(require_run(resumed) / REFERENCE, writing)
        model = copy.deepcopy(self.model)  # a new one would draw from the generators that a checkpoint has restored
        fit(model, path)
        return model.requires_grad_(False).eval()

    def questions(self, step: int) -> list[tuple[Problem, str]]:
        """The problems of a step and the modes they are asked in: tasks take turns, then modes."""
        tasks, modes, first = self.reason.tasks, self.reason.modes, step * self.grpo.prompts
        return [
            (problem(tasks, self.recipe.train.seed, STAGE, number), modes[number // len(tasks) % len(modes)])
            for number in range(first, first + self.grpo.prompts)
        ]

    def step(self) -> Line:
        """A batch of completions, and what is learnt from it."""
        began, number = time.perf_counter(), self.progress.step
        asked = [question for question in self.questions(number) for _ in range(self.grpo.group)]
        rollouts = self.roll_out(asked, number)
        verdicts = [judge(*question, ids, self.tokenizer) for question, ids in zip(asked, rollouts.completions())]
        rewards = torch.tensor([verdict.reward for verdict in verdicts], device=self.device)
        rolled = time.perf_counter() - began
        phase = self.schedule.phase(number)
        measured = self.learn(rollouts, advantages(rewards, self.grpo.group), phase)
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
                keep_routing=self.grpo.keep_routing,
                keep_mask=self.grpo.keep_sampling_mask,
            )

    def _seed(self, step: int) -> int:
        return (self.recipe.train.seed << 32 | step) % 2**63

    def learn(self, rollouts: Rollouts, advantage: Tensor, phase: Phase) -> dict[str, float]:
        """The optimizer steps on a batch, each with its share of the completions; means for the metrics."""
        rows = self.worth_learning(advantage)
        order = torch.Generator().manual_seed(self._seed(phase.step))
        rows = rows[torch.randperm(len(rows), generator=order)]
        shares = [share for share in rows.tensor_split(self.grpo.updates) if len(share)]
        sums = dict.fromkeys(MEASURED, 0.0)
        for share in shares:
            for name, value in self.update(rollouts.rows(share), advantage[share.to(self.device)], phase).items():
                sums[name] += value / len(shares)
        return {**sums, "learnt_from": len(rows) / len(rollouts)}

    def worth_learning(self, advantage: Tensor) -> Tensor:
        """Numbers of the completions that updates take, on the host."""
        differs = advantage.unflatten(0, (-1, self.grpo.group)).any(-1).repeat_interleave(self.grpo.group)
        return (differs.cpu() | (not self.grpo.skip_settled)).nonzero().flatten()

    def update(self, rollouts: Rollouts, advantage: Tensor, phase: Phase) -> dict[str, float]:
        """One optimizer step, whose numbers are waited for: rollouts, which come next, are of the host anyway."""
        tokens, b = int(rollouts.written.sum()), len(rollouts)
        split = passes(rollouts.lengths, self.grpo.tokens_per_pass)
        parts = [rollouts.rows(rows) for rows in split]
        counts = [loss_counts(self.recipe.model, part.ids, part.next_ids, part.documents) for part in parts]
        shares = [loss_shares(count, torch.stack(counts).sum(0)) for count in counts]
        forwards = [
            (routes(part.experts), partial(self._loss, part, advantage[rows], share, tokens))
            for rows, part, share in zip(split, parts, shares)
        ]
        sums, norm = self.stepper.accumulate(phase, forwards)
        self.stepper.update(phase)
        loss, kl, clipped, off_policy, spread = (sum(column) for column in zip(*torch.stack(sums).tolist()))
        found = {"loss": loss / tokens, "kl": kl / tokens, "entropy": spread / tokens}
        self._check_finite(phase.step + 1, {**found, "grad_norm": norm.item()})
        return {**found, "clip_fraction": clipped / tokens, "off_policy": off_policy / b, "grad_norm": norm.item()}

    def _loss(self, rows: Rollouts, advantage: Tensor, shares: LossShares, tokens: int) -> tuple[Tensor, Tensor]:
        """What some rows add to an update's loss, a mean over its `tokens`, and sums over the rows for the metrics."""
        terms, spread, extra = self.terms(rows, advantage, shares)
        sums = torch.stack([terms.loss.detach(), terms.kl, terms.clipped, terms.off_policy, spread])
        return terms.loss / tokens + extra, sums

    def terms(self, rows: Rollouts, advantage: Tensor, shares: LossShares) -> tuple[Terms, Tensor, Tensor]:
        """GRPO's terms of some rows, the sum of the entropies of their tokens, and router and index losses."""
        log_pi, extra = self.log_policy(self.model, rows, shares)
        log_reference = None
        if self.reference is not None:
            with torch.no_grad():
                log_reference = of_tokens(self.log_policy(self.reference, rows)[0], rows.next_ids)
            log_reference = torch.where(rows.written, log_reference, 0.0)
        spread = torch.where(rows.written, entropy(log_pi.detach()), 0.0).sum()
        grpo = self.grpo
        terms = grpo_terms(
            of_tokens(log_pi, rows.next_ids),
            rows.log_old,
            log_reference,
            advantage,
            rows.written,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            kl_weight=grpo.kl_weight,
            off_policy_limit=grpo.off_policy_limit,
        )
        return terms, spread, extra

    def log_policy(self, model: Transformer, rows: Rollouts, shares: LossShares | None = None) -> tuple[Tensor, Tensor]:
        """log pi [b, t, v] of the next token as the rollout draws it; router and index losses."""
        learns, c = torch.is_grad_enabled(), self.recipe.model
        targets = rows.next_ids if learns else None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = model(rows.ids, targets=targets, documents=rows.documents, shares=shares)
        log_pi = log_probabilities(out.logits.float(), self.grpo.temperature, rows.kept)
        nothing = log_pi.new_zeros(())
        weights = {"balance": c.balance_loss_weight, "index": c.index_loss_weight}
        extra = [weight * out.losses.get(name, nothing) for name, weight in weights.items()]
        return log_pi, torch.stack([part.float() for part in extra]).sum()


def routes(experts: dict[int, Tensor]) -> Experts:
    """Those of a rollout's tokens [b, t, k] as a pass over them takes them."""
    return {layer: chosen.flatten(0, 1) for layer, chosen in experts.items()}


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
