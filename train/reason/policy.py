"""Log-probabilities of written tokens, of the distribution that they were drawn from.

    log pi(a) = z_a - log sum_{v kept} exp z_v,   z = logits / temperature

Where sampling cut the vocabulary (top-k, top-p), the tokens kept at each position are recorded and given back here:
both policies of a ratio are then distributions over the same tokens (V3.2's keep-sampling-mask).

b sequences · t positions · v vocabulary
"""

import torch
from torch import Tensor


def log_probabilities(logits: Tensor, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """log pi [..., v] of logits [..., v]; -inf where `kept` [..., v] says that a token could not be drawn."""
    scaled = logits / temperature
    return (scaled if kept is None else scaled.masked_fill(~kept, -torch.inf)).log_softmax(-1)


def of_tokens(log_pi: Tensor, tokens: Tensor) -> Tensor:
    """log pi(a) [...] of the tokens a [...]."""
    return log_pi.gather(-1, tokens[..., None]).squeeze(-1)


def entropy(log_pi: Tensor) -> Tensor:
    """- sum_v pi log pi [...], in nats; tokens that cannot be drawn add nothing."""
    return torch.special.entr(log_pi.exp()).sum(-1)
