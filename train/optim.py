"""AdamW in parameter groups, and the learning-rate schedule.

m ← β1 m + (1-β1) g     v ← β2 v + (1-β2) g²     w ← w (1 - η λ) - η m̂ / (sqrt(v̂) + ε)

λ > 0   matrices: every projection, the experts, the gates, the mixing maps `fn` of mHC, the output head
λ = 0   embedding and Engram tables (a row that is not read must not shrink), norm weights, `base` and `scale`
        of mHC, sinks, `ape` (a bias by its role), the short convolution
Engram tables learn `engram_lr_scale` times faster (Engram: Adam, learning rate x 5, no decay).

lr(s) = peak · (s + 1) / warmup                               s < warmup
        peak                                                  until the tail begins, at steps · (1 - decay_share)
        final + (peak - final) · (1 + cos(π p)) / 2           p from 0 to 1 over the tail (V4 4.2.2)
"""

import math

import torch
from torch import Tensor, nn

from .recipe import OptimConfig

TABLES = ("embed", "table", "tables")
NOT_MATRICES = ("ape", "base", "scale", "attn_sink", "conv")


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) in a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    tail = round(config.decay_share * steps)
    progress = max(0.0, (step + 1 - (steps - tail)) / tail) if tail else 0.0
    share = config.final_lr_share
    return config.lr * min(warm, share + (1 - share) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Parameters by name in the groups "matrices", "vectors" and "tables" (of Engram); a group may be empty."""
    groups: dict[str, dict[str, Tensor]] = {"matrices": {}, "vectors": {}, "tables": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)][name] = parameter
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; each group carries `lr_scale`, which `set_learning_rate` multiplies in."""
    decay = {"matrices": config.weight_decay, "vectors": 0.0, "tables": 0.0}
    scale = {"matrices": 1.0, "vectors": 1.0, "tables": config.engram_lr_scale}
    groups = [
        {"params": list(named.values()), "weight_decay": decay[kind], "lr_scale": scale[kind]}
        for kind, named in parameter_groups(model).items()
        if named
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _group(name: str, parameter: Tensor) -> str:
    words = name.split(".")
    if "engram" in words and any(word in TABLES for word in words):
        return "tables"
    vector = parameter.ndim < 2 or any(word in NOT_MATRICES or word in TABLES or "norm" in word for word in words)
    return "vectors" if vector else "matrices"
