"""The router in Triton, as operators: no host synchronisation, no float atomics. The same bits on each run, for each
row whatever the batch.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs
"""

from typing import Any

import torch
from torch import Tensor

from ..routing import Balance, Permutation, Routing
from . import launch

__all__ = ["moe_balance", "moe_permutation", "moe_route"]


def moe_route(
    logits: Tensor, *, top_k: int, scale: float, bias: Tensor | None = None, experts: Tensor | None = None
) -> Routing:
    """See `kernels.moe_route.moe_route`."""
    scores, chosen, weights = _route(logits, None if bias is None else bias.detach(), experts, top_k, scale)
    return Routing(scores, chosen if experts is None else experts, weights)


def moe_permutation(experts: Tensor, num_experts: int, real: Tensor | None = None) -> Permutation:
    """See `kernels.moe_route.moe_permutation`."""
    return Permutation(*_permutation(experts, num_experts, real))


def moe_balance(scores: Tensor, experts: Tensor, real: Tensor | None = None) -> Balance:
    """See `kernels.moe_route.moe_balance`."""
    return Balance(*_balance(scores, experts, real)[:2])


# choice --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::moe_route", mutates_args=())
def _route(
    logits: Tensor, bias: Tensor | None, experts: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.route(logits, bias, experts, top_k, scale)


@_route.register_fake
def _(
    logits: Tensor, bias: Tensor | None, experts: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch.route_outputs(logits, top_k)


@torch.library.custom_op("abyssal::moe_route_backward", mutates_args=())
def _route_backward(
    dscores: Tensor | None, dweights: Tensor | None, scores: Tensor, experts: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    return launch.route_backward(dscores, dweights, scores, experts, scale, dtype)


@_route_backward.register_fake
def _(dscores: Any, dweights: Any, scores: Tensor, experts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return scores.new_empty(scores.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtype, ctx.scale = inputs[0].dtype, inputs[4]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:2])


def _gradient(ctx: Any, dscores: Tensor | None, _: None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, experts = ctx.saved_tensors
    if dscores is None and dweights is None:
        return None, None, None, None, None
    return _route_backward(dscores, dweights, scores, experts, ctx.scale, ctx.dtype), None, None, None, None


_route.register_autograd(_gradient, setup_context=_keep)


# order ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::moe_permutation", mutates_args=())
def _permutation(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return launch.permutation(experts, num_experts, real)


@_permutation.register_fake
def _(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return launch.permutation_outputs(experts, num_experts)


# balance -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::moe_balance", mutates_args=())
def _balance(scores: Tensor, experts: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch.balance(scores, experts, real)


@_balance.register_fake
def _(scores: Tensor, experts: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch.balance_outputs(scores)


@torch.library.custom_op("abyssal::moe_balance_backward", mutates_args=())
def _balance_backward(dloss: Tensor, scores: Tensor, real: Tensor | None, slopes: Tensor, share: Tensor) -> Tensor:
    return launch.balance_backward(dloss, scores, real, slopes, share)


@_balance_backward.register_fake
def _(dloss: Tensor, scores: Tensor, real: Tensor | None, slopes: Tensor, share: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def _keep_balance(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, real = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, real, *output[2:])


def _balance_gradient(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if dloss is None else _balance_backward(dloss, *ctx.saved_tensors), None, None


_balance.register_autograd(_balance_gradient, setup_context=_keep_balance)
