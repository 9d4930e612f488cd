"""AdamW, torch's own, in parameter groups; and the direction of its last step, worked out from its moments.

m ← β1 m + (1-β1) g     v ← β2 v + (1-β2) g²     w ← w (1 - η λ) - η m̂ / (sqrt(v̂) + ε)
"""

from typing import Any

import torch
from torch import Tensor

from .muon import Observer


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, whose updates can be observed as those of the other rules."""

    MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "step"})
    _warned_capturable_if_run_uncaptured = True  # fused, being capturable costs nothing outside of a graph

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True, capturable=True)

    def step(self, closure: None = None, observe: Observer | None = None) -> None:  # type: ignore[override]
        """As `Muon.step`."""
        super().step()
        if observe:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        observe(parameter, _direction(self.state[parameter], group))


@torch.no_grad()
def _direction(state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """m̂ / (sqrt(v̂) + ε), as of the step just done."""
    (beta1, beta2), steps = group["betas"], state["step"]
    m, v = state["exp_avg"] / (1 - beta1**steps), state["exp_avg_sq"] / (1 - beta2**steps)
    return m / (v.sqrt_() + group["eps"])
