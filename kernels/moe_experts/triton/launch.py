"""Forward and backward of the routed experts as launches: no host synchronisation, every grid an upper bound.

    forward    x, w13 -> h, a = swiglu(h) weight;   y = a w2;   out = sum of y over slots
    backward   dout, w2, h -> dh, a, dweight;   dx = sum over slots of (dh w13);   dw13 = dh^T x,   dw2 = dout^T a

The blocks of each kernel are one fixed choice for each architecture, so that no token depends on the rest of its batch.
Chosen by compiling: no register spills, shared memory within the limit, wgmma on Hopper. Tiles have 128 rows for 16-bit
inputs even where an expert has few: below some 200 rows to an expert the weights' bytes are what takes time, and tensor
cores, which sum in another order below 64 rows, would make a token's bits depend on the load.

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...moe_route.routing import Permutation
from ...triton.launch import architecture, next_power, on_device, registers
from . import kernels

# blocks --------------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Of one product: columns, inner, warps, pipeline stages."""

    columns: int
    inner: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    rows: int  # of every tile
    swiglu: Blocks  # x w13: two accumulators
    swiglu_backward: Blocks  # dout w2, then SwiGLU backwards
    product: Blocks  # a w2 and dh w13
    outer: Blocks  # dw13 and dw2: `rows` by `columns` of the weight; half of the stages fetch `order`
    tma: bool = False  # weights, their gradients and rows in expert order go by tensor memory access where aligned
    group: int = 8  # tiles that take a column block in turn, to share it in L2


HALF = {  # bf16 and fp16, widths that are multiples of 16
    "sm_80": Tiles(128, Blocks(64, 32, 8, 4), Blocks(64, 32, 8, 4), Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 5)),
    "sm_89": Tiles(128, Blocks(64, 32, 8, 3), Blocks(64, 32, 8, 3), Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 5)),
    "sm_90": Tiles(
        128, Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 3), Blocks(256, 64, 8, 3), Blocks(256, 32, 8, 7), tma=True
    ),
    "sm_100": Tiles(128, Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 3), Blocks(256, 64, 8, 5)),
    "hip": Tiles(128, Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
}
_SMALL = Blocks(32, 16, 4, 2)
# float32, whose products take no tensor cores, and other widths
PLAIN = Tiles(64, _SMALL._replace(warps=8), _SMALL, _SMALL, _SMALL)
SCHEDULED = 8  # tiles of one program of the schedule


def tiles_for(w2: Tensor) -> Tiles:
    """The table for experts of this dtype and these widths on the current device."""
    aligned = w2.shape[1] % 16 == 0 and w2.shape[2] % 16 == 0
    return HALF[architecture()] if w2.itemsize == 2 and aligned else PLAIN


# experts -------------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """`x [n, d]`, `weights [n, k]`, `w13 [e, 2 f, d]`, `w2 [e, d, f]`."""

    x: Tensor
    weights: Tensor
    w13: Tensor
    w2: Tensor


class Gradients(NamedTuple):
    """Of the operands; None where not needed."""

    x: Tensor | None
    weights: Tensor
    w13: Tensor | None
    w2: Tensor | None


class Rows(NamedTuple):
    """What the backward pass needs of a `Permutation`: `order [r]` and `inverse [n, k]`."""

    order: Tensor
    inverse: Tensor


class Schedule(NamedTuple):
    """`tiles [total, 2]`: expert (-1 past the last) and first row; `offsets [e + 1]`: first row of each expert."""

    tiles: Tensor
    offsets: Tensor

    @property
    def total(self) -> int:
        return len(self.tiles)


def forward(
    operands: Operands, rows: Permutation, limit: float | None, *, keep: bool, shared: Tensor | None = None
) -> tuple[Tensor, Tensor, Schedule]:
    """`out [n, d]`, with `shared [n, d]` added, pre-activations `h [r, 2 f]` (`[0, 2 f]` unless kept), and tiles."""
    x, weights, w13, w2 = (t.contiguous() for t in operands)
    r, k, d, f = rows.order.numel(), rows.inverse.shape[1], w2.shape[1], w2.shape[2]
    h, a = x.new_empty(r if keep else 0, 2 * f), x.new_empty(r, f)
    tiles = tiles_for(w2)
    blocks = tiles.swiglu
    with on_device(x):
        plan = schedule(rows.counts, r, tiles.rows)
        w, tma = _source(w13, blocks.columns, blocks.inner, tiles)
        kernels.grouped_swiglu[plan.total * triton.cdiv(f, blocks.columns),](
            x, w, weights, rows.order, plan.tiles, plan.offsets, h, a, plan.total, d, f, _bound(limit),
            K=k, KEEP=keep, TMA=tma, **_options(blocks, tiles),
        )  # fmt: skip
        return combine(_product(a, w2, plan, tiles, transposed=True), rows.inverse, shared), h, plan


