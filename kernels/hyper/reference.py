"""mHC as the paper writes it, differentiated by autograd: the definition that every engine is held against.

Axes: n streams (j source, k target) · d width · m rows of the projection.
"""

from torch import Tensor

from ..precision import accumulation, without_autocast
from . import Coefficients


def hyper_coefficients(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    *, iterations: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
) -> Coefficients:  # fmt: skip
    n = streams.shape[-2]
    pre, post, comb = _logits(streams, fn, base, scale, [n, n, n * n], norm_eps)
    comb = comb.unflatten(-1, (n, n)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return Coefficients(pre.sigmoid() + eps, 2 * post.sigmoid(), comb)


def hyper_read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    *, iterations: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
) -> tuple[Tensor, Coefficients]:  # fmt: skip
    found = hyper_coefficients(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    return hyper_collapse(streams, found.pre), found


def hyper_head_weights(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float = 1e-6, norm_eps: float = 1e-6
) -> Tensor:
    return _logits(streams, fn, base, scale, [len(fn)], norm_eps)[0].sigmoid() + eps


def hyper_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    return (pre[..., None] * streams.to(accumulation(streams))).sum(-2).to(streams.dtype)


def hyper_recombine(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    dtype = accumulation(streams)
    kept = (comb[..., None] * streams.to(dtype)[..., None, :]).sum(-3)  # over the source streams j
    return (post[..., None] * output.to(dtype)[..., None, :] + kept).to(streams.dtype)


def _logits(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, sizes: list[int], norm_eps: float
) -> list[Tensor]:
    """`mix * scale + base`, [..., m], cut into the parts that have a scale of their own."""
    fn, base, scale = (x.to(accumulation(streams)) for x in (fn, base, scale))
    u = streams.to(fn.dtype).flatten(-2)
    with without_autocast(streams):
        mix = u @ fn.t() / (u.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    parts = zip(mix.split(sizes, -1), scale, base.split(sizes))
    return [part * factor + constant for part, factor, constant in parts]
