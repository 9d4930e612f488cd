"""Forward and backward of mHC as launches: no host synchronisation, every grid known from the shapes.

    read        streams -> partial sums of the projection -> pre, post, comb -> the sublayer's input
    recombine   output, streams, post, comb -> new streams

t tokens · n streams · d width · w = n d · m rows of the projection
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, next_power, on_device
from . import kernels
from .tiles import GROUPS, PARTS, SPLIT, STEPS, TABLE, TOKENS, WIDE, Tiles, panel


class Read(NamedTuple):
    """What a sublayer reads, `u [t, d]`, and its coefficients; `mix [t, m]` and `r [t]` are kept for the gradient."""

    u: Tensor
    pre: Tensor
    post: Tensor
    comb: Tensor
    mix: Tensor
    r: Tensor


class Gradients(NamedTuple):
    """Of the arguments of `read`; None where not needed. `logits [m + 3]` float32 is that of base, then of scale."""

    streams: Tensor | None
    fn: Tensor | None
    logits: Tensor


def tiles_for(rows: int) -> Tiles:
    """The table for a projection to so many rows on the current device."""
    return (TABLE if rows <= 32 else WIDE)[architecture()]


def read_outputs(streams: Tensor, fn: Tensor, iterations: int, collapsed: bool) -> Read:
    """Empty tensors for `read`. Without iterations, at the head, there are no post and comb."""
    (t, n, d), sub = streams.shape, iterations > 0
    shapes = (t, n), (t if sub else 0, n), (t if sub else 0, n, n), (t, len(fn)), (t,)
    u = streams.new_empty(t if collapsed else 0, d)
    return Read(u, *(streams.new_empty(shape, dtype=torch.float32) for shape in shapes))


def read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float,
    collapsed: bool,
) -> Read:  # fmt: skip
    """Coefficients of streams [t, n, d] and, if `collapsed`, what the sublayer reads."""
    streams, fn, base, scale = (x.contiguous() for x in (streams, fn, base, scale))
    (t, n, _), m, w = streams.shape, len(fn), fn.shape[1]
    out, table, splits = read_outputs(streams, fn, iterations, collapsed), tiles_for(m), triton.cdiv(w, SPLIT)
    partial = streams.new_empty(splits, t, m + 1, dtype=torch.float32)
    b = table.project
    with on_device(streams):
        kernels.project[triton.cdiv(t, b.tokens), splits](
            streams, fn, partial, t, w, m, SPLIT=SPLIT, BT=b.tokens, BK=b.columns, M=next_power(m, 16),
            PRECISION=table.precision, num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip
        kernels.coefficients[triton.cdiv(t, TOKENS),](
            partial, base, scale, out.pre, out.post, out.comb, out.mix, out.r, t, w, splits, iterations, eps, norm_eps,
            HEAD=iterations == 0, N=n, P=next_power(n), BT=TOKENS,
        )  # fmt: skip
        if collapsed:
            _collapse(streams, out.pre, out.u)
    return out


def read_backward(
    du: Tensor | None, dpre: Tensor | None, dpost: Tensor | None, dcomb: Tensor | None,
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, pre: Tensor, mix: Tensor, r: Tensor,
    iterations: int, eps: float, need_streams: bool, need_fn: bool,
) -> Gradients:  # fmt: skip
    """Gradients of `read`, from those of its results that have one."""
    du, dpre, dpost, dcomb = (x if x is None else x.contiguous() for x in (du, dpre, dpost, dcomb))
    streams, fn, base, scale = (x.contiguous() for x in (streams, fn, base, scale))
    with on_device(streams):
        dread = None if du is None else collapse_backward(du, streams, pre, need_streams=False)[1]
        grads = dpre, dread, dpost, dcomb
        scaled, shrink, logits = _coefficients_backward(grads, streams, base, scale, mix, r, iterations, eps)
        return Gradients(*_project_backward(streams, fn, scaled, shrink, du, pre, need_streams, need_fn), logits)


def _coefficients_backward(
    grads: tuple[Tensor | None, ...], streams: Tensor, base: Tensor, scale: Tensor, mix: Tensor, r: Tensor,
    iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the projection's gradient needs, `scaled [t, m]` and `shrink [t]`, and `Gradients.logits`."""
    (t, n, d), m, p, rounds = streams.shape, mix.shape[1], next_power(streams.shape[1]), max(iterations, 1)
    blocks = max(triton.cdiv(t, TOKENS), 1)
    steps = triton.cdiv(blocks, PARTS)
    parts = triton.cdiv(blocks, steps)
    divisors = mix.new_empty(parts, 2 * rounds - 1, TOKENS, p)
    scaled, shrink, sums = mix.new_empty(t, m), mix.new_empty(t), mix.new_empty(parts, m + 3)
    names = "DPRE", "DREAD", "DPOST", "DCOMB"
    kernels.coefficients_backward[parts,](
        *grads, mix, r, base, scale, divisors, scaled, shrink, sums, t, n * d, steps, rounds, eps,
        **{name: grad is not None for name, grad in zip(names, grads)}, HEAD=iterations == 0, N=n, P=p, BT=TOKENS,
    )  # fmt: skip
    return scaled, shrink, _sum_parts(sums)


