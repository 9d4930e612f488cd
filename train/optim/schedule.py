"""The learning rate of a step: linear warm-up, constant, cosine tail (V4 4.2.2).

lr(s) = peak · (s + 1) / warmup                               s < warmup
        peak                                                  until the tail begins, at steps · (1 - decay_share)
        final + (peak - final) · (1 + cos(π p)) / 2           p from 0 to 1 over the tail
"""

import math

from ..recipe import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) in a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    tail = round(config.decay_share * steps)
    progress = max(0.0, (step + 1 - (steps - tail)) / tail) if tail else 0.0
    share = config.final_lr_share
    return config.lr * min(warm, share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2)
