"""mHC, manifold-constrained hyper-connections: n residual streams around every sublayer (V4 2.2; 2512.24880; B.1).

    pre, post, C = coefficients(X)                 from all n streams of the token; C doubly stochastic by Sinkhorn
    u   = sum_j pre_j X_j                          the sublayer's input
    X'_k = post_k F(u) + sum_j C[j, k] X_j         contraction over the first index: the paper's B = C^T

How the streams start. All n streams are copies of the embedding, and nothing tells them apart: with equal biases and a
zero projection they and their gradients stay equal for ever. Neither paper nor release says how training begins. Here
each site s leans towards reading one stream (base of pre is +1 for stream s mod n, -1 for the others), C starts at the
identity (base 0 on the diagonal, -8 elsewhere), post starts at 1 (base 0), the projection is random and its scales are
0.01. That is the plain pre-norm residual to about 1e-3 at step 0, every parameter has a gradient, and the streams
separate from the first update on; `spread` watches that.

b batch · t tokens · n streams · d width
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import Coefficients, hyper_branch, hyper_collapse, hyper_head_weights, hyper_recombine
from .config import ModelConfig
from .kept import KeepingModule

SCALE = 0.01  # mHC paper, table 5
OFF_DIAGONAL = -8.0


class Mix(NamedTuple):
    """What `recombine` needs: the coefficients, and the streams on their way past the sublayer (`hyper_branch`)."""

    pre: Tensor
    post: Tensor
    comb: Tensor
    streams: Tensor


class HyperConnection(KeepingModule):
    """The streams' way into one sublayer and out of it. `site` counts the sublayers from 0."""

    KEPT = ("fn", "base", "scale")

    def __init__(self, config: ModelConfig, site: int) -> None:
        super().__init__()
        n, d = config.hc_mult, config.hidden_size
        self.streams, self.site, self.std = n, site, config.initializer_range
        self.eps, self.norm_eps, self.iterations = config.hc_eps, config.rms_norm_eps, config.hc_sinkhorn_iters
        self.fn = nn.Parameter(torch.empty((n + 2) * n, n * d, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty((n + 2) * n, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(3, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        n = self.streams
        nn.init.normal_(self.fn, std=self.std)
        nn.init.constant_(self.scale, SCALE)
        with torch.no_grad():
            pre, post, comb = self.base.split([n, n, n * n])
            pre.fill_(-1.0 if n > 1 else 0.0)[self.site % n] += 2.0 if n > 1 else 0.0
            post.zero_()
            comb.fill_(OFF_DIAGONAL)[:: n + 1] = 0.0

    def forward(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """The sublayer's input [b, t, d], and the rest."""
        u, coefficients, streams = hyper_branch(
            streams, self.fn, self.base, self.scale, iterations=self.iterations, eps=self.eps, norm_eps=self.norm_eps
        )
        return u, Mix(*coefficients, streams)

    def recombine(self, output: Tensor, streams: Tensor, coefficients: Mix | Coefficients) -> Tensor:
        """The streams after the sublayer, [b, t, n, d]."""
        return hyper_recombine(output, streams, coefficients.post, coefficients.comb)


class HyperHead(KeepingModule):
    """The final collapse:  x = sum_j (sigmoid(scale (X fn)_j + base_j) + eps) X_j  (B.1.4); at first 2 x the mean."""

    KEPT = ("fn", "base", "scale")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, d = config.hc_mult, config.hidden_size
        self.std, self.eps, self.norm_eps = config.initializer_range, config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(n, n * d, dtype=torch.float32))
        self.base = nn.Parameter(torch.empty(n, dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fn, std=self.std)
        nn.init.zeros_(self.base)
        nn.init.constant_(self.scale, SCALE)

    def forward(self, streams: Tensor) -> Tensor:
        weights = hyper_head_weights(streams, self.fn, self.base, self.scale, eps=self.eps, norm_eps=self.norm_eps)
        return hyper_collapse(streams, weights)


@torch.no_grad()
def separation(streams: Tensor) -> Tensor:
    """[2] mean squares of the streams' deviation from the mean stream, and of that one.

    Measured on at most 256 tokens of the batch, evenly spaced.
    """
    tokens = streams.flatten(0, 1)
    apart, mean = torch.var_mean(tokens[:: -(-len(tokens) // 256)].float(), 1, correction=0)
    return torch.stack([apart.mean(), mean.square().mean()])


def spread(separations: Sequence[Tensor]) -> Tensor:
    """How far the streams have separated, for each `separation`: the root of its ratio; 0 means n equal streams."""
    apart, size = torch.stack(list(separations)).unbind(1)
    return (apart / size.clamp_min(1e-20)).sqrt()
