"""From logits to a token: temperature, top-k, top-p and min-p, in this order, then one uniform number.

    p = softmax(logits / temperature), each filter in turn taking what the ones before left;   p <- p / sum p
    token = min { i : p_0 + ... + p_i >= u },   u uniform in (0, 1]

Zero is never drawn, so that a token without probability is not either. Each row of a batch has numbers of its own: what
one row draws does not depend on the others.

b rows · v vocabulary
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import stable_topk
from ..cache import sent


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: divides the logits; 0 puts everything on the best token (lowest id of ties).
        top_k: keeps the k most likely tokens; 0 = all.
        top_p: keeps the fewest tokens whose share of the mass that top_k left reaches p; 1 = all.
        min_p: keeps the tokens that are at least min_p times as likely as the best; 0 = all.

    Raises:
        ValueError: a setting out of range; the message names it, its value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: allowed are 0 (greedy) and positive numbers")
        if not hasattr(self.top_k, "__index__") or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: allowed are 0 (off) and positive integers")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: allowed is more than 0 up to 1 (off)")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p}: allowed is 0 (off) to less than 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution [b, v] that a token is drawn from, in the logits' dtype.

        Raises:
            ValueError: a row of logits without a finite maximum.
        """
        best = logits.amax(-1, keepdim=True)
        if not bool(best.isfinite().all()):
            raise ValueError(f"the largest logits are {best.flatten().tolist()}: finite numbers are needed to sample")
        return self._probabilities(logits, best)

    def draw(self, logits: Tensor, u: Tensor) -> Tensor:
        """Token ids int64 [b] from logits [b, v] and uniform numbers u [b] (`pick`), without a look at any of them: -1
        for a row of logits without a finite maximum.
        """
        best = logits.amax(-1, keepdim=True)
        return torch.where(best[:, 0].isfinite(), pick(self._probabilities(logits, best), u), -1)

    def _probabilities(self, logits: Tensor, best: Tensor) -> Tensor:
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        limits = torch.finfo(logits.dtype)  # beyond them -inf / temperature and 0 / temperature are no numbers
        p = ((logits - best) / min(max(self.temperature, limits.tiny), limits.max)).softmax(-1)
        if self.top_k:
            p = _keep_top_k(p, min(self.top_k, p.shape[-1]))
        if self.top_p < 1:
            p = _keep_top_p(p, self.top_p)
        if self.min_p:
            p = torch.where(p >= self.min_p * p.amax(-1, keepdim=True), p, 0)
        return p / p.sum(-1, keepdim=True)


def _keep_top_k(p: Tensor, k: int) -> Tensor:
    """Zero but for the k largest of each row, ties to the lowest id."""
    kept = stable_topk(p, k, ordered=False)
    return torch.zeros_like(p).scatter(-1, kept, p.gather(-1, kept))


def _keep_top_p(p: Tensor, share: float) -> Tensor:
    """Zero but for the most likely token and those before which less than that share of the row's mass lies."""
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    mass = ranked.cumsum(-1)
    before = F.pad(mass[..., :-1], (1, 0), value=-1.0)  # even a share that rounds to zero keeps the first
    return torch.zeros_like(p).scatter(-1, order, torch.where(before < share * mass[..., -1:], ranked, 0))


def pick(p: Tensor, u: Tensor) -> Tensor:
    """Token ids int64 [b]: the first at which the running sum of p [b, v] reaches u [b] times the whole.

    With u uniform in (0, 1] token i comes with probability p_i / sum p. The sum runs in float64.
    """
    mass = p.double().cumsum(-1)
    return torch.searchsorted(mass, u.to(mass)[:, None] * mass[:, -1:]).squeeze(-1)


class Draws:
    """Uniform numbers in (0, 1], a sequence for each row. Row i of a seed is the same in every batch, on every device.

    seed: None draws anew.
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        self.rows = [random.Random(None if seed is None else f"seed {int(seed)} row {row}") for row in range(rows)]

    def uniform(self, rows: Sequence[int], device: torch.device | None = None) -> Tensor:
        """float64 [len(rows)]: the next number of each row that is named."""
        return sent([1 - self.rows[row].random() for row in rows], device or torch.device("cpu"), torch.float64)
