"""The PyTorch engine of the experts: rows sorted by expert, in blocks that stay in the cache; a backward by hand.

What it computes is defined in `reference`.

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..moe_route.eager import moe_permutation
from ..precision import accumulation, tracked

ROWS = 1024  # of a block: its activations stay in the second-level cache
UNSORTED = 4  # tokens up to which sorting them by expert does not pay


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float | None,
    shared: Tensor | None = None,
) -> Tensor:
    """See `kernels.moe_experts.moe_experts`."""
    if tracked(x, weights, w13, w2, shared):
        return _Experts.apply(x, experts, weights, w13, w2, limit, shared)
    if len(x) <= UNSORTED:
        return _forward_unsorted(x, experts, weights, w13, w2, limit, shared)
    return _forward(x, weights, w13, w2, limit, shared, _ExpertOrder(experts, w13.shape[0]))


def swiglu(h: Tensor, limit: float | None, weight: Tensor | None = None) -> Tensor:
    """See `kernels.moe_experts.swiglu`."""
    if h.shape[:-1].numel() <= ROWS and not tracked(h, weight):
        return _swiglu(h, limit, weight)
    rows = h.reshape(h.shape[:-1].numel(), h.shape[-1])
    out = _SwiGLU.apply(rows, limit, None if weight is None else weight.flatten())
    return out.view(*h.shape[:-1], h.shape[-1] // 2)


class _Block(NamedTuple):
    """Consecutive rows, and how many of them belong to each of some experts."""

    rows: slice
    experts: list[int]
    sizes: list[int]


def _blocks(counts: list[int]) -> Iterator[_Block]:
    """All rows in blocks of about `ROWS`: experts with few rows share a block, one with many is cut evenly."""
    start = 0
    experts: list[int] = []
    sizes: list[int] = []
    for expert, count in enumerate(counts):
        pieces = -(-count // ROWS)
        for i in range(pieces):
            size = count * (i + 1) // pieces - count * i // pieces
            if sum(sizes) + size > ROWS:
                yield _Block(slice(start, start + sum(sizes)), experts, sizes)
                start, experts, sizes = start + sum(sizes), [], []
            experts.append(expert)
            sizes.append(size)
    if experts:
        yield _Block(slice(start, start + sum(sizes)), experts, sizes)


class _ExpertOrder:
    """The rows in expert order: `order [r]` their pairs, `token [r]`, `inverse [n, k]`, and their blocks."""

    def __init__(self, experts: Tensor, num_experts: int) -> None:
        self.order, counts, self.inverse = moe_permutation(experts, num_experts)
        self.token = self.order // max(experts.shape[1], 1)
        self.blocks = list(_blocks(counts.tolist()))

    def combine(self, rows: Tensor) -> Tensor:
        """Each token's sum over its slots, in slot order: rows `[r, d]` to `[n, d]`."""
        if not len(rows):
            return rows.new_zeros(len(self.inverse), rows.shape[1])
        return F.embedding_bag(self.inverse, rows, mode="sum")


def _forward(
    x: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float | None,
    shared: Tensor | None,
    rows: _ExpertOrder,
    keep: Tensor | None = None,
) -> Tensor:
    """`out [n, d]`; `keep [r, 2 f]` receives the pre-activations."""
    wide = accumulation(x)
    weight = weights.flatten()[rows.order].to(wide)
    y = x.new_empty(len(weight), x.shape[1], dtype=wide)
    for block in rows.blocks:
        xs = x.index_select(0, rows.token[block.rows])
        h = xs.new_empty(len(xs), w13.shape[1]) if keep is None else keep[block.rows]
        _grouped(xs, w13.mT, block, out=h)
        _grouped(_swiglu(h, limit, weight[block.rows]), w2.mT, block, out=y[block.rows])
    out = rows.combine(y)
    return (out if shared is None else out.add_(shared)).to(x.dtype)


def _forward_unsorted(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float | None,
    shared: Tensor | None,
) -> Tensor:
    """A few tokens, one at a time: an expert's weights are read where they lie, and nothing is sorted."""
    out = x.new_zeros(x.shape, dtype=accumulation(x))
    for token, weight, total, chosen in zip(x.unsqueeze(1), weights, out, experts.tolist()):
        h = torch.cat([F.linear(token, w13[e]) for e in chosen])
        for a, e in zip(_swiglu(h, limit, weight).unsqueeze(1), chosen):
            total += F.linear(a, w2[e])[0]
    return (out if shared is None else out.add_(shared)).to(x.dtype)


