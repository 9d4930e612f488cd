"""The three products of a linear layer, of parts that are bfloat16.

    y = (W1 + W2 + W3) x        dW = (dy1 + dy2 + dy3)^T x        dx = W1^T dy1 + W2^T dy1 + W1^T dy2

What dx leaves out is 2^-16 of sum |W| |dy|; a layer in bfloat16 leaves 2^-8, and dx is rounded to bfloat16 itself.

n rows · d channels in · o channels out
"""

import torch
import triton
from torch import Tensor

from ...precision import without_autocast
from ...triton.launch import on_device
from . import kernels

BLOCK = 1024  # numbers of a program
FEW = 64  # rows below which it takes longer to split the weight than to multiply by it
LEAST = 1 << 27  # multiplications below which two launches more take longer than they save
MOST = 4096  # channels out: there may be three products for each


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is one of parts."""
    halves = x.dtype == torch.bfloat16 and weight.dtype in (torch.float32, torch.bfloat16)
    return halves and x.shape[:-1].numel() >= FEW and len(weight) <= MOST and x.numel() * len(weight) >= LEAST


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """y `[..., o]`."""
    rows, (o, d) = x.flatten(0, -2), weight.shape
    with without_autocast(x):
        if weight.dtype == torch.bfloat16:
            y = _product(rows, weight.T)
        else:
            y = _product(rows, _parts(weight, beside=False)[1:].view(3 * o, d).T).view(-1, 3, o).sum(1)
    return y.view(*x.shape[:-1], o)


def backward(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    """dx and dweight, without elements where not needed."""
    rows, (o, d) = x.flatten(0, -2), weight.shape
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    with without_autocast(x):
        parts = _parts(dy.flatten(0, -2), beside=True).flatten(1)
        if need_x and weight.dtype == torch.bfloat16:
            dx = torch.mm(parts[:, o : 3 * o], torch.cat([weight, weight])).view(x.shape)
        elif need_x:
            dx = torch.mm(parts[:, : 3 * o], _parts(weight, beside=False)[:3].view(3 * o, d)).view(x.shape)
        if need_weight:
            dweight = _product(parts[:, o:].T, rows).view(3, o, d).sum(0).to(weight.dtype)
    return dx, dweight


def _parts(x: Tensor, beside: bool) -> Tensor:
    """Those of x `[r, c]`: `[r, 4, c]` or `[4, r, c]`, see `kernels.split`."""
    x, (rows, columns) = x.contiguous(), x.shape
    shape = (rows, 4, columns) if beside else (4, rows, columns)
    parts = x.new_empty(shape, dtype=torch.bfloat16)
    with on_device(x):
        kernels.split[(triton.cdiv(x.numel(), BLOCK),)](x, parts, rows, columns, BESIDE=beside, BLOCK=BLOCK)
    return parts


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32; the CPU, where kernels are interpreted, has no such product of halves."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
