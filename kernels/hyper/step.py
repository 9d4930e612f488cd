"""mHC of one token in numpy, as decoding on a CPU needs it: a step of 16 numbers costs no more than its call.

Every iterate of Sinkhorn is the first one, X, with scaled rows and columns: C_jk = r_j X_jk c_k. A step over the
sources j, or over the targets k, is one product with X and the running total of its own epsilons:

    1/c <- X^T r + eps (1/c)          1/r <- X c + eps (1/r)

Axes: n streams (j source, k target) · d width.
"""

import functools
import math
from typing import NamedTuple

import numpy as np


class HyperSite(NamedTuple):
    """What is fixed at one site; or at the head, whose rows are those of `pre` alone, without Sinkhorn."""

    fn: np.ndarray  # [(n + 2) n, n d] or [n, n d]
    base: np.ndarray  # [(n + 2) n] or [n]
    scale: np.ndarray  # [3] or [1]
    eps: float
    norm_eps: float
    iterations: int = 0


def hyper_step(streams: np.ndarray, site: HyperSite) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the sublayer reads [d], and the coefficients post [n] and comb [n, n] of its way back; streams [n, d]."""
    n = len(streams)
    logits = _logits(streams, site)
    gates = 1 / (1 + np.exp(-logits[: 2 * n]))
    first = logits[2 * n :].reshape(n, n)
    first -= first.max(1, keepdims=True)
    np.exp(first, first)
    first /= first.sum(1, keepdims=True)
    first += site.eps
    return (gates[:n] + site.eps).dot(streams), 2 * gates[n:], sinkhorn_step(first, site.iterations, site.eps)


def hyper_recombine_step(y: np.ndarray, streams: np.ndarray, post: np.ndarray, comb: np.ndarray) -> np.ndarray:
    """`X'_k = post_k y + sum_j comb[j, k] X_j`, [n, d]."""
    mixed = comb.T.dot(streams)
    mixed += post[:, None] * y
    return mixed


def hyper_head_step(streams: np.ndarray, site: HyperSite) -> np.ndarray:
    """The last collapse, [d]."""
    return (1 / (1 + np.exp(-_logits(streams, site))) + site.eps).dot(streams)


def _logits(streams: np.ndarray, site: HyperSite) -> np.ndarray:
    u = streams.reshape(-1)
    mix = site.fn.dot(u)
    mix *= 1 / math.sqrt(u.dot(u) / len(u) + site.norm_eps)
    mix *= site.scale.take(_part_of_row(len(streams))) if len(site.scale) == 3 else site.scale
    mix += site.base
    return mix


@functools.cache
def _part_of_row(n: int) -> np.ndarray:
    """Which of pre, post and comb a row of the projection belongs to."""
    return np.repeat(np.arange(3), (n, n, n * n))


@functools.cache
def _carry(n: int, eps: float, dtype: np.dtype) -> np.ndarray:
    return np.diag(np.full(n, eps, dtype))


def sinkhorn_step(x: np.ndarray, iterations: int, eps: float) -> np.ndarray:
    """Sinkhorn's last iterate from its first, x [n, n] = softmax + eps.

    `left` holds r | 1/c and `right` c | 1/r, in two generations: a total is never written over while it is read.
    """
    n = len(x)
    carry = _carry(n, eps, x.dtype)
    over_sources, over_targets = np.concatenate((x.T, carry), 1), np.concatenate((x, carry), 1)
    left, right = np.ones((2, 2, 2 * n), x.dtype)
    r, c, totals_c, totals_r = list(left[:, :n]), list(right[:, :n]), list(left[:, n:]), list(right[:, n:])
    left, right = list(left), list(right)
    new = 0
    for done in range(iterations):
        if done:
            over_targets.dot(right[1 - new], totals_r[new])
            np.reciprocal(totals_r[new], r[new])
        old, new = new, 1 - new
        over_sources.dot(left[old], totals_c[new])
        np.reciprocal(totals_c[new], c[old])
    return r[1 - new][:, None] * x * c[1 - new]
