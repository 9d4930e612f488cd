"""Forward and backward of the pooling as launches: no host synchronisation, every grid a function of shapes.

    forward                     kv, gate, bias -> out
    backward, regular windows   one pass over the entries
    backward, gathered ones     the entries' sums, then each row's gradients from the entries that read it

b batch · t tokens · p entries of a row · m ratio · s slots (m, or 2 m with overlap) · D channels of an entry
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device, registers
from ...triton.scatter import entry_lists
from . import kernels

VALUES = 4096  # of kv that a program holds: 16 to a thread in the forward pass, 8 in the backward pass
PROGRAMS = 256  # of the backward pass, about: each leaves a partial gradient of the bias


class Windows(NamedTuple):
    """Which rows an entry reads; `first` and `follows` are None for regular windows."""

    first: Tensor | None
    follows: Tensor | None
    ratio: int
    overlap: bool


class Gradients(NamedTuple):
    """Of the three arguments, in their dtypes."""

    kv: Tensor
    gate: Tensor
    bias: Tensor


class _Tile(NamedTuple):
    """What a program holds: slots and channels, padded to powers of two, and its warps."""

    slots: int
    channels: int
    blocks: int  # of channels
    warps: int

    def options(self) -> dict[str, int]:
        return {"S": self.slots, "CHANNELS": self.channels, **registers(self.warps, 16 // self.warps)}


def output(kv: Tensor, w: Windows) -> Tensor:
    """[b, p, D], not yet written."""
    entries = kv.shape[1] // w.ratio if w.first is None else w.first.shape[1]
    return kv.new_empty(len(kv), entries, kv.shape[2] // _halves(w))


def forward(kv: Tensor, gate: Tensor, bias: Tensor, w: Windows) -> Tensor:
    """The entries [b, p, D]."""
    kv, gate, bias, w = _contiguous(kv, gate, bias, w)
    out = output(kv, w)
    n, p, d = len(kv) * out.shape[1], out.shape[1], out.shape[2]
    tile = _tile(w, d, per_warp=512)
    run = 4 if tile.slots <= 16 else 1  # entries of a program, which share its bias
    with on_device(kv):
        kernels.pool_forward[triton.cdiv(n, run), tile.blocks](
            kv, gate, bias, w.first, w.follows, out, n, p, kv.shape[1], w.ratio, d,
            GATHERED=w.first is not None, OVERLAP=w.overlap, RUN=run, **tile.options(),
        )  # fmt: skip
    return out


def backward(dout: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, w: Windows) -> Gradients:
    """Gradients of `forward` for dout [b, p, D]."""
    kv, gate, bias, w = _contiguous(kv, gate, bias, w)
    dout = dout.contiguous()
    (b, real, d), t, gathered = dout.shape, kv.shape[1], w.first is not None
    p = real if gathered else real + _halves(w)  # entries past the last: the rest of the rows, and its first half
    tile = _tile(w, d, per_warp=256)
    programs = min(b * p, max(PROGRAMS // tile.blocks, 1))
    dkv, dgate = kv.new_empty(kv.shape), gate.new_empty(gate.shape)
    partial = kv.new_empty(programs, _halves(w), w.ratio, d, dtype=torch.float32)
    sums = kv.new_empty(3, b * real if gathered else 0, d, dtype=torch.float32)
    with on_device(kv):
        kernels.pool_backward[programs, tile.blocks](
            kv, gate, bias, w.first, w.follows, dout, dkv, dgate, partial, *sums, b * p, p, real, t, w.ratio, d,
            GATHERED=gathered, OVERLAP=w.overlap, **tile.options(),
        )  # fmt: skip
        if gathered:
            _rows(kv, gate, bias, w, sums, dkv, dgate)
        dbias = partial.sum(0).transpose(0, 1).reshape(bias.shape).to(bias.dtype)
    return Gradients(dkv, dgate, dbias)


def _rows(kv: Tensor, gate: Tensor, bias: Tensor, w: Windows, sums: Tensor, dkv: Tensor, dgate: Tensor) -> None:
    """The second half of the gathered backward pass: dkv and dgate, row by row."""
    assert w.first is not None
    (b, t, _), d, m = kv.shape, sums.shape[2], w.ratio
    lists = entry_lists(w.first[..., None], t)  # of the entries that begin at each row
    channels = min(next_power(d), 64)
    rows, blocks = 1024 // channels, triton.cdiv(d, channels)
    kernels.pool_rows[b * triton.cdiv(t, rows), _halves(w) * blocks](
        kv, gate, bias, w.first, w.follows, *lists, *sums, dkv, dgate, t, m, d, blocks,
        OVERLAP=w.overlap, ROWS=rows, CHANNELS=channels,
    )  # fmt: skip


def _contiguous(kv: Tensor, gate: Tensor, bias: Tensor, w: Windows) -> tuple[Tensor, Tensor, Tensor, Windows]:
    first, follows = (None if x is None else x.contiguous() for x in (w.first, w.follows))
    return kv.contiguous(), gate.contiguous(), bias.contiguous(), w._replace(first=first, follows=follows)


def _halves(w: Windows) -> int:
    return 2 if w.overlap else 1


def _tile(w: Windows, d: int, per_warp: int) -> _Tile:
    """All slots, and as many channels as keep the tile small."""
    slots = next_power(_halves(w) * w.ratio)
    channels = min(next_power(d), max(VALUES // slots, 16))
    return _Tile(slots, channels, triton.cdiv(d, channels), min(max(slots * channels // per_warp, 1), 16))
