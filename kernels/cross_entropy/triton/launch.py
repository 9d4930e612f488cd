"""Cross-entropy as launches: products by the library, and one kernel that turns the logits of a chunk into losses and
gradients where they lie.

    L = X W^T  (fp32)    rows: L -> losses, G = dL    dX = G W    dW += G^T X  (fp32)

A row of G takes the place of its row of L, in half precision the first half of its bytes: a chunk of c tokens takes
4 c v bytes. No atomics, no host synchronisation; a token's row does not depend on the others.

n tokens · v vocabulary · d width · c tokens of a chunk
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...precision import without_autocast
from ...triton.launch import architecture, next_power, on_device, registers
from . import kernels

CHUNK = 4096  # tokens: enough for the product dW to outweigh reading and writing dW for every chunk
BLOCK = 4096  # logits that a program has at hand


class Options(NamedTuple):
    """Of the loss; `chunk` tokens have their logits at once."""

    ignore_index: int
    z_loss: float
    mean: bool
    chunk: int


class Outputs(NamedTuple):
    """The loss, its share for each token, and the gradients of the sum, empty unless needed: dx as x, dw in fp32."""

    loss: Tensor
    share: Tensor
    dx: Tensor
    dw: Tensor


def new_outputs(x: Tensor, weight: Tensor, need_x: bool, need_w: bool) -> Outputs:
    """Their memory."""
    loss, share = (x.new_empty((), dtype=torch.float32) for _ in range(2))
    dw = x.new_empty(weight.shape if need_w else (0,), dtype=torch.float32)
    return Outputs(loss, share, x.new_empty(x.shape if need_x else (0,)), dw)


def forward(x: Tensor, weight: Tensor, targets: Tensor, options: Options, need_x: bool, need_w: bool) -> Outputs:
    """The loss and its gradients, chunk by chunk."""
    outputs = new_outputs(x, weight, need_x, need_w)
    losses, x, targets = x.new_empty(len(x), dtype=torch.float32), x.contiguous(), targets.contiguous()
    compute = x.dtype if x.dtype == weight.dtype else torch.float32
    outputs.dw.zero_()
    with without_autocast(x):
        w = weight.to(compute)
        for first in range(0, len(x), options.chunk):
            part = slice(first, first + options.chunk)
            xs = _counted(x[part], targets[part], options.ignore_index, compute)
            logits = _product(xs, w.T)
            dtype = compute if need_x or need_w else None
            grads = loss_rows(logits, targets[part], losses[part], options.ignore_index, options.z_loss, dtype)
            if not x.is_cuda:
                grads = grads.contiguous()  # oneDNN's AMX kernels multiply what lies behind the rows of a view by zero
            if need_x and compute == x.dtype:
                torch.mm(grads, w, out=outputs.dx[part])
            elif need_x:
                outputs.dx[part] = grads @ w
            if need_w:
                _product(grads.T, xs, outputs.dw)
            del logits, grads  # before the next chunk's
        with on_device(x):
            kernels.sum_losses[1,](
                losses, targets, outputs.loss, outputs.share, len(x), options.ignore_index,
                MEAN=options.mean, BLOCK=4096, num_warps=8,
            )  # fmt: skip
    return outputs


def _counted(x: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """x `[c, d]` in `dtype`, zero where the target is to ignore: what such a token holds must not reach dw."""
    out, (c, d) = x.new_empty(x.shape, dtype=dtype), x.shape
    columns = min(next_power(d), 1024)
    with on_device(x):
        kernels.counted_rows[c, triton.cdiv(d, columns)](x, targets, out, d, ignore_index, COLUMNS=columns)
    return out


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
        kernels.loss_rows[c,](
            logits, targets, losses, grads, v, grads.stride(0), ignore_index, z_loss,
            GRAD=dtype is not None, BLOCK=min(next_power(v, 1024), BLOCK), **registers(8),
        )  # fmt: skip
    return grads[:, :v]


def _product(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """`a b` in fp32, of half precisions too; added to `into` where given. A CPU multiplies in one dtype only."""
    if not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        return a @ b if into is None else into.addmm_(a, b)
    if into is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)


def backward(dloss: Tensor, share: Tensor, dx: Tensor, dw: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss, scaled by the loss's own; that of the weight in `dtype`."""
    scale = dloss * share
    return dx * scale, torch.mul(dw, scale, out=dw.new_empty(dw.shape, dtype=dtype))
