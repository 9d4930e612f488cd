"""Engram's hash, gather and gate as the paper writes them: the definition that every engine is held against.

b batch · t tokens · n streams · d width · N longest n-gram · k heads per order · r table rows · w their width
"""

import torch
from torch import Tensor

from ..precision import accumulation


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
    """`(x_t m_0 xor ... xor x_{t-n+1} m_{n-1}) mod p[n, k] + offset[n, k]`, [b, t, (N - 1) k]."""
    (b, t), orders = ids.shape, len(moduli)
    known = torch.cat((ids.new_full((b, orders), pad) if history is None else history, ids), 1)
    back = torch.arange(orders + 1, device=ids.device)
    column = torch.arange(t, device=ids.device)[:, None] - back  # [t, N]
    grams = known[:, column + orders]  # [b, t, N], the token itself first
    if start is not None:
        grams = torch.where((column >= start[..., None]) | (back == 0), grams, pad)
    mixes = list((grams * multipliers).unbind(-1))
    for n in range(1, orders + 1):
        mixes[n] = mixes[n - 1] ^ mixes[n]
    return (torch.stack(mixes[1:], -1)[..., None] % moduli).flatten(2) + offsets


def engram_gather(table: Tensor, rows: Tensor) -> Tensor:
    """`concat_k table[rows[b, t, k]]`, [b, t, k w]."""
    return table.index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(2)


def engram_gate(
    streams: Tensor, key: Tensor, value: Tensor, weight_h: Tensor, weight_k: Tensor, *, eps: float
) -> Tensor:
    """`sigmoid(sign(s) sqrt(max(|s|, 1e-6))) value`, `s = <RMSNorm(h), RMSNorm(key)> / sqrt(d)`, [b, t, n, d]."""
    h, key, value = (x.to(accumulation(streams)) for x in (streams, key, value))
    h = weight_h * h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    key = weight_k * key / (key.square().mean(-1, keepdim=True) + eps).sqrt()
    s = (h * key).sum(-1) / h.shape[-1] ** 0.5
    gate = s.abs().clamp_min(1e-6).sqrt().copysign(s).sigmoid()
    return (gate[..., None] * value[:, :, None]).to(streams.dtype)