def backward(
    dout: Tensor, h: Tensor, operands: Operands, rows: Rows, plan: Schedule, limit: float | None,
    *, need_x: bool = True, need_w13: bool = True, need_w2: bool = True,
) -> Gradients:  # fmt: skip
    """Gradients of `forward`."""
    dout, x, weights, w13, w2 = (t.contiguous() for t in (dout, *operands))
    r, k, d, f = rows.order.numel(), rows.inverse.shape[1], w2.shape[1], w2.shape[2]
    tiles = tiles_for(w2)
    blocks = tiles.swiglu_backward
    across = triton.cdiv(f, blocks.columns)
    a, dh, shares = x.new_empty(r, f), x.new_empty(h.shape), x.new_empty(r, across, dtype=torch.float32)
    dweights = weights.new_empty(weights.shape)
    with on_device(x):
        w, tma = _source(w2, blocks.inner, blocks.columns, tiles)
        kernels.grouped_swiglu_backward[plan.total * across,](
            dout, w, weights, rows.order, plan.tiles, plan.offsets, h, dh, a, shares,
            plan.total, d, f, _bound(limit), K=k, TMA=tma, **_options(blocks, tiles),
        )  # fmt: skip
        kernels.sum_blocks[triton.cdiv(r, 256),](shares, dweights, r, across, ROWS=256, BLOCKS=next_power(across))
        dx = combine(_product(dh, w13, plan, tiles, transposed=False), rows.inverse) if need_x else None
        dw13 = _outer(dh, x, rows, plan, tiles, like=w13, gather="q") if need_w13 else None
        dw2 = _outer(dout, a, rows, plan, tiles, like=w2, gather="p") if need_w2 else None
    return Gradients(dx, dweights, dw13, dw2)


def schedule(counts: Tensor, r: int, rows: int) -> Schedule:
    """Tiles of `rows` rows: an expert with c rows has cdiv(c, rows), all of them at most r // rows + min(e, r)."""
    plan, e = new_schedule(counts, r, rows), len(counts)
    grid = (max(triton.cdiv(plan.total, SCHEDULED), 1),)
    kernels.schedule[grid](
        counts, plan.offsets, plan.tiles, e, plan.total, BM=rows, E=next_power(e), TILES=SCHEDULED, num_warps=8
    )
    return plan


def new_schedule(counts: Tensor, r: int, rows: int) -> Schedule:
    """Its memory."""
    total = r // rows + torch.sym_min(len(counts), r)
    return Schedule(*(counts.new_empty(shape, dtype=torch.int32) for shape in ((total, 2), (len(counts) + 1,))))


def combine(rows: Tensor, inverse: Tensor, shared: Tensor | None = None) -> Tensor:
    """Each token's sum over its slots, in slot order, then of `shared [n, d]`: rows `[r, d]` to `[n, d]`."""
    (n, k), d = inverse.shape, rows.shape[1]
    out, shared = rows.new_empty(n, d), None if shared is None else shared.contiguous()
    step, columns = _panel(d)
    grid = triton.cdiv(n, step), triton.cdiv(d, columns)
    flag = shared is not None
    kernels.combine[grid](rows, inverse, shared, out, n, k, d, SHARED=flag, ROWS=step, COLUMNS=columns)
    return out


def _product(a: Tensor, w: Tensor, plan: Schedule, tiles: Tiles, *, transposed: bool) -> Tensor:
    """`a [r, inner] w[expert]`, w `[e, inner, outer]`, or `[e, outer, inner]` if transposed."""
    (r, inner), outer, blocks = a.shape, w.shape[1 if transposed else 2], tiles.product
    out = a.new_empty(r, outer)
    a, a_tma = _source(a, tiles.rows, blocks.inner, tiles)
    block = (blocks.columns, blocks.inner) if transposed else (blocks.inner, blocks.columns)
    w, w_tma = _source(w, *block, tiles)
    kernels.grouped[plan.total * triton.cdiv(outer, blocks.columns),](
        a, w, plan.tiles, plan.offsets, out, plan.total, inner, outer,
        TRANSPOSED=transposed, A_TMA=a_tma, TMA=w_tma, **_options(blocks, tiles),
    )  # fmt: skip
    return out


def _outer(p: Tensor, q: Tensor, rows: Rows, plan: Schedule, tiles: Tiles, *, like: Tensor, gather: str) -> Tensor:
    """`p^T q` over the rows of each expert, `[e, m, n]` as `like`; the one to gather, "p" or "q", lies by token."""
    (e, m, n), blocks = like.shape, tiles.outer
    out = like.new_empty(like.shape)
    to, tma = _source(out, tiles.rows, blocks.columns, tiles)
    kernels.grouped_outer[e * triton.cdiv(m, tiles.rows) * triton.cdiv(n, blocks.columns),](
        p, q, rows.order, plan.offsets, to, m, n, K=rows.inverse.shape[1], GATHER=gather, TMA=tma,
        BM=tiles.rows, BN=blocks.columns, BK=blocks.inner, num_stages=blocks.stages, **registers(blocks.warps),
    )  # fmt: skip
    return out


def _source(w: Tensor, rows: int, columns: int, tiles: Tiles) -> tuple[Any, bool]:
    """How kernels reach blocks `[rows, columns]` of w: by a descriptor where the table says so and w is aligned."""
    if not tiles.tma or w.shape[-1] * w.itemsize % 16 or w.data_ptr() % 16 or not w.numel():
        return w, False
    return TensorDescriptor.from_tensor(w, [1] * (w.ndim - 2) + [rows, columns]), True


def _options(blocks: Blocks, tiles: Tiles) -> dict[str, int]:
    sizes = {"BM": tiles.rows, "BN": blocks.columns, "BK": blocks.inner, "GROUP": tiles.group}
    return {**sizes, "num_stages": blocks.stages, **registers(blocks.warps)}


def _bound(limit: float | None) -> float:
    return math.inf if limit is None else limit


def _panel(width: int) -> tuple[int, int]:
    """Rows and columns of an elementwise program: 1,024 elements."""
    columns = min(next_power(width), 1024)
    return 1024 // columns, columns


# SwiGLU --------------------------------------------------------------------------------------------------------------


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
