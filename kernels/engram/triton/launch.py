"""Launches of Engram's kernels: which, over what grid, with what blocks.

b batch · t tokens · n streams · d width · o orders · k heads per order · r table rows · w their width · q look-ups
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device
from ...triton.scatter import entry_lists, scatter_sum
from . import kernels

ELEMENTS = 2048  # of a block of streams by columns
STRIP, STRIPS = 64, 256  # tokens of a strip at least, strips at most
SHARES = 16  # of strips, summed at once


class Inputs(NamedTuple):
    """Of the gate: h, key `[t, n, d]`, value `[t, d]` and the weights of the two norms `[n, d]`."""

    h: Tensor
    key: Tensor
    value: Tensor
    weight_h: Tensor
    weight_k: Tensor

    def packed(self) -> "Inputs":
        """With the values of a token side by side."""
        h, key, value = map(_rows_apart, self[:3])
        return Inputs(h, key, value, self.weight_h.contiguous(), self.weight_k.contiguous())

    def weight(self) -> Tensor:
        """That of both norms, fp32."""
        return (self.weight_h.float() * self.weight_k.float()).contiguous()


class Statistics(NamedTuple):
    """What the backward pass needs of each token and stream, fp32 `[t, n]`: `<w h, key>` and both `1 / rms`."""

    dots: Tensor
    h_rms: Tensor
    k_rms: Tensor


def hash_rows(
    ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor, pad: int,
    start: Tensor | None, history: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[b, t, o k]`."""
    ids, multipliers, moduli, offsets = (x.contiguous() for x in (ids, multipliers, moduli, offsets))
    start, history = (x if x is None else x.contiguous() for x in (start, history))
    (b, t), (orders, k) = ids.shape, moduli.shape
    out = ids.new_empty(b, t, orders * k)
    heads = next_power(k)
    tokens = max(256 // heads, 1)
    with on_device(ids):
        kernels.hash_rows[triton.cdiv(b * t, tokens),](
            ids, multipliers, moduli, offsets, start, history, out, b * t, t, k, pad,
            t if start is not None and len(start) > 1 else 0,
            STARTED=start is not None, CONTINUED=history is not None, ORDERS=orders, TOKENS=tokens, HEADS=heads,
        )  # fmt: skip
    return out


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """`[q, w]` of rows `[q]`."""
    table, rows = table.contiguous(), rows.contiguous()
    (r, w), q = table.shape, len(rows)
    out = table.new_empty(q, w)
    columns = min(next_power(w), 256, ELEMENTS)
    lookups = ELEMENTS // columns
    with on_device(table):
        kernels.gather_rows[triton.cdiv(q, lookups), triton.cdiv(w, columns)](
            table, rows, out, r, q, w, LOOKUPS=lookups, COLUMNS=columns
        )
    return out


def sum_lookups(grad: Tensor, rows: Tensor, r: int) -> Tensor:
    """`[r, w]`: each row's sum of grad `[q, w]` over the look-ups of it, in their order."""
    q, w = grad.shape
    sums = scatter_sum(grad.reshape(1, q, 1, w), entry_lists(rows.view(1, q, 1), r))
    return sums.view(r, w).to(grad.dtype)


def gate(inputs: Inputs, eps: float) -> tuple[Tensor, Statistics]:
    """`[t, n, d]`, and what the backward pass needs."""
    h, key, value, *_ = inputs = inputs.packed()
    tokens, n, d = h.shape
    out, kept = gate_outputs(h)
    with on_device(h):
        kernels.gate_forward[tokens,](
            h, key, value, inputs.weight(), *kept, out, n, d,
            h.stride(0), key.stride(0), value.stride(0), eps, d**-0.5, **_block(n, d),
        )  # fmt: skip
    return out, kept


def gate_outputs(h: Tensor) -> tuple[Tensor, Statistics]:
    return h.new_empty(h.shape), Statistics(*(h.new_empty(h.shape[:2], dtype=torch.float32) for _ in range(3)))


def gate_backward(grad: Tensor, inputs: Inputs, kept: Statistics) -> Inputs:
    """The gradients of the inputs."""
    grad, inputs = _rows_apart(grad), inputs.packed()
    h, key, value, weight_h, weight_k = inputs
    tokens, n, d = h.shape
    strip = max(triton.cdiv(tokens, STRIPS), STRIP)
    strips = triton.cdiv(tokens, strip)
    found = Inputs(*(x.new_empty(x.shape) for x in inputs))
    ddots, shares = kept.dots.new_empty(kept.dots.shape), kept.dots.new_empty(strips, n, d)
    block = _block(n, d)
    with on_device(h):
        kernels.gate_slopes[tokens,](
            grad, value, *kept, found.value, ddots, n, d, grad.stride(0), value.stride(0), d**-0.5, **block
        )
        kernels.gate_backward[strips, triton.cdiv(d, block["COLUMNS"])](
            h, key, inputs.weight(), *kept, ddots, found.h, found.key, shares,
            tokens, strip, n, d, h.stride(0), key.stride(0), **block,
        )  # fmt: skip
        kernels.sum_shares[triton.cdiv(n * d, 128),](
            shares, weight_h, weight_k, found.weight_h, found.weight_k, strips, n * d, STRIPS=SHARES, COLUMNS=128
        )
    return found


def _rows_apart(x: Tensor) -> Tensor:
    """x where a token's values lie side by side, whatever lies between two tokens; else a copy of it."""
    return x if x.stride()[1:] == x.new_empty(0, *x.shape[1:]).stride()[1:] else x.contiguous()


def _block(n: int, d: int) -> dict[str, int]:
    """All streams by a block of columns."""
    wide = next_power(n)
    return {"N": wide, "COLUMNS": min(next_power(d), max(ELEMENTS // wide, 1))}
