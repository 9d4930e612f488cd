"""The experts of one token in numpy: an expert's weights are read where they lie.

Axes: d width · f expert width · k chosen.
"""

import numpy as np


def swiglu_step(h: np.ndarray, limit: float | None) -> np.ndarray:
    """`silu(min(g, limit)) clamp(u, -limit, limit)` of h = [g, u], [..., 2 f] to [..., f]."""
    f = h.shape[-1] // 2
    g, u = h[..., :f], h[..., f:]
    if limit is not None:
        g, u = np.minimum(g, limit), np.minimum(np.maximum(u, -limit), limit)
    a = g / (1 + np.exp(-g))
    a *= u
    return a


def moe_experts_step(
    x: np.ndarray, experts: list[int], weights: np.ndarray, w13: np.ndarray, w2: np.ndarray, limit: float | None
) -> np.ndarray:
    """`sum_k w2[e] (swiglu(w13[e] x) weight_k)`, in slot order; x [d]."""
    h = np.empty((len(experts), w13.shape[1]), x.dtype)
    for row, e in zip(h, experts):
        w13[e].dot(x, row)
    a = swiglu_step(h, limit)
    a *= weights[:, None]
    out = w2[experts[0]].dot(a[0])
    for row, e in zip(a[1:], experts[1:]):
        out += w2[e].dot(row)
    return out
