"""Muon: the momentum of a matrix, orthogonalised, is its update (V4 2.4, Algorithm 1).

M ← μ M + G          O = NS(μ M + G) · γ sqrt(max(n, m))          W ← W (1 - η λ) - η O

NS, the ten hybrid steps of Newton-Schulz, makes every singular value of its input about 1, so an entry of O is γ in the
root mean square whatever G's size, and AdamW's learning rate serves (γ = 0.18). M is a sum, not an average. As NS
forgets the length of M, a matrix whose gradient is zero (an expert without tokens) goes on along its last direction at
full length; one that never had a gradient stays where it is, but for the decay.

n m rows and columns of one logically independent matrix; a parameter [..., r, m] stacks them along its rows
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import newton_schulz_many
from ...kernels.newton_schulz import HYBRID

SCRATCH = 2**26  # elements whose update is worked out at once

Observer = Callable[[Tensor, Tensor], None]


class Muon(torch.optim.Optimizer):
    """Muon over parameters [..., r, m], `rows` giving those of the matrices that each of them stacks along r.

    Args:
        params: the parameters.
        rows: for each, the rows of its logically independent matrices; they add up to r.
        lr: η.
        momentum: μ in [0, 1).
        scale: γ, the rms of an update per unit of learning rate.
        weight_decay: λ, decoupled.
        coefficients, compute_dtype: as in `kernels.newton_schulz`.

    Raises:
        ValueError: rows that do not add up to a parameter's, or another number of them.
    """

    MOMENTS = frozenset({"momentum"})

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: Sequence[tuple[int, ...]],
        lr: float,
        momentum: float = 0.95,
        scale: float = 0.18,
        weight_decay: float = 0.1,
        coefficients: Sequence[tuple[float, float, float]] = HYBRID,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        for parameter, split in zip(params, rows, strict=True):
            if parameter.ndim < 2 or sum(split) != parameter.shape[-2]:
                raise ValueError(f"rows={split} of a parameter {tuple(parameter.shape)}: must add up to its axis -2")
        settings = {"lr": lr, "momentum": momentum, "scale": scale, "weight_decay": weight_decay}
        super().__init__([{"params": list(params), "rows": list(rows)}], settings)
        self.iteration: dict[str, Any] = {"coefficients": coefficients, "compute_dtype": compute_dtype}

    @torch.no_grad()
    def step(self, closure: None = None, observe: Observer | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; `observe(parameter, update)` is told the update per unit of
        learning rate, without the decay.
        """
        for group in self.param_groups:
            for batch in _batches(group["params"], group["rows"]):
                self._update(batch, group, observe)

    def _update(self, batch: "list[Learner]", group: dict[str, Any], observe: Observer | None) -> None:
        parameters = [parameter for parameter, _ in batch]
        looks = [whole(look) for look in self._look_ahead(parameters, group["momentum"])]
        stacks = [split(look, rows) for (look, _), (_, rows) in zip(looks, batch)]
        flat = newton_schulz_many([stack for several in stacks for stack in several], **self.iteration)
        torch._foreach_mul_(flat, [group["scale"] * math.sqrt(max(done.shape[-2:])) for done in flat])
        torch._foreach_mul_([local(parameter) for parameter in parameters], 1 - group["lr"] * group["weight_decay"])
        done = iter(flat)
        for parameter, (look, mine), several in zip(parameters, looks, stacks):
            parts = [next(done) for _ in several]
            update = mine(parts[0].reshape(look.shape) if len(parts) == 1 else torch.cat(parts, -2))
            descend(parameter, update, group["lr"])
            if observe:
                observe(parameter, update)

    def _look_ahead(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """μ M + G of each, after M ← μ M + G."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        grads = [local(parameter.grad) for parameter in parameters]
        sums = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        torch._foreach_mul_(sums, momentum)
        torch._foreach_add_(sums, grads)
        looks = torch._foreach_add(grads, sums, alpha=momentum)
        return [shared_as(parameter, look) for parameter, look in zip(parameters, looks)]


class Learner(NamedTuple):
    """A parameter with a gradient and the rows of its matrices."""

    parameter: Tensor
    rows: tuple[int, ...]


def split(x: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """The matrices of x [..., r, m] as views: one stack [..., k, r / k, m] if they are equal, else [..., rows, m]."""
    if len(set(rows)) == 1:
        return [x.unflatten(-2, (len(rows), rows[0]))]
    return list(x.split(rows, -2))


def descend(parameter: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """W ← W - η O; a learning rate on the device is read there."""
    lr = lr if isinstance(lr, Tensor) else local(parameter).new_tensor(lr)
    parameter.addcmul_(update, lr, value=-1)


def full(x: Tensor) -> Tensor:
    """All of a tensor that processes may share."""
    return x if type(x) is Tensor else x.full_tensor()  # type: ignore[attr-defined]


def local(x: Any) -> Tensor:
    """What this process holds of a tensor that processes may share."""
    return x.to_local() if hasattr(x, "to_local") else x


def shared_as(like: Any, x: Tensor) -> Tensor:
    """What this process holds, as a tensor that processes share as they do `like`."""
    if not hasattr(like, "to_local"):
        return x
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = like.device_mesh, like.placements, like.shape, like.stride()
    return DTensor.from_local(x, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(look: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Whole matrices of a tensor that processes may share, and the way back from them to what this process holds.

    The momentum is elementwise and stays shared; Newton-Schulz needs whole matrices. Where each process has whole
    experts, those are taken; else all gather all, and work out the same.
    """
    if type(look) is Tensor:
        return look, lambda update: update
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(look, DTensor)
    mesh, placements = look.device_mesh, look.placements
    if look.ndim > 2 and all(getattr(p, "dim", 0) == 0 for p in placements):  # whole copies, or cut along axis 0
        return look.to_local(), lambda update: shared_as(look, update)
    return full(look), lambda update: distribute_tensor(update, mesh, placements, src_data_rank=None)


def _batches(parameters: Sequence[Tensor], rows: Sequence[tuple[int, ...]]) -> Iterator[list[Learner]]:
    """Those with a gradient, equal sides next to one another, up to SCRATCH elements at once."""
    learners = [Learner(p, r) for p, r in zip(parameters, rows) if p.grad is not None]
    learners.sort(key=lambda learner: (learner.parameter.shape[-1], learner.rows[0]))
    batch: list[Learner] = []
    for learner in learners:
        if batch and sum(p.numel() for p, _ in batch) + learner.parameter.numel() > SCRATCH:
            yield batch
            batch = []
        batch.append(learner)
    if batch:
        yield batch
