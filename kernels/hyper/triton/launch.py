"""Forward and backward of mHC as launches: no host synchronisation, every grid known from the shapes.

    read        streams -> partial sums of the projection -> pre, post, comb -> the sublayer's input
    recombine   output, streams, post, comb -> new streams

The blocks of the two products are one fixed choice on each architecture, so that no token depends on its batch. They
were chosen by compiling: no register spills, shared memory within the limit, tensor cores. The products are skinny,
their traffic is that of the streams: a tile has so many tokens that the projection, which all read, stays cheap.

t tokens · n streams · d width · w = n d · m rows of the projection
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import architecture, next_power, on_device, registers
from . import kernels

SPLIT = 4096  # columns of the flattened streams that one program of the projection sums over
PROGRAMS = 1024  # of the projection's gradient, about so many: each sums over tiles of tokens,
STEPS = 16  # at least so many
TOKENS = 32  # of one block of coefficients
PARTS = 512  # at most so many partial sums of the gradients of base and scale


class Blocks(NamedTuple):
    """Of one product: tokens, columns of the streams, warps, pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture. `precision` is that of float32 factors; tf32x3 is exact to about 2^-21."""

    project: Blocks
    backward: Blocks
    precision: str = "tf32x3"


TABLE = {  # n <= 4: up to 32 rows of the projection
    "sm_80": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "sm_89": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "sm_90": Tiles(Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
    "sm_100": Tiles(Blocks(32, 64, 4, 3), Blocks(32, 64, 8, 2)),
    "hip": Tiles(Blocks(32, 64, 4, 2), Blocks(32, 32, 4, 2), "ieee"),
}
_WIDE = Tiles(Blocks(32, 32, 4, 2), Blocks(16, 32, 8, 2))
SINGLE = 16  # tokens of float32 streams in the backward pass, at most: of more, Hopper spills
WIDE = {  # more streams: up to 128 rows
    **dict.fromkeys(TABLE, _WIDE),
    "hip": _WIDE._replace(precision="ieee"),
}


def tiles_for(rows: int) -> Tiles:
    """The table for a projection to so many rows on the current device."""
    return (TABLE if rows <= 32 else WIDE)[architecture()]


def panel(n: int, width: int) -> tuple[int, int]:
    """Columns of every stream that a program holds at once, and its warps: so that n (n + 1) sums fit in registers."""
    most, each = {1: (1024, 8), 2: (1024, 8), 3: (256, 4), 4: (256, 4)}.get(n, (128, 1))
    columns = min(1 << (width - 1).bit_length(), most)
    return columns, max(columns // (32 * each), 1)


class Site(NamedTuple):
    """What `read` is given: streams [t, n, d], the projection fn [m, w], and what makes coefficients of it."""

    streams: Tensor
    fn: Tensor
    base: Tensor
    scale: Tensor
    iterations: int
    eps: float

    def contiguous(self) -> "Site":
        streams, fn, base, scale = (x.contiguous() for x in self[:4])
        return Site(streams, fn, base, scale, *self[4:])


class Read(NamedTuple):
    """What a sublayer reads, `u [t, d]`, and its coefficients; `mix [t, m]` and `r [t]` are kept for the gradient.

    link: one zero, [t, n, d] to autograd, where it is the streams that pass the sublayer by.
    """

    u: Tensor
    pre: Tensor
    post: Tensor
    comb: Tensor
    mix: Tensor
    r: Tensor
    link: Tensor


class Upstream(NamedTuple):
    """Gradients of what `read` returned; None where there is none."""

    u: Tensor | None
    pre: Tensor | None
    post: Tensor | None
    comb: Tensor | None
    link: Tensor | None


class Saved(NamedTuple):
    """Results of `read` that its gradient needs."""

    pre: Tensor
    mix: Tensor
    r: Tensor


class Gradients(NamedTuple):
    """Of the arguments of `read`; None where not needed. `logits [m + 3]` float32 is that of base, then of scale."""

    streams: Tensor | None
    fn: Tensor | None
    logits: Tensor


def read_outputs(streams: Tensor, fn: Tensor, iterations: int, collapsed: bool) -> Read:
    """Empty tensors for `read`. Without iterations, at the head, there are no post and comb."""
    (t, n, d), sub = streams.shape, iterations > 0
    shapes = (t, n), (t if sub else 0, n), (t if sub else 0, n, n), (t, len(fn)), (t,)
    u, link = streams.new_empty(t if collapsed else 0, d), streams.new_empty(1, 1, 1).expand(t, n, d)
    pre, post, comb, mix, r = (streams.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return Read(u, pre, post, comb, mix, r, link)


def read(site: Site, norm_eps: float, collapsed: bool) -> Read:
    """The coefficients of every token and, if `collapsed`, what the sublayer reads."""
    streams, fn, base, scale, iterations, eps = site.contiguous()
    (t, n, _), (m, w) = streams.shape, fn.shape
    out, table, splits = read_outputs(streams, fn, iterations, collapsed), tiles_for(m), triton.cdiv(w, SPLIT)
    partial = streams.new_empty(splits, t, m + 1, dtype=torch.float32)
    b = table.project
    with on_device(streams):
        kernels.project[triton.cdiv(t, b.tokens), splits](
            streams, fn, partial, t, w, m, SPLIT=SPLIT, BT=b.tokens, BK=b.columns, M=next_power(m, 16),
            PRECISION=table.precision, num_stages=b.stages, **registers(b.warps),
        )  # fmt: skip
        kernels.coefficients[triton.cdiv(t, TOKENS),](
            partial, base, scale, *out[1:], t, w, splits, iterations, eps, norm_eps,
            HEAD=iterations == 0, N=n, P=next_power(n), BT=TOKENS, **registers(4),
        )  # fmt: skip
        if collapsed:
            _collapse(streams, out.pre, out.u)
    return out


def read_backward(upstream: Upstream, site: Site, saved: Saved, *, need_streams: bool, need_fn: bool) -> Gradients:
    """Gradients of `read`, from those of its results that have one."""
    upstream = Upstream(*(x if x is None else x.contiguous() for x in upstream))
    site, u = site.contiguous(), upstream.u
    with on_device(site.streams):
        dread = None if u is None else collapse_backward(u, site.streams, saved.pre, need_streams=False)[1]
        scaled, shrink, logits = _coefficients_backward(upstream, dread, site, saved)
        dstreams = site.streams.new_empty(site.streams.shape) if need_streams else None
        dfn = _project_backward(upstream, site, saved.pre, scaled, shrink, dstreams, need_fn)
    return Gradients(dstreams, dfn, logits)


def _coefficients_backward(
    upstream: Upstream, dread: Tensor | None, site: Site, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """What the projection's gradient needs, `scaled [t, m]` and `shrink [t]`, and `Gradients.logits`.

    dread: the gradient of pre that comes through what the sublayer reads.
    """
    (t, n, d), m, p = site.streams.shape, len(site.fn), next_power(site.streams.shape[1])
    rounds = max(site.iterations, 1)
    blocks = max(triton.cdiv(t, TOKENS), 1)
    steps = triton.cdiv(blocks, PARTS)
    parts = triton.cdiv(blocks, steps)
    divisors = saved.mix.new_empty(parts, 2 * rounds - 1, TOKENS, p)
    scaled, shrink, sums = (saved.mix.new_empty(shape) for shape in ((t, m), (t,), (parts, m + 3)))
    grads = {"DPRE": upstream.pre, "DREAD": dread, "DPOST": upstream.post, "DCOMB": upstream.comb}
    kernels.coefficients_backward[parts,](
        *grads.values(), saved.mix, saved.r, site.base, site.scale, divisors, scaled, shrink, sums,
        t, n * d, steps, rounds, site.eps, **{name: grad is not None for name, grad in grads.items()},
        HEAD=site.iterations == 0, N=n, P=p, BT=TOKENS, **registers(4),
    )  # fmt: skip
    return scaled, shrink, _sum_parts(sums)


def _project_backward(
    upstream: Upstream, site: Site, pre: Tensor, scaled: Tensor, shrink: Tensor, dstreams: Tensor | None, need_fn: bool
) -> Tensor | None:
    """Writes `dstreams` where it is given; the gradient of fn if it is needed."""
    if dstreams is None and not need_fn:
        return None
    (t, n, d), (m, w), table = site.streams.shape, site.fn.shape, tiles_for(len(site.fn))
    b, du, rest = table.backward, upstream.u, upstream.link
    half, columns = site.streams.itemsize == 2, min(b.columns, next_power(d, 16))
    tokens = b.tokens if half else min(b.tokens, SINGLE)
    tiles, across = max(triton.cdiv(t, tokens), 1), n * triton.cdiv(d, columns)
    steps = max(triton.cdiv(tiles, triton.cdiv(PROGRAMS, across)), STEPS)
    groups = triton.cdiv(tiles, steps)
    parts = scaled.new_empty(groups, m, w) if need_fn else None
    kernels.project_backward[across, groups](
        site.streams, site.fn, scaled, shrink, du, pre, rest, dstreams, parts, t, d, m, steps,
        READ=du is not None, REST=rest is not None, DX=dstreams is not None, DFN=need_fn,
        N=n, BT=tokens, BK=columns, M=next_power(m, 16), PRECISION=table.precision, num_stages=b.stages,
        **registers(b.warps),
    )  # fmt: skip
    return None if parts is None else _sum_parts(parts, site.fn.dtype)


def _sum_parts(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum over the first axis, in a fixed order."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    rows, columns = (64, 32) if out.numel() <= 32 else (16, 128)
    grid = (triton.cdiv(out.numel(), columns),)
    kernels.sum_parts[grid](parts, out, len(parts), out.numel(), ROWS=rows, COLUMNS=columns)
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
