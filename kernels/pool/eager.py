"""The compressor's pooling in PyTorch, in blocks of entries, with its backward written out.

Only the inputs are saved. With the weights a_s, the pooled entry c and its gradient dc, all per channel:

    dkv_s = a_s dc        dgate_s = a_s dc (kv_s - c)        dbias = dgate summed over the entries

Axes: b batch · t tokens · n entries of a block · m ratio · s slots (m, or 2 m with overlap: before | own) · C channels
of a token · D channels of an entry.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from ..precision import accumulation

_BLOCK_VALUES = 1 << 18  # slots times channels of a block of entries, which is to stay in the cache


def pool(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    ratio: int,
    overlap: bool,
    first: Tensor | None = None,
    follows: Tensor | None = None,
) -> Tensor:
    return _Pool.apply(kv, gate, bias, first, follows, ratio, overlap)


class _Pool(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        gate: Tensor,
        bias: Tensor,
        first: Tensor | None,
        follows: Tensor | None,
        ratio: int,
        overlap: bool,
    ) -> Tensor:
        ctx.save_for_backward(kv, gate, bias, first, follows)
        ctx.ratio, ctx.overlap = ratio, overlap
        entries = kv.shape[1] // ratio if first is None else first.shape[1]
        pooled = kv.new_zeros(len(kv), entries, kv.shape[2] // (2 if overlap else 1))
        for block, slots in _blocks(kv, first, follows, ratio, overlap):
            values, weights = _values_and_weights(slots, kv, gate, bias)
            pooled[:, block] = values.mul(weights).sum(2)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor | None, ...]:
        kv, gate, bias, first, follows = ctx.saved_tensors
        dtype = accumulation(kv)
        dkv, dgate = (x.new_zeros(x.shape, dtype=dtype) for x in (kv, gate))
        dslots = torch.zeros_like(_per_slot(bias.to(dtype), ctx.overlap))
        for block, slots in _blocks(kv, first, follows, ctx.ratio, ctx.overlap):
            values, weights = _values_and_weights(slots, kv, gate, bias)
            mean = values.mul(weights).sum(2, keepdim=True)
            weights *= slots.only_present(dpooled[:, block, None])
            slots.add(dkv, weights)
            weights *= values - mean
            slots.add(dgate, weights)
            dslots += weights.sum((0, 1))
        dbias = torch.cat(dslots.split(ctx.ratio), 1)
        return dkv.to(kv.dtype), dgate.to(gate.dtype), dbias.to(bias.dtype), None, None, None, None


class _Regular:
    """The slots of entries `start` to `stop` where windows begin at 0, m, 2 m, ...: views instead of a gather."""

    def __init__(self, start: int, stop: int, ratio: int, overlap: bool) -> None:
        self.ratio, self.overlap = ratio, overlap
        self.entries = slice(start, stop)
        self.alone = 1 if start == 0 else 0  # entries without a window before
        self.before = slice(start - 1 + self.alone, stop - 1)

    def read(self, x: Tensor, absent: float) -> Tensor:
        """The slots of [b, t, C] as [b, n, s, D], with `absent` where there is no window before."""
        if not self.overlap:
            return self._windows(x)[:, self.entries]
        before, own = self._windows(x).chunk(2, -1)
        own = own[:, self.entries]
        slots = x.new_empty(*own.shape[:2], 2 * self.ratio, own.shape[3])
        slots[:, : self.alone, : self.ratio] = absent
        slots[:, self.alone :, : self.ratio] = before[:, self.before]
        slots[:, :, self.ratio :] = own
        return slots

    def add(self, x: Tensor, slots: Tensor) -> None:
        """Adds slots to the places in [b, t, C] that `read` takes them from."""
        if not self.overlap:
            self._windows(x)[:, self.entries] += slots
            return
        before, own = self._windows(x).chunk(2, -1)
        before[:, self.before] += slots[:, self.alone :, : self.ratio]
        own[:, self.entries] += slots[:, :, self.ratio :]

    def only_present(self, x: Tensor) -> Tensor:
        """[b, n, ...] with zeros where there is no entry."""
        return x

    def _windows(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // self.ratio * self.ratio].unflatten(1, (-1, self.ratio))


class _Gathered:
    """The slots of entries whose windows begin at the rows `first` [b, n]; -1 is no entry, its own slots read as zero.

    `follows` [b, n] is given with overlap only: which entries have a window before.
    """

    def __init__(self, first: Tensor, follows: Tensor | None, ratio: int) -> None:
        self.ratio, self.overlap = ratio, follows is not None
        self.present = first >= 0
        self.windows = [(self._rows(first), self.present)]
        if follows is not None:
            self.windows.insert(0, (self._rows(first - ratio), self.present & follows))

    def read(self, x: Tensor, absent: float) -> Tensor:
        """The slots of [b, t, C] as [b, n, s, D], with `absent` where there is no window before."""
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        slots = []
        fills = (absent, 0.0)[-len(self.windows) :]
        for half, (rows, present), fill in zip(x.chunk(len(fills), -1), self.windows, fills):
            slots.append(half[batch, rows].masked_fill_(~present[:, :, None, None], fill))
        return torch.cat(slots, 2)

    def add(self, x: Tensor, slots: Tensor) -> None:
        """Adds slots to the places in [b, t, C] that `read` takes them from."""
        origin = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
        halves = zip(x.chunk(len(self.windows), -1), self.windows, slots.split(self.ratio, 2))
        for half, (rows, present), grad in halves:
            grad = grad.masked_fill(~present[:, :, None, None], 0)
            half.flatten(0, 1).index_add_(0, (rows + origin).flatten(), grad.flatten(0, 2))

    def only_present(self, x: Tensor) -> Tensor:
        """[b, n, ...] with zeros where there is no entry."""
        return x.masked_fill(~self.present[:, :, None, None], 0)

    def _rows(self, first: Tensor) -> Tensor:
        return first.clamp_min(0)[:, :, None] + torch.arange(self.ratio, device=first.device)


def _blocks(
    kv: Tensor, first: Tensor | None, follows: Tensor | None, ratio: int, overlap: bool
) -> Iterator[tuple[slice, _Regular | _Gathered]]:
    """The entries in blocks, each with the slots it reads; none where there are too few rows for one window."""
    batch, tokens, channels = kv.shape
    if tokens < ratio or batch == 0:
        return
    entries = tokens // ratio if first is None else first.shape[1]
    size = max(1, _BLOCK_VALUES // (batch * ratio * channels))
    for start in range(0, entries, size):
        block = slice(start, min(start + size, entries))
        if first is None:
            yield block, _Regular(block.start, block.stop, ratio, overlap)
        else:
            before = follows[:, block] if overlap and follows is not None else None
            yield block, _Gathered(first[:, block], before, ratio)


def _values_and_weights(slots: _Regular | _Gathered, kv: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What a block pools and the weight of each slot in each channel, both [b, n, s, D]."""
    dtype = accumulation(kv)
    logits = slots.read(gate, -torch.inf)
    logits = logits + _per_slot(bias.to(dtype), slots.overlap)
    return slots.read(kv, 0.0).to(dtype), torch.softmax(logits, 2)


def _per_slot(bias: Tensor, overlap: bool) -> Tensor:
    """The bias [m, C] as [s, D]: with overlap the first half of the channels goes to the slots before."""
    return torch.cat(bias.chunk(2, 1)) if overlap else bias
