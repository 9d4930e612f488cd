"""Linear cross-entropy for a GPU: matrix products by the library, and one kernel that turns the logits of a chunk into
losses and gradients where they lie.

    L = X W^T  (fp32)    rows: L -> losses, G = dL    dX = G W    dW += G^T X  (fp32)

A row of G takes the place of its row of L, in half precision the first half of its bytes: a chunk of c tokens takes
4 c v bytes. No atomics, no host synchronisation; a token's row does not depend on the others.

n tokens · v vocabulary · d width · c tokens of a chunk
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...precision import without_autocast
from ...triton.launch import architecture, next_power, on_device

__all__ = ["cross_entropy"]

CHUNK = 4096  # tokens: enough for the product dW to outweigh reading and writing dW for every chunk
BLOCK = 4096  # logits that a program has at hand


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
    need_x, need_w = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    mean = reduction == "mean"
    return _cross_entropy(x, weight, targets, ignore_index, z_loss, mean, chunk or CHUNK, need_x, need_w)[0]


# one row -------------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(
    logits, targets, losses, grads, v, grad_stride, ignore, z_loss, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """loss = lse - l[target] + z lse^2 and, in the place of the logits, (1 + 2 z lse) softmax(l) - onehot(target).

    A row to a program. A target to ignore gives zeros, one outside the vocabulary NaN.
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits, grads = logits + row * v, grads + row * grad_stride
    target = tl.load(targets + row)
    if target == ignore:
        tl.store(losses + row, 0.0)
        if GRAD:
            for start in range(0, v, BLOCK):
                tl.store(grads + start + lane, tl.zeros((BLOCK,), tl.float32), mask=start + lane < v)
        return
    known = (target >= 0) & (target < v)
    picked = tl.load(logits + target, mask=known, other=float("nan"))
    top, mass = float("-inf"), 0.0
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < v, other=float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=0)
        top = higher
    norm = top + tl.log(mass)
    tl.store(losses + row, tl.log(mass) - (picked - top) + z_loss * norm * norm)
    if GRAD:
        scale = tl.where(known, (1 + 2 * z_loss * norm) / mass, float("nan"))
        for start in range(0, v, BLOCK):
            at = start + lane
            x = tl.load(logits + at, mask=at < v, other=0.0)
            tl.debug_barrier()  # every thread has read its logits before any writes a gradient over them
            tl.store(grads + at, tl.exp(x - top) * scale - tl.where(at == target, 1.0, 0.0), mask=at < v)


def loss_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, z_loss: float, dtype: torch.dtype | None
) -> Tensor:
    """Write the losses `[c]` of fp32 logits `[c, v]`; return their gradient `[c, v]` in `dtype`, or the logits.

    The gradient lies where the logits lay, but for one in half precision on AMD, whose barriers do not wait for loads.
    """
    c, v = logits.shape
    with on_device(logits):
        apart = dtype is not None and dtype.itemsize == 2 and architecture() == "hip"
        grads = logits.new_empty(c, v, dtype=dtype) if apart else logits.view(dtype or logits.dtype)
        _rows[c,](
            logits, targets, losses, grads, v, grads.stride(0), ignore_index, z_loss,
            GRAD=dtype is not None, BLOCK=min(next_power(v, 1024), BLOCK), num_warps=8,
        )  # fmt: skip
    return grads[:, :v]


# chunks --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::cross_entropy", mutates_args=())
def _cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, chunk: int,
    need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, its share for each token, and the gradients of the sum (empty unless needed): dx as x, dw in fp32."""
    loss, share, dx, dw = _outputs(x, weight, targets, ignore_index, z_loss, mean, chunk, need_x, need_w)
    losses, targets = x.new_empty(len(x), dtype=torch.float32), targets.contiguous()
    compute = x.dtype if x.dtype == weight.dtype else torch.float32
    dw.zero_()
    with without_autocast(x):
        w = weight.to(compute)
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            ignored = targets[rows] == ignore_index
            xs = x[rows].masked_fill(ignored[:, None], 0).to(compute)  # what they hold must not reach dw
            logits = _product(xs, w.T)
            dtype = compute if need_x or need_w else None
            grads = loss_rows(logits, targets[rows], losses[rows], ignore_index, z_loss, dtype)
            if need_x:
                dx[rows] = grads @ w
            if need_w:
                _product(grads.T, xs, dw)
            del logits, grads  # before the next chunk's
        share.copy_(1 / (targets != ignore_index).sum().clamp(min=1) if mean else share.new_ones(()))
        loss.copy_(losses.sum(dtype=torch.float64) * share)
    return loss, share, dx, dw


@_cross_entropy.register_fake
def _outputs(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, chunk: int,
    need_x: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, share = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    dw = x.new_empty(weight.shape if need_w else (0,), dtype=torch.float32)
    return loss, share, x.new_empty(x.shape if need_x else (0,)), dw


def _product(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """`a b` in fp32, of half precisions too; added to `into` where given. A CPU multiplies in one dtype only."""
    if not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        return a @ b if into is None else into.addmm_(a, b)
    if into is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


# backward ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::cross_entropy_backward", mutates_args=())
def _backward(dloss: Tensor, share: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss, scaled by the loss's own; that of the weight in `dtype`."""
    scale = dloss * share
    return dx * scale, torch.mul(dw, scale, out=dw.new_empty(dw.shape, dtype=dtype))


@_backward.register_fake
def _(dloss: Tensor, share: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dx.new_empty(dx.shape), dw.new_empty(dw.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dloss is None:
        return (None,) * 9
    dx, dw = _backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return dx if needs[0] else None, dw if needs[1] else None, *(None,) * 7


_cross_entropy.register_autograd(_gradients, setup_context=_keep)
