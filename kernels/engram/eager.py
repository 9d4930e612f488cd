"""The eager engine of Engram: in blocks of tokens, with the gate's backward pass written out.

b batch · t tokens · n streams · d width · o orders · k heads per order
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..precision import accumulation

CLAMP = 1e-6  # of |s| before the root, whose slope would be infinite at 0
VALUES = 2**18  # of a block of streams: 1 MiB of fp32


def engram_hash(
    ids: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    *,
    pad: int,
    start: Tensor | None = None,
    history: Tensor | None = None,
) -> Tensor:
    """See `kernels.engram.engram_hash`."""
    b, t = ids.shape
    orders = len(moduli)
    before = ids.new_full((b, orders), pad) if history is None else history
    known = torch.cat([before, ids], dim=1)
    column = torch.arange(t, device=ids.device)
    mix, rows = ids * multipliers[0], []
    for back in range(1, orders + 1):
        previous = known[:, orders - back : orders - back + t]
        if start is not None:
            previous = torch.where(column - back >= start, previous, pad)
        mix = mix ^ (previous * multipliers[back])
        rows.append(mix.unsqueeze(-1) % moduli[back - 1])
    return torch.cat(rows, dim=-1) + offsets


def engram_gather(table: Tensor, rows: Tensor) -> Tensor:
    """See `kernels.engram.engram_gather`."""
    return F.embedding(rows, table).flatten(2)


def engram_gate(
    streams: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, *, eps: float
) -> Tensor:
    """See `kernels.engram.engram_gate`."""
    gated = _Gate.apply(streams.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), weight_h, weight_k, eps)
    return gated.view(streams.shape)


class _Gate(torch.autograd.Function):
    """Of tokens `[t, n, d]`, in blocks. Keeps the inputs and three scalars per token and stream."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, eps: float
    ) -> Tensor:
        wide = accumulation(h)
        w = weight_h.to(wide) * weight_k.to(wide)
        raw, h_rms, k_rms = torch.empty(3, *h.shape[:2], dtype=wide, device=h.device)  # inverse root mean squares
        out = h.new_empty(h.shape)
        for block in _blocks(h):
            x, k, v = h[block].to(wide), key[block].to(wide), value[block].to(wide)
            h_rms[block] = (x.square().mean(-1) + eps).rsqrt()
            k_rms[block] = (k.square().mean(-1) + eps).rsqrt()
            raw[block] = (x * k).mul_(w).sum(-1)
            gate = _gate(_logit(raw[block], h_rms[block], k_rms[block], h.shape[-1]))
            out[block] = gate.unsqueeze(-1) * v.unsqueeze(1)
        ctx.save_for_backward(h, key, value, weight_h, weight_k, raw, h_rms, k_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, key, value, weight_h, weight_k, raw, h_rms, k_rms = ctx.saved_tensors
        d, wide = h.shape[-1], raw.dtype
        w = weight_h.to(wide) * weight_k.to(wide)
        dh, dkey, dvalue = h.new_empty(h.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        dw = torch.zeros_like(w)
        for block in _blocks(h):
            x, k, v, go = (t[block].to(wide) for t in (h, key, value, grad))
            dot, rx, rk = raw[block], h_rms[block], k_rms[block]
            s = _logit(dot, rx, rk, d)
            gate = _gate(s)
            dvalue[block] = (go * gate.unsqueeze(-1)).sum(1)
            slope = gate * (1 - gate) * (0.5 * d**-0.25) * (rx * rk / dot.abs()).sqrt()  # of the gate by the raw dot
            ddot = torch.where(s.abs() < CLAMP, 0.0, slope * (go * v.unsqueeze(1)).sum(-1)).unsqueeze(-1)
            dh[block] = torch.addcmul(k * w * ddot, x, (dot * rx.square()).unsqueeze(-1) * ddot, value=-1 / d)
            dkey[block] = torch.addcmul(x * w * ddot, k, (dot * rk.square()).unsqueeze(-1) * ddot, value=-1 / d)
            dw += (x * k).mul_(ddot).sum(0)
        return dh, dkey, dvalue, (dw * weight_k).to(weight_h.dtype), (dw * weight_h).to(weight_k.dtype), None


def _logit(dot: Tensor, h_rms: Tensor, k_rms: Tensor, d: int) -> Tensor:
    """The scaled product of the two normalised vectors."""
    return dot * h_rms * k_rms * d**-0.5


def _gate(s: Tensor) -> Tensor:
    return torch.copysign(s.abs().clamp(min=CLAMP).sqrt(), s).sigmoid()


def _blocks(h: Tensor) -> Iterator[slice]:
    tokens = max(VALUES // max(h.shape[1:].numel(), 1), 1)
    for start in range(0, len(h), tokens):
        yield slice(start, start + tokens)
