"""How far an update's policy is from the rollout's, and how much of it comes from choosing anew.

    kl_kept          KL(rollout || update as it is made, with what it takes from the rollout), nats per written token
    kl_free          the same where experts and entries are chosen anew
    flipped_experts  share of the rollout's experts that would be others, over positions of layers that score
    flipped_picks    share of the rollout's picks, over positions that see more entries than they may pick

The KL is estimated from the tokens drawn, by r - 1 - log r with r = pi / pi_old: never negative.

b sequences · t positions · k experts, or picks
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...model.routing import record_picks, record_routing
from .policy import of_tokens
from .rollout import Rollouts

if TYPE_CHECKING:
    from .loop import RolloutRun


@torch.no_grad()
def drift(run: "RolloutRun", rows: Rollouts) -> dict[str, float]:
    """Of the model as it is, on some rows; no shares where nothing is chosen."""
    model, c = run.model, run.recipe.model
    with run.choosing(rows):
        kept = _distance(run, rows)
    with record_routing(model) as routes, record_picks(model) as picks:
        free = _distance(run, rows)
    real = rows.documents >= 0
    seen = torch.arange(1, real.shape[1] + 1, device=real.device)
    scored = {layer: real for layer in rows.experts if not c.is_hash(layer)}
    choice = {layer: real & (seen // c.compress_ratio(layer) > c.index_topk) for layer in rows.picks}
    again = {layer: passes[0].view_as(rows.experts[layer]) for layer, passes in routes.items()}
    found = {"flipped_experts": flipped(rows.experts, again, scored)}
    found["flipped_picks"] = flipped(rows.picks, {layer: passes[0] for layer, passes in picks.items()}, choice)
    return {"kl_kept": kept, "kl_free": free, **{name: x for name, x in found.items() if x is not None}}


def _distance(run: "RolloutRun", rows: Rollouts) -> float:
    log_ratio = of_tokens(run.log_policy(run.model, rows)[0], rows.next_ids) - rows.log_old
    log_ratio = torch.where(rows.written, log_ratio, 0.0)
    return float((log_ratio.expm1() - log_ratio).sum() / rows.written.sum())


def flipped(old: Mapping[int, Tensor], now: Mapping[int, Tensor], where: Mapping[int, Tensor]) -> float | None:
    """The share of the old choices [b, t, k] that are not among those of now, at positions [b, t] of some layers."""
    lost = [
        (old[layer][at][:, :, None] != now[layer][at][:, None]).all(-1).flatten().float() for layer, at in where.items()
    ]
    every = torch.cat(lost) if lost else torch.empty(0)
    return float(every.mean()) if len(every) else None
