"""GRPO with the stabilisers of V3.2: group-relative advantages, clipped ratios, an unbiased KL, a sequence mask.

    A_i   = R_i - mean of its group's R                                 no division by the standard deviation
    r_it  = pi(a_it) / pi_old(a_it)                                     pi_old is what the rollout drew from
    M_i   = 0 if A_i < 0 and mean_t log(pi_old / pi) > limit, else 1    off-policy sequence mask
    K_it  = r_it (pi_ref / pi - log(pi_ref / pi) - 1)                   K3 with importance ratio
    loss  = - sum_it [ M_i min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i) - beta K_it ] / number of tokens

Dividing by the standard deviation would give groups that are almost all right, or all wrong, the largest say. K3
without the ratio has the right value under pi, but its gradient is not that of the KL; with it, value and gradient are
those of KL(pi || pi_ref) for any pi_old. The mask drops failures that the policy has moved away from already: pushing
further along them is where stale samples do harm. Successes are kept.

The sum over tokens is divided by the tokens of the whole batch, not sequence by sequence: the gradient of a sequence's
probability is a sum over its tokens, and a mean over each sequence would make a long wrong answer cheaper per token
than a short one. The KL is not masked: it holds for every token drawn.

Groups whose completions are all right, or all wrong, have no advantage; updates leave them out by default, and their KL
with them, which on a small machine buys more steps. `learnt_from` is the share of the completions that updates took.
The reference policy, the weights that the run started from, lies in its folder:

    DIR/reference.safetensors

b sequences, g of them in a group · t written tokens
"""

import copy
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model import Transformer
from ...model.disk import whole, write_tensors
from ...model.generation.sampling import Sampling
from ..recipe import Recipe
from ..run.checkpoint import fit, require_run
from .loop import RolloutRun, Sums
from .policy import of_tokens
from .rollout import Rollouts

REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class Terms:
    """Sums over the written tokens, to be divided by the tokens of the batch."""

    loss: Tensor  # differentiable
    kl: Tensor  # of K
    clipped: Tensor  # tokens whose gradient the clip took
    off_policy: Tensor  # tokens of sequences that the mask dropped


class GrpoRun(RolloutRun):
    """A reinforcement learning in progress."""

    measured = ("loss", "kl", "entropy", "clip_fraction", "off_policy", "grad_norm")

    def __init__(self, recipe: Recipe, *settings: Any, **more: Any) -> None:
        super().__init__(recipe, *settings, **more)
        assert recipe.grpo is not None
        self.grpo = grpo = recipe.grpo
        self.group, self.keep_mask = grpo.group, grpo.keep_sampling_mask
        self.sampling = Sampling(grpo.temperature, grpo.top_k, grpo.top_p)
        self.reference = self._reference() if self.grpo.kl_weight else None

    def _reference(self) -> Transformer:
        """The weights that the run started from, frozen."""
        path, resumed = self.out / REFERENCE, self.saved
        if resumed is None:
            with whole(path) as writing:
                write_tensors({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, writing)
        elif not path.exists():
            with whole(path) as writing:
                shutil.copyfile(require_run(resumed) / REFERENCE, writing)
        model = copy.deepcopy(self.model)  # a new one would draw from the generators that a checkpoint has restored
        fit(model, path)
        return model.requires_grad_(False).eval()

    def weigh(self, rewards: Tensor) -> Tensor:
        return advantages(rewards, self.group)

    def worth_learning(self, weights: Tensor) -> Tensor:
        differs = weights.unflatten(0, (-1, self.group)).any(-1).repeat_interleave(self.group)
        return (differs.cpu() | (not self.grpo.skip_settled)).nonzero().flatten()

    def terms(self, rows: Rollouts, weights: Tensor, log_pi: Tensor) -> Sums:
        log_reference = None
        if self.reference is not None:
            with torch.no_grad():
                log_reference = of_tokens(self.log_policy(self.reference, rows)[0], rows.next_ids)
            log_reference = torch.where(rows.written, log_reference, 0.0)
        grpo = self.grpo
        terms = grpo_terms(
            of_tokens(log_pi, rows.next_ids),
            rows.log_old,
            log_reference,
            weights,
            rows.written,
            clip_low=grpo.clip_low,
            clip_high=grpo.clip_high,
            kl_weight=grpo.kl_weight,
            off_policy_limit=grpo.off_policy_limit,
        )
        return {
            "loss": terms.loss,
            "kl": terms.kl,
            "clip_fraction": terms.clipped,
            "off_policy": terms.off_policy,
        }


def advantages(rewards: Tensor, group: int) -> Tensor:
    """R - the mean of its group, [b]; rewards [b] lie group by group. Raises ValueError if groups do not come out."""
    if rewards.ndim != 1 or not len(rewards) or len(rewards) % group:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: allowed is a row of whole groups of {group}")
    grouped = rewards.unflatten(0, (-1, group))
    return (grouped - grouped.mean(-1, keepdim=True)).flatten()


def grpo_terms(
    log_pi: Tensor,
    log_old: Tensor,
    log_reference: Tensor | None,
    advantage: Tensor,
    written: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    off_policy_limit: float,
) -> Terms:
    """The sum of the losses of the written tokens.

    Args:
        log_pi: [b, t] log-probability of each token now, with its gradient; any finite value where none was written.
        log_old: [b, t] of the distribution that it was drawn from.
        log_reference: [b, t] of the reference policy; None = no KL.
        advantage: [b].
        written: bool [b, t].
        clip_low, clip_high: how far below and above 1 a ratio may pay.
        kl_weight: beta.
        off_policy_limit: mean log-ratio, in nats per token, above which a failure is dropped; inf = never.

    Source: V3.2; spec E.1.
    """
    log_ratio = torch.where(written, log_pi - log_old, 0.0)
    kept = ~((advantage < 0) & (_mean(-log_ratio.detach(), written) > off_policy_limit))
    ratio, gain = log_ratio.exp(), advantage[:, None]
    inside = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * gain, inside * gain)
    counted = written & kept[:, None]
    loss = -torch.where(counted, surrogate, 0.0).sum()
    clipped = counted & (inside * gain < ratio * gain)
    kl = log_pi.new_zeros(())
    if log_reference is not None:
        distance = torch.where(written, log_reference - log_pi, 0.0)
        kl = (ratio * (distance.exp() - distance - 1)).sum()
        loss = loss + kl_weight * kl
    return Terms(loss, kl.detach(), clipped.sum(), (written & ~kept[:, None]).sum())


def _mean(values: Tensor, written: Tensor) -> Tensor:
    """[b] over the written tokens of each sequence."""
    return torch.where(written, values, 0.0).sum(-1) / written.sum(-1).clamp_min(1)