class _Experts(torch.autograd.Function):
    """Keeps x, the pre-activations and the routing; the activations and their slopes are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        w13: Tensor,
        w2: Tensor,
        limit: float | None,
        shared: Tensor | None,
    ) -> Tensor:
        ctx.rows, ctx.limit, ctx.shared = (
            _ExpertOrder(experts, w13.shape[0]),
            limit,
            None if shared is None else shared.dtype,
        )
        h = x.new_empty(experts.numel(), w13.shape[1])
        out = _forward(x, weights, w13, w2, limit, shared, ctx.rows, keep=h)
        ctx.save_for_backward(x, h, weights, w13, w2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weights, w13, w2 = ctx.saved_tensors
        need_x, _, need_weights, need_w13, need_w2, _, need_shared = ctx.needs_input_grad
        rows, wide = ctx.rows, accumulation(x)
        weight = weights.flatten()[rows.order].to(wide)
        dx = x.new_empty(len(weight) if need_x else 0, x.shape[1], dtype=wide)
        dweight = torch.empty_like(weight)
        dw13 = torch.zeros_like(w13, dtype=wide) if need_w13 else None
        dw2 = torch.zeros_like(w2, dtype=wide) if need_w2 else None
        for block in rows.blocks:
            token = rows.token[block.rows]
            dy = dout.index_select(0, token)
            da = dy.new_empty(len(dy), w2.shape[2])
            _grouped(dy, w2, block, out=da)
            a, dh, dweight[block.rows] = _swiglu_backward(h[block.rows], da, ctx.limit, weight[block.rows])
            if dw2 is not None:
                _grouped_outer(dy, a, block, into=dw2)
            if dw13 is not None:
                _grouped_outer(dh, x.index_select(0, token), block, into=dw13)
            if need_x:
                _grouped(dh, w13, block, out=dx[block.rows])
        return (
            rows.combine(dx).to(x.dtype) if need_x else None,
            None,
            dweight[rows.inverse].to(weights.dtype) if need_weights else None,
            None if dw13 is None else dw13.to(w13.dtype),
            None if dw2 is None else dw2.to(w2.dtype),
            None,
            dout.to(ctx.shared) if need_shared else None,
        )


def _grouped(a: Tensor, w: Tensor, block: _Block, out: Tensor) -> None:
    """`out_r = a_r w[expert of r]`."""
    for e, ae, oe in zip(block.experts, a.split(block.sizes), out.split(block.sizes)):
        if oe.dtype == ae.dtype:
            torch.mm(ae, w[e], out=oe)
        else:
            oe.copy_(ae @ w[e])


def _grouped_outer(a: Tensor, b: Tensor, block: _Block, into: Tensor) -> None:
    """`into[e] += sum_r a_r b_r^T` over the rows of expert e."""
    for e, ae, be in zip(block.experts, a.split(block.sizes), b.split(block.sizes)):
        if into.dtype == ae.dtype:
            into[e].addmm_(ae.mT, be)
        else:
            into[e] += ae.mT @ be


class _SwiGLU(torch.autograd.Function):
    """Of rows `[r, 2 f]`, in blocks; keeps h and weight alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, limit: float | None, weight: Tensor | None) -> Tensor:
        ctx.limit = limit
        ctx.save_for_backward(h, weight)
        out = h.new_empty(len(h), h.shape[1] // 2)
        for block in _slices(len(h)):
            out[block] = _swiglu(h[block], limit, None if weight is None else weight[block])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dh, dweight = h.new_empty(h.shape), None if weight is None else weight.new_empty(weight.shape)
        for block in _slices(len(h)):
            if dweight is None:
                _, dh[block], _ = _swiglu_backward(h[block], grad[block], ctx.limit, None)
            else:
                _, dh[block], dweight[block] = _swiglu_backward(h[block], grad[block], ctx.limit, weight[block])
        return dh, None, dweight


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, start + ROWS)


def _clamped(h: Tensor, limit: float | None) -> Tensor:
    """Gate and up after the clamp, in fp32; without a clamp `h` itself where it is fp32 already."""
    h = h.to(accumulation(h))
    if limit is None:
        return h
    out = torch.empty_like(h)
    (g, u), (g_out, u_out) = h.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.clamp(g, max=limit, out=g_out)
    torch.clamp(u, -limit, limit, out=u_out)
    return out


def _swiglu(h: Tensor, limit: float | None, weight: Tensor | None) -> Tensor:
    g, u = h.to(accumulation(h)).chunk(2, dim=-1)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    a = F.silu(g).mul_(u)
    if weight is not None:
        a *= weight.unsqueeze(-1)
    return a.to(h.dtype)


def _swiglu_backward(
    h: Tensor, grad: Tensor, limit: float | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(a, dh, dweight)`: `da = grad weight, dg = da u silu'(g), du = da silu(g), dweight = <grad, silu(g) u>`."""
    gu = _clamped(h, limit)
    g, u = gu.chunk(2, dim=-1)
    da, silu = grad.to(g.dtype), F.silu(g)
    a = silu * u
    dweight = (da * a).sum(-1)
    if weight is not None:
        a *= weight.unsqueeze(-1)
        da = da * weight.unsqueeze(-1)
    dh = torch.empty_like(gu)
    dg, du = dh.chunk(2, dim=-1)
    torch.mul(da, silu, out=du)
    torch.ops.aten.silu_backward.grad_input(da * u, g, grad_input=dg)
    if limit is not None:
        dh *= torch.eq(gu, h, out=torch.empty_like(gu))  # a float mask: boolean ones are slow on a CPU
    return a.to(h.dtype), dh.to(h.dtype), dweight
