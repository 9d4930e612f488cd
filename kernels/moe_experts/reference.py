"""The definition of the routed experts, which every engine is held against: one expert after the other, and its tokens.

n tokens · k slots · e experts · d width · f expert width
"""

import torch.nn.functional as F
from torch import Tensor

from ..precision import accumulation, without_autocast


def moe_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    limit: float | None,
    shared: Tensor | None = None,
) -> Tensor:
    """`out_n = shared_n + sum_k w2[e] (swiglu(w13[e] x_n) weights_nk)` with `e = experts_nk`, rounded once."""
    wide = accumulation(x)
    out = x.new_zeros(x.shape, dtype=wide) if shared is None else shared.to(wide)
    with without_autocast(x):
        for e in range(len(w13)):
            token, slot = (experts == e).nonzero(as_tuple=True)
            h = x[token].to(wide) @ w13[e].to(wide).mT
            y = swiglu(h, limit, weights[token, slot].to(wide)) @ w2[e].to(wide).mT
            out = out.index_add(0, token, y)
    return out.to(x.dtype)


def swiglu(h: Tensor, limit: float | None, weight: Tensor | None = None) -> Tensor:
    """`silu(min(g, limit)) clamp(u, -limit, limit) weight` of `h = [g, u]`; the clamp's slope is 1 on the bound."""
    g, u = h.to(accumulation(h)).chunk(2, -1)
    if limit is not None:  # torch.clamp has another slope on the bound from 2.14 on
        g, u = g.masked_fill(g > limit, limit), u.masked_fill(u > limit, limit).masked_fill(u < -limit, -limit)
    a = F.silu(g) * u
    return (a if weight is None else a * weight[..., None]).to(h.dtype)
