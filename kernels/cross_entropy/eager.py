"""Linear cross-entropy in PyTorch, an engine: one chunk of logits at a time, from which the gradients are made at once.

n tokens · v vocabulary · d width · c tokens of a chunk
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import accumulation, tracked, without_autocast

LOGITS = 2**18  # of a chunk on a CPU: 1 MiB of fp32, so that the passes over them stay in the cache


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """See `kernels.cross_entropy.cross_entropy`."""
    rows = (targets != ignore_index).nonzero().squeeze(1)
    share = 1 / max(len(rows), 1) if reduction == "mean" else 1.0
    chunk = chunk or _chunk(weight)
    with without_autocast(x):
        if tracked(x, weight):
            return _LinearCrossEntropy.apply(x, weight, targets, rows, z_loss, share, chunk)
        return _total(x, weight, targets, rows, z_loss, chunk) * share


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of the summed loss, made while each chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, z_loss: float, share: float, chunk: int
    ) -> Tensor:
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=_accumulation(x, weight)) if ctx.needs_input_grad[1] else None
        total = _total(x, weight, targets, rows, z_loss, chunk, dx, dw)
        ctx.share, ctx.dtype = share, weight.dtype
        ctx.save_for_backward(dx, dw)
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        grad = grad * ctx.share
        dx = None if dx is None else dx * grad
        dw = None if dw is None else (dw * grad).to(ctx.dtype)
        return dx, dw, None, None, None, None, None


def _total(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor,
    z_loss: float,
    chunk: int,
    dx: Tensor | None = None,
    dw: Tensor | None = None,
) -> Tensor:
    """The loss summed over `rows`; its gradients are written to dx and added to dw where given."""
    dtype = _accumulation(x, weight)
    w = weight.to(dtype)
    place = x.new_empty(min(chunk, len(rows)), len(weight), dtype=dtype)  # of every chunk's logits in turn
    total = x.new_zeros((), dtype=torch.float64)
    for part in rows.split(chunk):
        xs, target = x.index_select(0, part).to(dtype), targets[part].unsqueeze(1)
        logits = torch.mm(xs, w.T, out=place[: len(part)])  # [c, v]; becomes the exponentials, then the gradient
        top = logits.amax(-1, keepdim=True)
        picked = logits.sub_(top).gather(1, target)
        mass = logits.exp_().sum(-1, keepdim=True)
        norm = mass.log() + top
        total += (mass.log() - picked + z_loss * norm.square()).sum(dtype=torch.float64)
        if dx is None and dw is None:
            continue
        logits *= (1 + 2 * z_loss * norm) / mass
        logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
        if dx is not None:
            dx[part] = (logits @ w).to(dx.dtype)
        if dw is not None:
            dw.addmm_(logits.T, xs)
    return total.to(dtype)


def _accumulation(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(accumulation(x), accumulation(weight))


def _chunk(weight: Tensor) -> int:
    """As many tokens as the cache holds, but enough to outweigh reading and writing the weight's gradient each time."""
    return 4096 if weight.is_cuda else max(LOGITS // weight.shape[0], 256)
