"""From logits to a token: temperature, top-k, top-p and min-p, in this order.

b rows · v vocabulary
"""

import math

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises ValueError naming the setting that is out of range, its value and what is allowed."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: allowed are 0 (greedy) and positive numbers")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: allowed are 0 (off) and positive numbers")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: allowed is more than 0 up to 1 (off)")
    if not 0 <= min_p < 1:
        raise ValueError(f"min_p={min_p}: allowed is 0 (off) to less than 1")


def token_probabilities(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The distribution [b, v] that a token is drawn from; temperature 0 puts everything on the best token (lowest id of ties).

    top_k keeps the k most likely tokens, top_p the fewest whose mass reaches p, min_p those of at least min_p times the best.
    """
    if temperature == 0:
        best = (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
        return torch.nn.functional.one_hot(best, logits.shape[-1]).to(logits.dtype)
    p = (logits / temperature).softmax(-1)
    order = p.argsort(-1, descending=True, stable=True)
    ranked = p.gather(-1, order)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k:
        keep[..., top_k:] = False
    keep &= ranked.cumsum(-1) - ranked < top_p
    keep &= ranked >= min_p * ranked[..., :1]
    keep[..., 0] = True
    kept = torch.zeros_like(p).scatter(-1, order, ranked * keep)
    return kept / kept.sum(-1, keepdim=True)


def sample(logits: Tensor, generator: torch.Generator | None = None, **settings: float) -> Tensor:
    """One token id per row of logits [b, v]; settings as of `token_probabilities`."""
    p = token_probabilities(logits, **settings)
    if settings["temperature"] == 0:
        return p.argmax(-1)
    return torch.multinomial(p, 1, generator=generator).squeeze(-1)