def _project_backward(
    streams: Tensor, fn: Tensor, scaled: Tensor, shrink: Tensor, du: Tensor | None, pre: Tensor,
    need_streams: bool, need_fn: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if not (need_streams or need_fn):
        return None, None
    (t, n, d), (m, w), table = streams.shape, fn.shape, tiles_for(len(fn))
    b = table.backward
    groups = max(triton.cdiv(t, b.tokens), 1)
    steps = max(triton.cdiv(groups, GROUPS), STEPS)
    groups = triton.cdiv(groups, steps)
    dstreams = streams.new_empty(streams.shape) if need_streams else None
    parts = scaled.new_empty(groups, m, w) if need_fn else None
    kernels.project_backward[n * triton.cdiv(d, b.columns), groups](
        streams, fn, scaled, shrink, du, pre, dstreams, parts, t, d, m, steps,
        READ=du is not None, DX=need_streams, DFN=need_fn, N=n, BT=b.tokens, BK=b.columns, M=next_power(m, 16),
        PRECISION=table.precision, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return dstreams, None if parts is None else _sum_parts(parts, fn.dtype)


def _sum_parts(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over the first axis, in a fixed order."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    grid = (triton.cdiv(out.numel(), 128),)
    kernels.sum_parts[grid](parts, out, len(parts), out.numel(), ROWS=16, COLUMNS=128)
    return out


def collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """`[t, d]` of streams [t, n, d] and pre [t, n]."""
    streams, pre = streams.contiguous(), pre.contiguous()
    out = streams.new_empty(streams.shape[0], streams.shape[2])
    with on_device(streams):
        _collapse(streams, pre, out)
    return out


def _collapse(streams: Tensor, pre: Tensor, out: Tensor) -> None:
    (t, n, d), (c, warps) = streams.shape, panel(*streams.shape[1:])
    kernels.collapse[t, triton.cdiv(d, c)](streams, pre, out, d, N=n, C=c, num_warps=warps)


def collapse_backward(
    du: Tensor, streams: Tensor, pre: Tensor, need_streams: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `collapse` to streams, if needed, and to pre."""
    du, streams, pre = (x.contiguous() for x in (du, streams, pre))
    (t, n, d), (c, warps) = streams.shape, panel(*streams.shape[1:])
    dstreams, dpre = streams.new_empty(streams.shape) if need_streams else None, pre.new_empty(pre.shape)
    with on_device(streams):
        kernels.collapse_backward[t,](du, streams, pre, dstreams, dpre, d, DX=need_streams, N=n, C=c, num_warps=warps)
    return dstreams, dpre


def recombine(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`[t, n, d]` of output [t, d], streams [t, n, d], post [t, n] and comb [t, n, n]."""
    output, streams, post, comb = (x.contiguous() for x in (output, streams, post, comb))
    (t, n, d), (c, warps) = streams.shape, panel(*streams.shape[1:])
    out = streams.new_empty(streams.shape)
    with on_device(streams):
        kernels.recombine[t, triton.cdiv(d, c)](output, streams, post, comb, out, d, N=n, C=c, num_warps=warps)
    return out


def recombine_backward(
    grad: Tensor, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `recombine` to its arguments."""
    grad, output, streams, post, comb = (x.contiguous() for x in (grad, output, streams, post, comb))
    (t, n, d), (c, warps) = streams.shape, panel(*streams.shape[1:])
    dy, dx, dpost, dcomb = (x.new_empty(x.shape) for x in (output, streams, post, comb))
    with on_device(streams):
        kernels.recombine_backward[t,](
            grad, output, streams, post, comb, dy, dx, dpost, dcomb, d, N=n, C=c, num_warps=warps
        )
    return dy, dx, dpost, dcomb
