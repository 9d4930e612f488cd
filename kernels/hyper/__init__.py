"""Manifold-constrained hyper-connections (mHC): n residual streams, mixed by coefficients that each token computes.

A sublayer F reads one combination of the streams, and its output is written back while the streams are mixed:

    X'_k = post_k F(sum_j pre_j X_j) + sum_j comb[j, k] X_j

Sinkhorn's alternating normalisation makes `comb` almost doubly stochastic. Its last step makes the columns sum to one:
each new stream is a weighted mean of the old streams, so that no depth of layers lets the residual grow.

Axes: n streams (j source, k target) · d width.
"""

import math
from typing import NamedTuple

from torch import Tensor

from ..backend import implementation


class Coefficients(NamedTuple):
    """What one sublayer does with the streams of each token."""

    pre: Tensor  # [..., n]     how much of each stream the sublayer reads
    post: Tensor  # [..., n]    how much of its output each stream receives
    comb: Tensor  # [..., n, n] comb[j, k]: the share of old stream j in new stream k


def hyper_coefficients(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Coefficients:
    """The three mixing coefficients of every token, from a projection of all its streams.

        u      = the streams side by side, [n d]
        mix    = (fn u) / sqrt(mean(u^2) + norm_eps)
        logits = mix * scale + base                  rows pre [n] | post [n] | comb [n n], one scale for each part
        pre    = sigmoid(logits) + eps
        post   = 2 sigmoid(logits)
        comb   = sinkhorn(logits)

    Args:
        streams: the residual streams, [..., n, d].
        fn: the projection, [(n + 2) n, n d].
        base: the static part of the logits, [(n + 2) n].
        scale: the weight of the dynamic part in pre, post and comb, [3].
        iterations: Sinkhorn rounds; a round normalises the rows, then the columns.
        eps: added to pre, to the entries that Sinkhorn starts from, and to each of its divisors.
        norm_eps: added to the mean square.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        `Coefficients(pre [..., n], post [..., n], comb [..., n, n])` in float32 (float64 for float64 streams).

    Raises:
        ValueError: a shape does not fit `streams`, or `iterations` or `eps` is not positive.

    Source: V4 eqs. 1-8, with the epsilons of the released code; arXiv 2512.24880.
    """
    _check_site(streams, fn, base, scale, iterations, eps)
    module = implementation("hyper", backend, streams)
    return module.hyper_coefficients(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)


def hyper_read(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Coefficients]:
    """What the sublayer reads and the coefficients of its way back: `hyper_coefficients`, then `hyper_collapse`.

    One operator, so that the gradient to the streams, which both of them have, is written once.

    Args:
        As of `hyper_coefficients`.

    Returns:
        `sum_j pre_j X_j`, [..., d] in the dtype of `streams`, and the coefficients.

    Raises:
        ValueError: as `hyper_coefficients`.

    Source: V4 eqs. 1-8.
    """
    _check_site(streams, fn, base, scale, iterations, eps)
    module = implementation("hyper", backend, streams)
    return module.hyper_read(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)


def hyper_branch(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Coefficients, Tensor]:
    """`hyper_read` where the sublayer leaves the streams, and the streams on their way past it.

    Whoever goes on with those, as `hyper_recombine` does, lets an engine add their gradient to its own while it writes
    that: autograd's sum of the two would read both, and write, once more.

    Args:
        As of `hyper_coefficients`.

    Returns:
        `sum_j pre_j X_j`, the coefficients, and `streams`: the same values, not to be written to.

    Raises:
        ValueError: as `hyper_coefficients`.

    Source: V4 eqs. 1-8.
    """
    _check_site(streams, fn, base, scale, iterations, eps)
    module = implementation("hyper", backend, streams)
    if hasattr(module, "hyper_branch"):
        return module.hyper_branch(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    return *module.hyper_read(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps), streams


def hyper_collapse(streams: Tensor, pre: Tensor, *, backend: str | None = None) -> Tensor:
    """What the sublayer reads: `sum_j pre_j X_j`, accumulated in float32.

    Args:
        streams: the residual streams as they are, not normalised, [..., n, d].
        pre: the weight of each stream, [..., n].
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [..., d] in the dtype of `streams`.

    Raises:
        ValueError: `pre` does not fit `streams`.

    Source: V4 eq. 1.
    """
    _streams_shape(streams)
    _check("pre", pre, streams.shape[:-1])
    return implementation("hyper", backend, streams).hyper_collapse(streams, pre)


def hyper_recombine(
    output: Tensor, streams: Tensor, post: Tensor, comb: Tensor, *, backend: str | None = None
) -> Tensor:
    """The streams after the sublayer: `X'_k = post_k y + sum_j comb[j, k] X_j`, accumulated in float32.

    Args:
        output: the sublayer's output y, [..., d]; its dtype may differ from that of the streams.
        streams: the residual streams before the sublayer, [..., n, d].
        post: the weight of the output in each stream, [..., n].
        comb: source stream by target stream, [..., n, n]. The sum runs over its first axis.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [..., n, d] in the dtype of `streams`.

    Raises:
        ValueError: a shape does not fit `streams`.

    Source: V4 eq. 1.
    """
    n, d = _streams_shape(streams)
    lead = streams.shape[:-2]
    _check("output", output, (*lead, d))
    _check("post", post, (*lead, n))
    _check("comb", comb, (*lead, n, n))
    return implementation("hyper", backend, streams).hyper_recombine(output, streams, post, comb)


def hyper_head_weights(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """The weights of the last collapse, in front of the language-model head: `sigmoid(mix * scale + base) + eps`.

    `mix` is the normalised projection of `hyper_coefficients`; `hyper_collapse` applies the weights.

    Args:
        streams: the residual streams, [..., n, d].
        fn: the projection, [n, n d].
        base: the static part of the logits, [n].
        scale: the weight of the dynamic part, [1].
        eps: added to the weights.
        norm_eps: added to the mean square.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [..., n] in float32 (float64 for float64 streams).

    Raises:
        ValueError: a shape does not fit `streams`.

    Source: `hc_head` of the released V4 code.
    """
    n, d = _streams_shape(streams)
    _check("fn", fn, (n, n * d))
    _check("base", base, (n,))
    _check("scale", scale, (1,))
    module = implementation("hyper", backend, streams)
    return module.hyper_head_weights(streams, fn, base, scale, eps=eps, norm_eps=norm_eps)


def _check_site(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float) -> None:
    n, d = _streams_shape(streams)
    _check("fn", fn, ((n + 2) * n, n * d))
    _check("base", base, ((n + 2) * n,))
    _check("scale", scale, (3,))
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: Sinkhorn needs at least one round")
    if not eps > 0:
        raise ValueError(f"eps={eps}: must be positive")


def _streams_shape(streams: Tensor) -> tuple[int, int]:
    if streams.ndim < 2 or not streams.is_floating_point() or math.prod(streams.shape[-2:]) == 0:
        shape = list(streams.shape)
        raise ValueError(f"streams: got {streams.dtype} {shape}, allowed is a float tensor [..., n, d] with n, d >= 1")
    return streams.shape[-2], streams.shape[-1]


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {list(tensor.shape)} does not fit the streams, allowed is {list(shape)}")
