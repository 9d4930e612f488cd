"""Forward and backward of the routed experts as launches: no host synchronisation, every grid an upper bound.

    forward    x, w13 -> h, a = swiglu(h) weight;   y = a w2;   out = sum of y over slots
    backward   dout, w2, h -> dh, a, dweight;   dx = sum over slots of (dh w13);   dw13 = dh^T x,   dw2 = dout^T a

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...triton.launch import architecture, next_power, on_device, registers
from . import kernels
from .tiles import HALF, PLAIN, Blocks, Tiles

TILES = 8  # that a program schedules


class Rows(NamedTuple):
    """The expert order of `moe_permutation`: `order [r]`, `counts [e]`, `inverse [n, k]`, all int64."""

    order: Tensor
    counts: Tensor
    inverse: Tensor


class Gradients(NamedTuple):
    """Of the arguments of `forward`; None where not needed."""

    x: Tensor | None
    weights: Tensor
    w13: Tensor | None
    w2: Tensor | None


class _Schedule(NamedTuple):
    """`tiles [total, 2]`: expert (-1 past the last) and first row; `offsets [e + 1]`: first row of each expert."""

    tiles: Tensor
    offsets: Tensor
    total: int


def tiles_for(w2: Tensor) -> Tiles:
    """The table for experts of this dtype and these widths on the current device."""
    aligned = w2.shape[1] % 16 == 0 and w2.shape[2] % 16 == 0
    return HALF[architecture()] if w2.itemsize == 2 and aligned else PLAIN


def forward(
    x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, rows: Rows, limit: float | None, keep: bool,
    shared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`out [n, d]`, with `shared [n, d]` added, and the pre-activations `h [r, 2 f]` (`[0, 2 f]` unless kept)."""
    x, weights, w13, w2 = (t.contiguous() for t in (x, weights, w13, w2))
    r, d, f = rows.order.numel(), w2.shape[1], w2.shape[2]
    h, a = x.new_empty(r if keep else 0, 2 * f), x.new_empty(r, f)
    t = tiles_for(w2)
    b = t.swiglu
    with on_device(x):
        s = _schedule(rows.counts, r, t.rows)
        w, tma = _source(w13, b.columns, b.inner, t)
        kernels.grouped_swiglu[s.total * triton.cdiv(f, b.columns),](
            x, w, weights, rows.order, s.tiles, s.offsets, h, a, s.total, rows.inverse.shape[1], d, f, _bound(limit),
            KEEP=keep, TMA=tma, **_options(b, t),
        )  # fmt: skip
        return _combine(_product(a, w2, s, t, transposed=True), rows.inverse, shared), h


