"""mHC in PyTorch, in blocks of tokens: projection, Sinkhorn, collapse and recombination, each with its backward written
out.

The backward passes need the streams and a few numbers per token; Sinkhorn's iterates are computed again.
Matrix products go into existing tensors (`out=` or in place), which autocast leaves in full precision. Their factors
are contiguous: batched products of other layouts run matrix by matrix.

Axes: t tokens · n streams (j source, k target) · d width · w = n d · m rows of the projection.
Sinkhorn runs with the tokens last, [n, n, t]: every small step runs along contiguous memory.
Up to four tokens without gradient, as in decoding, take a path of few calls: there a call costs more than its work.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..precision import accumulation, tracked
from . import Coefficients
from .step import sinkhorn_step

_BLOCK_VALUES = 1 << 20  # streams are worked on in blocks of this many values, so that a cast copy stays in the cache
_STEP_TOKENS = 4  # tokens up to which one after the other through Sinkhorn is faster than all at once
_BLOCK_TOKENS = 2048  # Sinkhorn's backward holds every iterate of one block of tokens


def hyper_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> Coefficients:
    if _is_step(streams, fn, base, scale):
        return _step_coefficients(streams, fn, base, scale, iterations, eps, norm_eps)
    _, *found = _Read.apply(_flat(streams), fn, base, scale, iterations, eps, norm_eps, False)
    return Coefficients(*(x.view(*streams.shape[:-1], *x.shape[2:]) for x in found))


def hyper_read(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Coefficients]:
    if _is_step(streams, fn, base, scale):
        coefficients = _step_coefficients(streams, fn, base, scale, iterations, eps, norm_eps)
        return hyper_collapse(streams, coefficients.pre), coefficients
    u, *found = _Read.apply(_flat(streams), fn, base, scale, iterations, eps, norm_eps, True)
    coefficients = Coefficients(*(x.view(*streams.shape[:-1], *x.shape[2:]) for x in found))
    return u.view(*streams.shape[:-2], streams.shape[-1]), coefficients


def hyper_head_weights(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float = 1e-6, norm_eps: float = 1e-6
) -> Tensor:
    if _is_step(streams, fn, base, scale):
        logits = _step_logits(streams, fn, base, scale, (len(fn),), norm_eps)
        return logits.sigmoid_().add_(eps).reshape(streams.shape[:-1])
    return _Read.apply(_flat(streams), fn, base, scale, 0, eps, norm_eps, False)[1].view(streams.shape[:-1])


def hyper_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    n, d = streams.shape[-2:]
    if _is_step(streams, pre):
        out = streams.new_empty(*streams.shape[:-2], d)
        torch.bmm(pre.view(-1, 1, n), streams.view(-1, n, d), out=out.view(-1, 1, d))
        return out
    return _Collapse.apply(_flat(streams), pre.reshape(-1, n)).reshape(*streams.shape[:-2], d)


def hyper_recombine(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    n, d = streams.shape[-2:]
    if _is_step(streams, output, post, comb):
        out = post.unsqueeze(-1) * output.unsqueeze(-2)
        out.view(-1, n, d).baddbmm_(comb.view(-1, n, n).mT, streams.view(-1, n, d))
        return out
    mixed = _Recombine.apply(output.reshape(-1, d), _flat(streams), post.reshape(-1, n), comb.reshape(-1, n, n))
    return mixed.reshape(streams.shape)


def _flat(streams: Tensor) -> Tensor:
    return streams.reshape(-1, *streams.shape[-2:])


def _is_step(streams: Tensor, *others: Tensor) -> bool:
    """Whether this is a few tokens without gradient: contiguous, on the CPU, all in the dtype they are computed in."""
    return (
        1 <= streams.shape[:-2].numel() <= _STEP_TOKENS
        and not tracked(streams, *others)
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype == accumulation(x) and x.is_contiguous() for x in (streams, *others))
    )


def _step_logits(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, parts: tuple[int, ...], norm_eps: float
) -> Tensor:
    """`mix * scale + base`, [t, m]."""
    u = streams.view(-1, fn.shape[1])
    r = torch.linalg.vector_norm(u, dim=1, keepdim=True).square_().div_(u.shape[1]).add_(norm_eps).rsqrt_()
    mix = torch.mm(u, fn.t(), out=u.new_empty(len(u), len(fn))).mul_(r)
    return torch.addcmul(base, mix, scale.index_select(0, _part_of_row(parts)))


@functools.cache
def _part_of_row(parts: tuple[int, ...]) -> Tensor:
    return torch.arange(len(parts)).repeat_interleave(torch.tensor(parts))


def _step_coefficients(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> Coefficients:
    n, lead = streams.shape[-2], streams.shape[:-2]
    logits = _step_logits(streams, fn, base, scale, _parts(n), norm_eps)
    pre, post, comb = logits.split(_parts(n), 1)
    first = comb.unflatten(1, (n, n)).softmax(2).add_(eps)
    return Coefficients(
        pre.sigmoid().add_(eps).view(*lead, n),
        post.sigmoid().mul_(2).view(*lead, n),
        torch.from_numpy(np.stack([sinkhorn_step(x, iterations, eps) for x in first.numpy()])).view(*lead, n, n),
    )


class _Read(Function):
    """u = sum_j pre_j X_j if `collapsed`, pre, post and comb of streams [t, n, d]; without `iterations` pre alone.

    Saves the streams, mix, r and pre. x is the streams side by side; dz is the gradient of the logits, dmix = dz scale.

    mix = r fn x,  r = 1 / sqrt(mean(x^2) + norm_eps),  logits = mix scale + base
    dfn = (r dmix) x,  dx = (r dmix) fn - r^2 (sum(mix dmix) / w) x,  and to each X_j pre_j du
    """

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
        iterations: int, eps: float, norm_eps: float, collapsed: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (t, n, d), dtype = streams.shape, accumulation(streams)
        mix, logits = (streams.new_empty(t, len(fn), dtype=dtype) for _ in range(2))
        r, pre, u = mix.new_empty(t), mix.new_empty(t, n), streams.new_empty(t if collapsed else 0, d)
        weight, factors, constants = fn.to(dtype), _factors(scale, n, dtype), base.to(dtype)
        for rows in _blocks(streams):
            block = streams[rows].to(dtype)
            x = block.reshape(-1, n * d)
            root = torch.linalg.vector_norm(x, dim=1, out=r[rows]).square_().div_(n * d).add_(norm_eps).rsqrt_()
            torch.mm(x, weight.t(), out=mix[rows]).mul_(root[:, None])
            torch.addcmul(constants, mix[rows], factors, out=logits[rows])
            torch.sigmoid(logits[rows, :n], out=pre[rows]).add_(eps)
            if collapsed:
                with _written(u[:, None], rows, dtype) as target:
                    torch.bmm(pre[rows, None], block, out=target)
        ctx.save_for_backward(streams, fn, base, scale, mix, r, pre)
        ctx.iterations, ctx.eps, ctx.collapsed = iterations, eps, collapsed
        ctx.set_materialize_grads(False)
        if not iterations:
            return u, pre, mix.new_empty(0), mix.new_empty(0)
        comb = sinkhorn(_tokens_last(logits[:, 2 * n :].unflatten(1, (n, n))), iterations, eps)
        return u, pre, logits[:, n : 2 * n].sigmoid().mul_(2), comb.permute(2, 0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        streams, fn, base, scale, mix, r, pre = ctx.saved_tensors
        n, w, dtype = streams.shape[1], fn.shape[1], mix.dtype
        du = grads[0] if ctx.collapsed else None
        dread = None if du is None else _collapse_backward(du, streams, pre, False, True)[1]
        factors = _factors(scale, n, dtype)
        logits = torch.addcmul(base.to(dtype), mix, factors)
        dz = _logit_gradients(logits, (grads[1], dread, *grads[2:]), n, ctx.iterations, ctx.eps)
        dmix = dz * factors
        shrink = (mix * dmix).sum(1).mul_(r).mul_(r).div_(-w)
        scaled, weight = dmix.mul_(r[:, None]), fn.to(dtype)
        dstreams = streams.new_empty(streams.shape) if ctx.needs_input_grad[0] else None
        dfn = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _blocks(streams):
            block = streams[rows].to(dtype)
            x = block.reshape(-1, w)
            if dfn is not None:
                dfn.addmm_(scaled[rows].t(), x)
            if dstreams is not None:
                with _written(dstreams, rows, dtype) as target:
                    torch.mul(x, shrink[rows, None], out=target.view(-1, w)).addmm_(scaled[rows], weight)
                    if du is not None:
                        target.addcmul_(pre[rows, :, None], du[rows, None].to(dtype))
        dscale = torch.stack([part.sum() for part in dz.mul(mix).sum(0).split(_parts(n)[: len(scale)])])
        dfn = None if dfn is None else dfn.to(fn.dtype)
        return dstreams, dfn, dz.sum(0).to(base.dtype), dscale.to(scale.dtype), None, None, None, None


def _parts(n: int) -> tuple[int, int, int]:
    """Rows of the projection for pre, post and comb; the head has the first."""
    return n, n, n * n


def _factors(scale: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """The entry of `scale` that each row of the projection is multiplied by."""
    return torch.cat([factor.expand(size) for factor, size in zip(scale.to(dtype).unbind(), _parts(n))])


def _logit_gradients(logits: Tensor, grads: tuple[Tensor | None, ...], n: int, iterations: int, eps: float) -> Tensor:
    """The gradient to logits [t, m] from those of pre (two of them, to be added), post and comb."""
    dpre, dread, dpost, dcomb = grads
    result = torch.zeros_like(logits)
    for columns, factor, grad in ((slice(n), 1, dpre), (slice(n), 1, dread), (slice(n, 2 * n), 2, dpost)):
        if grad is not None:
            gate = logits[:, columns].sigmoid()
            result[:, columns] += factor * gate * (1 - gate) * grad
    if dcomb is not None:
        for start in range(0, len(logits), _BLOCK_TOKENS):
            rows = slice(start, start + _BLOCK_TOKENS)
            last = _tokens_last(logits[rows, 2 * n :].unflatten(1, (n, n))), _tokens_last(dcomb[rows])
            result[rows, 2 * n :] = sinkhorn_backward(*last, iterations, eps).permute(2, 0, 1).flatten(1)
    return result


def _tokens_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0).contiguous()


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn's normalisation of [n, n, t] over the first two axes, ending on the columns.

    C = softmax_k(logits) + eps; C = C / (sum_j C + eps); then `iterations - 1` times over k and again over j.
    """
    return _iterates(logits, iterations, eps, keep=False)[-1].contiguous()


