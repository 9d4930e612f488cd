"""Engram, conditional memory: rows of large tables addressed by hashed n-grams of the last tokens, gated by the stream.

    mix_n = x'_t m_0  xor  x'_{t-1} m_1  xor ... xor  x'_{t-n+1} m_{n-1}        n = 2..N, x' canonical token ids
    row   = mix_n mod p[n, k] + offset[n, k]                                    k heads per order, all primes distinct
    e     = concat of the table's rows, order-major, then head
    s     = <RMSNorm(h), RMSNorm(key)> / sqrt(d),   gate = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))

The rows depend on token ids alone, so they can be fetched ahead of the step. `layout` holds the pure functions that fix
tables, primes and multipliers, `vocabulary` the map from token ids to canonical ids. (Engram, arXiv 2601.07372.)

b batch · t tokens · n streams · d width · o orders (N - 1) · k heads per order · r table rows · w their width
"""

import torch
from torch import Tensor

from ..backend import implementation
from .layout import EngramLayout, engram_layout, engram_multipliers, engram_primes
from .vocabulary import compress_vocabulary

__all__ = [
    "EngramLayout",
    "compress_vocabulary",
    "engram_gate",
    "engram_gather",
    "engram_hash",
    "engram_layout",
    "engram_multipliers",
    "engram_primes",
]


def engram_hash(
    ids: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    *,
    pad: int,
    start: Tensor | None = None,
    history: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Table rows of each token's 2-grams to N-grams, `(xor_j x'_{t-j} m_j) mod p + offset`, order-major, then head.

    The look-back stops where the token's document starts: earlier positions count as `pad`. (Engram 2.2; V4.1.)

    Args:
        ids: int64 `[b, t]`, canonical.
        multipliers: int64 `[N]` of the layer (`engram_multipliers`).
        moduli: int64 `[N - 1, k]`, the primes of the layer (`engram_primes`).
        offsets: int64 `[(N - 1) k]`, where each table starts among the layer's rows.
        pad: the canonical id that stands before a document.
        start: int64 `[b | 1, t]`, the column where the token's document starts; below 0 if it starts in the history.
            None: before the history.
        history: int64 `[b, N - 1]`, the canonical ids before column 0, oldest first, `pad` where there is none; for
            decoding. None: `pad` everywhere.

    Returns:
        int64 `[b, t, (N - 1) k]`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    b, t, orders = _check_hash(ids, multipliers, moduli, offsets)
    if start is not None and (start.ndim != 2 or start.shape[0] not in (1, b) or start.shape[1] != t):
        raise ValueError(f"start has shape {tuple(start.shape)}: expected [{b} or 1, {t}]")
    if history is not None and history.shape != (b, orders):
        raise ValueError(f"history has shape {tuple(history.shape)}: expected [{b}, {orders}]")
    run = implementation("engram", backend, ids).engram_hash
    return run(ids, multipliers, moduli, offsets, pad=pad, start=start, history=history)


def engram_gather(table: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """The embeddings of each token, `concat_h table[rows[b, t, h]]`. (Engram 2.2.)

    The gradient of a row is the sum over its look-ups, collisions included, in the order of the tokens.

    Args:
        table: `[r, w]`.
        rows: int64 `[b, t, h]`, from 0 to r - 1.

    Returns:
        `[b, t, h w]` in the dtype of table.

    Raises:
        ValueError: a shape or dtype does not fit.
        IndexError: a row outside the table, on a CPU; Triton's kernels, which cannot tell, give NaN.
    """
    if table.ndim != 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected [rows, width]")
    if rows.ndim != 3 or rows.dtype != torch.int64:
        raise ValueError(f"rows has shape {tuple(rows.shape)} and dtype {rows.dtype}: expected int64 [b, t, heads]")
    return implementation("engram", backend, table).engram_gather(table, rows)


def engram_gate(
    streams: Tensor,
    key: Tensor,
    value: Tensor,
    weight_h: Tensor,
    weight_k: Tensor,
    *,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """What the memory writes into each stream: `sigmoid(sign(s) sqrt(max(|s|, 1e-6))) value`.

    `s = <weight_h h / rms(h), weight_k key / rms(key)> / sqrt(d)` for each token and stream, in fp32 (fp64 for fp64
    inputs), with `rms(x) = sqrt(mean x^2 + eps)`. The sign of 0 is that of its bit, as in the released kernels; the
    slope is 0 where `|s| < 1e-6`. The caller adds the result to the streams. (Engram 2.3; the signed root is in all
    released code, though not in the paper.)

    Args:
        streams: `[b, t, n, d]`.
        key: `[b, t, n, d]`, one per stream.
        value: `[b, t, d]`, shared by the streams.
        weight_h, weight_k: `[n, d]`, of the two norms.
        eps: inside both norms (1e-20 in V4.1).

    Returns:
        `[b, t, n, d]` in the dtype of streams.

    Raises:
        ValueError: a shape does not fit.
    """
    if streams.ndim != 4 or key.shape != streams.shape:
        raise ValueError(f"streams {tuple(streams.shape)} and key {tuple(key.shape)}: expected the same [b, t, n, d]")
    b, t, n, d = streams.shape
    expected = {"value": (value, (b, t, d)), "weight_h": (weight_h, (n, d)), "weight_k": (weight_k, (n, d))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {list(shape)}")
    return implementation("engram", backend, streams).engram_gate(streams, key, value, weight_h, weight_k, eps=eps)


def _check_hash(ids: Tensor, multipliers: Tensor, moduli: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    for name, tensor in {"ids": ids, "multipliers": multipliers, "moduli": moduli, "offsets": offsets}.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} is {tensor.dtype}: expected torch.int64")
    if ids.ndim != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}: expected [batch, tokens]")
    orders = len(multipliers) - 1
    if multipliers.ndim != 1 or orders < 1:
        raise ValueError(f"multipliers has shape {tuple(multipliers.shape)}: expected [N], N >= 2")
    if moduli.ndim != 2 or moduli.shape[0] != orders:
        raise ValueError(f"moduli has shape {tuple(moduli.shape)}: expected [{orders}, heads]")
    if offsets.shape != (moduli.numel(),):
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}: expected [{moduli.numel()}]")
    return *ids.shape, orders
