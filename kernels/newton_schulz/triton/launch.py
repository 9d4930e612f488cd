"""The iteration as launches: norms, then three products a step, for as many matrices at once as scratch allows.

    A = X X^T,   B = b A + c A A  (both symmetric: half the products),   X <- a X + B X

Blocks are one fixed choice on each architecture, by a matrix's shape and never by how many there are, chosen by
compiling: no register spills, shared memory within the limit, wgmma on Hopper.

e matrices · r <= c sides, the shorter one first
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...triton.launch import architecture, on_device, registers
from . import kernels

SCRATCH = 2**28  # elements of the iterates that are at work at once: 512 MiB of bf16
PANEL = {"ROWS": 64, "COLUMNS": 128}
PARTS = 1024  # panels whose norms are added at a time


class Blocks(NamedTuple):
    """Of one product: rows and columns of a tile, inner, warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The table of one architecture."""

    symmetric: Blocks  # X X^T and b A + c A A
    product: Blocks  # a X + B X
    tma: bool = False  # operands come by tensor memory access where they are aligned
    group: int = 8  # row tiles that take a column block in turn, to share it in L2


def _both(*blocks: int) -> Tiles:
    return Tiles(Blocks(*blocks), Blocks(*blocks))


HALF = {  # bf16 and fp16, sides that are multiples of 16
    "sm_80": _both(128, 128, 32, 8, 4),
    "sm_89": _both(128, 128, 32, 8, 3),
    "sm_90": Tiles(Blocks(128, 128, 64, 8, 4), Blocks(128, 256, 64, 8, 3), tma=True),
    "sm_100": Tiles(Blocks(128, 128, 64, 8, 4), Blocks(128, 256, 64, 8, 3)),
    "hip": _both(128, 128, 32, 8, 2),
}
NARROW = _both(64, 64, 64, 4, 3)  # matrices with a side of at most 64
PLAIN = _both(64, 32, 32, 8, 2)  # float32, whose products take no tensor cores, and other widths


def tiles_for(r: int, c: int, dtype: torch.dtype) -> Tiles:
    """The table for matrices of these sides on the current device."""
    if dtype.itemsize != 2 or r % 16 or c % 16:
        return PLAIN
    return NARROW if r <= 64 else HALF[architecture()]


def orthogonalise(
    x: Tensor, out: Tensor, coefficients: Sequence[tuple[float, float, float]], dtype: torch.dtype
) -> None:
    """Write the iteration from x `[e, r, c]` to out `[e, r, c]`, both with strides of their own."""
    e, r, c = x.shape
    chunk = max(SCRATCH // (2 * r * (r + c)), 1)
    states = x.new_empty(2, min(chunk, e), r, c, dtype=dtype)
    grams = x.new_empty(2, min(chunk, e), r, r, dtype=dtype)
    with on_device(x):
        for start in range(0, e, chunk):
            source, target = x[start : start + chunk], out[start : start + chunk]
            now, then = states[:, : len(source)]
            gram, b = grams[:, : len(source)]
            _normalise(source, now)
            for i, (alpha, beta, gamma) in enumerate(coefficients):
                _symmetric(now, gram, 1.0)
                _symmetric(gram, b, gamma, gram, beta)
                _product(b, now, target if i + 1 == len(coefficients) else then, alpha)
                now, then = then, now


def _normalise(x: Tensor, out: Tensor) -> None:
    e, r, c = x.shape
    panels = triton.cdiv(r, PANEL["ROWS"]) * triton.cdiv(c, PANEL["COLUMNS"])
    parts, norms = (x.new_empty(size, 2, dtype=torch.float32) for size in (e * panels, e))
    kernels.measure[e * panels,](x, parts, *x.stride(), r, c, **PANEL)
    kernels.combine[e,](parts, norms, panels, BLOCK=PARTS)
    kernels.normalise[e * panels,](x, norms, out, *x.stride(), r, c, **PANEL)


def _symmetric(x: Tensor, out: Tensor, alpha: float, plus: Tensor | None = None, beta: float = 0.0) -> None:
    """`out = alpha x x^T + beta plus`, x `[e, r, inner]`."""
    e, r, inner = x.shape
    t = tiles_for(r, inner, x.dtype)
    b = t.symmetric
    (left, tma), (right, _) = (_source(x, rows, b.inner, t) for rows in (b.rows, b.columns))
    kernels.symmetric[e * triton.cdiv(r, b.rows) * triton.cdiv(r, b.columns),](
        left, right, plus, out, r, inner, alpha, beta, PLUS=plus is not None, TMA=tma,
        **_options(b, t) | registers(b.warps),
    )  # fmt: skip


def _product(b: Tensor, x: Tensor, out: Tensor, alpha: float) -> None:
    """`out = alpha x + b x`, x `[e, r, c]`."""
    e, r, c = x.shape
    t = tiles_for(r, c, x.dtype)
    s = t.product
    (left, tma), (right, _) = _source(b, s.rows, s.inner, t), _source(x, s.inner, s.columns, t)
    kernels.product[e * triton.cdiv(r, s.rows) * triton.cdiv(c, s.columns),](
        left, right, x, out, *out.stride(), r, c, alpha, TMA=tma, **_options(s, t)
    )


def _source(x: Tensor, rows: int, columns: int, t: Tiles) -> tuple[Any, bool]:
    """How kernels read blocks `[rows, columns]` of x: through a descriptor where the table says so."""
    return (TensorDescriptor.from_tensor(x, [1, rows, columns]), True) if t.tma else (x, False)


def _options(b: Blocks, t: Tiles) -> dict[str, int]:
    blocks = {"BM": b.rows, "BN": b.columns, "BK": b.inner, "GROUP": t.group}
    return {**blocks, "num_warps": b.warps, "num_stages": b.stages}