def sinkhorn_backward(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of `sinkhorn` with respect to its logits, all of whose iterates are held at once.

    For one step Y = X / (sum X + eps): dX = (dY - sum(Y dY)) / (sum X + eps). Multiplied by X it needs no division:
    Z_X = X dX = Z_Y - Y sum(Z_Y), so that the walk back carries Z and divides by the first iterate at the end.
    """
    first, *steps = _iterates(logits, iterations, eps, keep=True)
    z = torch.mul(grad, steps[-1], out=logits.new_empty(logits.shape))
    for index in range(len(steps), 0, -1):
        z.addcmul_(steps[index - 1], z.sum(_axis(index), keepdim=True), value=-1)
    share = torch.softmax(logits, 1)
    z *= share / first
    return z.addcmul_(share, z.sum(1, keepdim=True), value=-1)


def _iterates(logits: Tensor, iterations: int, eps: float, *, keep: bool) -> list[Tensor]:
    """The iterates of Sinkhorn from `softmax + eps` on, [n, n, t] each; only the last one unless `keep`.

    Each has a border of eps after its last row and column: the sum over a bordered axis is the divisor.
    """
    n, _, tokens = logits.shape
    slots = 2 * iterations if keep else 1
    bordered = logits.new_empty(slots, n + 1, n + 1, tokens)
    bordered[:, n] = eps
    bordered[:, :, n] = eps
    inner = list(bordered[:, :n, :n].unbind())
    divided = list(bordered[:, :, :n].unbind()), list(bordered[:, :n].unbind())
    totals = logits.new_empty(1, n, tokens), logits.new_empty(n, 1, tokens)
    torch.softmax(logits, 1, out=inner[0]).add_(eps)
    for index in range(1, 2 * iterations):
        source, axis = (index - 1) % slots, _axis(index)
        torch.sum(divided[axis][source], axis, keepdim=True, out=totals[axis])
        torch.div(inner[source], totals[axis], out=inner[index % slots])
    return inner


def _axis(index: int) -> int:
    """What step `index` (from 1) of Sinkhorn sums over: sources j (0) and targets k (1) in turn, from j to j."""
    return 1 - index % 2


class _Collapse(Function):
    """`u = sum_j pre_j X_j`. dX_j = pre_j du; dpre_j = sum_d X_j du."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor) -> Tensor:
        pre = pre.contiguous()
        ctx.save_for_backward(streams, pre)
        dtype = accumulation(streams)
        collapsed = streams.new_empty(streams.shape[0], streams.shape[2])
        for rows in _blocks(streams):
            with _written(collapsed[:, None], rows, dtype) as target:
                torch.bmm(pre[rows, None].to(dtype), streams[rows].to(dtype), out=target)
        return collapsed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        return _collapse_backward(du, *ctx.saved_tensors, *ctx.needs_input_grad)


def _collapse_backward(
    du: Tensor, streams: Tensor, pre: Tensor, need_streams: bool, need_pre: bool
) -> tuple[Tensor | None, Tensor | None]:
    dtype = accumulation(streams)
    dstreams = streams.new_empty(streams.shape) if need_streams else None
    dpre = pre.new_empty(pre.shape) if need_pre else None
    for rows in _blocks(streams):
        grad = du[rows, None].to(dtype).contiguous()
        if dstreams is not None:
            with _written(dstreams, rows, dtype) as target:
                torch.mul(pre[rows, :, None].to(dtype), grad, out=target)
        if dpre is not None:
            with _written(dpre[:, None], rows, dtype) as target:
                torch.bmm(grad, streams[rows].to(dtype).mT, out=target)
    return dstreams, dpre


class _Recombine(Function):
    """`X'_k = post_k y + sum_j comb[j, k] X_j`.

    dX_j = sum_k comb[j, k] dX'_k; dy = sum_k post_k dX'_k; dpost_k = sum_d y dX'_k; dcomb[j, k] = sum_d X_j dX'_k.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        post, comb = post.contiguous(), comb.contiguous()
        ctx.save_for_backward(y, streams, post, comb)
        dtype = accumulation(streams)
        mixed = streams.new_empty(streams.shape)
        for rows in _blocks(streams):
            with _written(mixed, rows, dtype) as target:
                torch.mul(post[rows, :, None].to(dtype), y[rows, None].to(dtype), out=target)
                target.baddbmm_(comb[rows].to(dtype).mT, streams[rows].to(dtype))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, streams, post, comb = inputs = ctx.saved_tensors
        dtype = accumulation(streams)
        results = [x.new_empty(x.shape) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad)]
        dy, dstreams, dpost, dcomb = results
        for rows in _blocks(streams):
            block = grad[rows].to(dtype).contiguous()
            if dy is not None:
                with _written(dy[:, None], rows, dtype) as target:
                    torch.bmm(post[rows, None].to(dtype), block, out=target)
            if dstreams is not None:
                with _written(dstreams, rows, dtype) as target:
                    torch.bmm(comb[rows].to(dtype), block, out=target)
            if dpost is not None:
                with _written(dpost[:, None], rows, dtype) as target:
                    torch.bmm(y[rows, None].to(dtype), block.mT, out=target)
            if dcomb is not None:
                with _written(dcomb, rows, dtype) as target:
                    torch.bmm(streams[rows].to(dtype), block.mT, out=target)
        return tuple(results)


def _blocks(streams: Tensor) -> Iterator[slice]:
    """The tokens of [t, ...] in blocks of about `_BLOCK_VALUES` values."""
    size = max(1, _BLOCK_VALUES // streams[:1].numel()) if len(streams) else 1
    return (slice(start, start + size) for start in range(0, len(streams), size))


@contextmanager
def _written(tensor: Tensor, rows: slice, dtype: torch.dtype) -> Iterator[Tensor]:
    """The given rows of `tensor` to write to, in `dtype`: rounded to the dtype of `tensor` at the end."""
    target = tensor[rows] if tensor.dtype == dtype else torch.empty_like(tensor[rows], dtype=dtype)
    yield target
    if tensor.dtype != dtype:
        tensor[rows] = target
