"""On-policy distillation (V4 5; spec E.1): the student writes, the teacher says how it would have gone on.

    loss = sum_it KL( pi(. | a_i<t) || pi_teacher(. | a_i<t) ) / number of tokens,   a_i ~ pi
    KL   = sum_v pi_v (log pi_v - log teacher_v)

The reverse KL, exact over the whole vocabulary at every token that the student wrote: no estimate from the token drawn.
What was written counts as given: the gradient is that of each token's distribution, not of the chance to come there.
V4 merges many specialists so, each for its domain; here is one teacher, of any size, with the same tokens.

b sequences · t written tokens · v vocabulary
"""

from typing import Any

import torch
from torch import Tensor

from ...model.generation.sampling import Sampling
from ..recipe import Recipe
from ..run.load import load_trained
from .loop import RolloutRun, Sums
from .rollout import Rollouts


class DistilRun(RolloutRun):
    """A distillation in progress. Rewards are measured only."""

    group = 1
    measured = ("loss", "kl", "entropy", "grad_norm")

    def __init__(self, recipe: Recipe, *settings: Any, **more: Any) -> None:
        assert recipe.distil is not None
        self.sampling, path = Sampling(recipe.distil.temperature), recipe.distil.teacher
        if not path:
            raise ValueError("distil.teacher='': allowed is a trained run")
        super().__init__(recipe, *settings, **more)
        with torch.random.fork_rng(devices=[]):  # a checkpoint has restored the generators
            self.teacher = load_trained(path, str(self.device))[0].requires_grad_(False)
        theirs, ours = self.teacher.config.vocab_size, recipe.model.vocab_size
        if theirs != ours:
            raise ValueError(f"distil.teacher={path!r} has model.vocab_size={theirs}: allowed is the student's, {ours}")

    def weigh(self, rewards: Tensor) -> Tensor:
        return torch.ones_like(rewards)

    def terms(self, rows: Rollouts, weights: Tensor, log_pi: Tensor) -> Sums:
        with torch.no_grad():
            log_teacher = self.log_policy(self.teacher, rows)[0]
        loss = torch.where(rows.written, reverse_kl(log_pi, log_teacher), 0.0).sum()
        return {"loss": loss, "kl": loss}


def reverse_kl(log_pi: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(pi || teacher) [...] of two distributions over a vocabulary, as log-probabilities [..., v]."""
    return (log_pi.exp() * (log_pi - log_teacher)).sum(-1)