def backward(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, rows: Rows, limit: float | None,
    need_x: bool = True, need_w13: bool = True, need_w2: bool = True,
    into_w13: Tensor | None = None, into_w2: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of `forward`. Those of w13 and w2 are added to `into_w13` and `into_w2` (float32) where given."""
    dout, x, weights, w13, w2 = (t.contiguous() for t in (dout, x, weights, w13, w2))
    r, d, f = rows.order.numel(), w2.shape[1], w2.shape[2]
    t = tiles_for(w2)
    b = t.swiglu_backward
    blocks = triton.cdiv(f, b.columns)
    a, dh, shares = x.new_empty(r, f), x.new_empty(h.shape), x.new_empty(r, blocks, dtype=torch.float32)
    dweights = weights.new_empty(weights.shape)
    with on_device(x):
        s = _schedule(rows.counts, r, t.rows)
        w, tma = _source(w2, b.inner, b.columns, t)
        kernels.grouped_swiglu_backward[s.total * blocks,](
            dout, w, weights, rows.order, s.tiles, s.offsets, h, dh, a, shares,
            s.total, rows.inverse.shape[1], d, f, _bound(limit), TMA=tma, **_options(b, t),
        )  # fmt: skip
        kernels.sum_blocks[triton.cdiv(r, 256),](shares, dweights, r, blocks, ROWS=256, BLOCKS=next_power(blocks))
        dx = _combine(_product(dh, w13, s, t, transposed=False), rows.inverse) if need_x else None
        dw13 = _outer(dh, x, rows, s, t, w13, into_w13, gather="q") if need_w13 else None
        dw2 = _outer(dout, a, rows, s, t, w2, into_w2, gather="p") if need_w2 else None
    return Gradients(dx, dweights, dw13, dw2)


def _schedule(counts: Tensor, r: int, rows: int) -> _Schedule:
    """Tiles of `rows` rows: an expert with c rows has cdiv(c, rows), all of them at most r // rows + min(e, r)."""
    e, total = len(counts), r // rows + min(len(counts), r)
    tiles, offsets = (counts.new_empty(shape, dtype=torch.int32) for shape in ((total, 2), (e + 1,)))
    grid = (max(triton.cdiv(total, TILES), 1),)
    kernels.schedule[grid](counts, offsets, tiles, e, total, BM=rows, E=next_power(e), TILES=TILES, num_warps=8)
    return _Schedule(tiles, offsets, total)


def _product(a: Tensor, w: Tensor, s: _Schedule, t: Tiles, transposed: bool) -> Tensor:
    """`a [r, inner] w[expert]`, w `[e, inner, outer]`, or `[e, outer, inner]` if transposed."""
    (r, inner), outer, b = a.shape, w.shape[1 if transposed else 2], t.product
    out = a.new_empty(r, outer)
    a, a_tma = _source(a, t.rows, b.inner, t)
    w, w_tma = _source(w, *((b.columns, b.inner) if transposed else (b.inner, b.columns)), t)
    kernels.grouped[s.total * triton.cdiv(outer, b.columns),](
        a, w, s.tiles, s.offsets, out, s.total, inner, outer,
        TRANSPOSED=transposed, A_TMA=a_tma, TMA=w_tma, **_options(b, t),
    )  # fmt: skip
    return out


def _outer(
    p: Tensor, q: Tensor, rows: Rows, s: _Schedule, t: Tiles, w: Tensor, into: Tensor | None, gather: str
) -> Tensor:
    """`p^T q` over the rows of each expert of w `[e, m, n]`; the one to gather lies by token."""
    (e, m, n), b = w.shape, t.outer
    out = w.new_empty(w.shape) if into is None else into
    kernels.grouped_outer[e * triton.cdiv(m, t.rows) * triton.cdiv(n, b.columns),](
        p, q, rows.order, s.offsets, out, rows.inverse.shape[1], m, n, GATHER=gather, ADD=into is not None,
        BM=t.rows, BN=b.columns, BK=b.inner, num_stages=b.stages, **registers(b.warps),
    )  # fmt: skip
    return out


def _combine(rows: Tensor, inverse: Tensor, shared: Tensor | None = None) -> Tensor:
    """Each token's sum over its slots, in slot order, then of `shared [n, d]`: rows `[r, d]` to `[n, d]`."""
    (n, k), d = inverse.shape, rows.shape[1]
    out, shared = rows.new_empty(n, d), None if shared is None else shared.contiguous()
    step, columns = _panel(d)
    grid = triton.cdiv(n, step), triton.cdiv(d, columns)
    flag = shared is not None
    kernels.combine[grid](rows, inverse, shared, out, n, k, d, SHARED=flag, ROWS=step, COLUMNS=columns)
    return out


def _source(w: Tensor, rows: int, columns: int, t: Tiles) -> tuple[Any, bool]:
    """How kernels read blocks `[rows, columns]` of w: through a descriptor where the table says so and w is aligned."""
    if not t.tma or w.shape[-1] * w.itemsize % 16 or w.data_ptr() % 16 or not w.numel():
        return w, False
    return TensorDescriptor.from_tensor(w, [1] * (w.ndim - 2) + [rows, columns]), True


def _options(b: Blocks, t: Tiles) -> dict[str, int]:
    blocks = {"BM": t.rows, "BN": b.columns, "BK": b.inner, "GROUP": t.group}
    return {**blocks, "num_stages": b.stages, **registers(b.warps)}


def _bound(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _panel(width: int) -> tuple[int, int]:
    """Rows and columns of an elementwise program: 1,024 elements."""
    columns = min(next_power(width), 1024)
    return 1024 // columns, columns


def swiglu(h: Tensor, weight: Tensor | None, limit: float | None) -> Tensor:
    """`[r, f]` of h `[r, 2 f]`, times weight `[r]`."""
    h, weight = h.contiguous(), None if weight is None else weight.contiguous()
    r, f = h.shape[0], h.shape[1] // 2
    out = h.new_empty(r, f)
    rows, columns = _panel(f)
    with on_device(h):
        kernels.swiglu_forward[triton.cdiv(r, rows), triton.cdiv(f, columns)](
            h, weight, out, r, f, _bound(limit), WEIGHTED=weight is not None, ROWS=rows, COLUMNS=columns
        )
    return out


def swiglu_backward(grad: Tensor, h: Tensor, weight: Tensor | None, limit: float | None) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` to h, and to weight (empty without one)."""
    h, grad, weight = h.contiguous(), grad.contiguous(), None if weight is None else weight.contiguous()
    r, f = h.shape[0], h.shape[1] // 2
    dh, dweight = h.new_empty(h.shape), h.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    rows, columns = _panel(f)
    with on_device(h):
        kernels.swiglu_backward[triton.cdiv(r, rows),](
            h, weight, grad, dh, dweight, r, f, _bound(limit), WEIGHTED=weight is not None, ROWS=rows, COLUMNS=columns
        )
    return dh, dweight
