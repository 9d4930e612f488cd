"""One mHC site as a plain float64 oracle, stream by stream, with the mistakes that it has to tell apart; its inputs.

Axes: n streams (j source, k target) · d width.
"""

import torch
from torch import Tensor

from abyssal.kernels import hyper_coefficients, hyper_collapse, hyper_read, hyper_recombine

EPS = 1e-6
NAMES = ("streams", "fn", "base", "scale", "output")
MISTAKES = (
    "post without the 2",
    "comb not transposed",
    "rows first",
    "no eps on pre",
    "eps on post",
    "normalised streams read",
    "pre | comb | post",
    "no eps in the softmax",
    "one round too many",
)


def check(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = rms_error(got, want)
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert error < tolerance, f"{name}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def rms_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def oracle_sinkhorn(logits: Tensor, iterations: int, mistake: str) -> Tensor:
    if mistake == "one round too many":
        iterations += 1
    comb = torch.exp(logits - logits.max(-1, keepdim=True).values)
    comb = comb / comb.sum(-1, keepdim=True)
    if mistake != "no eps in the softmax":
        comb = comb + EPS
    axes = [-2] + [-1, -2] * (iterations - 1)
    if mistake == "rows first":
        axes = [-1, -2] * iterations
        axes[-1:] = []
    for axis in axes:
        comb = comb / (comb.sum(axis, keepdim=True) + EPS)
    return comb


def oracle_sublayer(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    y: Tensor,
    *,
    iterations: int = 20,
    norm_eps: float = 1e-6,
    mistake: str = "",
) -> dict[str, Tensor]:
    """Everything one sublayer computes, stream by stream."""
    n = streams.shape[-2]
    flat = torch.cat(streams.unbind(-2), -1)
    r = 1 / (flat.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    mix = torch.stack([(flat * row).sum(-1) for row in fn], -1) * r
    at = {"pre": 0, "post": n, "comb": 2 * n}
    if mistake == "pre | comb | post":
        at = {"pre": 0, "post": n + n * n, "comb": n}
    size = {"pre": n, "post": n, "comb": n * n}
    part = {key: slice(at[key], at[key] + size[key]) for key in at}
    logits = {key: mix[..., part[key]] * scale[i] + base[part[key]] for i, key in enumerate(at)}
    pre = 1 / (1 + torch.exp(-logits["pre"])) + (0 if mistake == "no eps on pre" else EPS)
    post = (1 if mistake == "post without the 2" else 2) / (1 + torch.exp(-logits["post"]))
    if mistake == "eps on post":
        post = post + EPS
    comb = oracle_sinkhorn(logits["comb"].unflatten(-1, (n, n)), iterations, mistake)
    read = [x * r for x in streams.unbind(-2)] if mistake == "normalised streams read" else streams.unbind(-2)
    collapsed = sum(pre[..., j, None] * read[j] for j in range(n))
    mixing = comb.mT if mistake == "comb not transposed" else comb
    mixed = [
        post[..., k, None] * y + sum(mixing[..., j, k, None] * streams[..., j, :] for j in range(n)) for k in range(n)
    ]
    return {"pre": pre, "post": post, "comb": comb, "collapsed": collapsed, "mixed": torch.stack(mixed, -2)}


def sublayer(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, y: Tensor, *, at_once: bool = False, **options
) -> dict[str, Tensor]:
    """The public functions in the oracle's place; `at_once`: coefficients and collapse by `hyper_read`."""
    if at_once:
        collapsed, (pre, post, comb) = hyper_read(streams, fn, base, scale, **options)
    else:
        pre, post, comb = hyper_coefficients(streams, fn, base, scale, **options)
        collapsed = hyper_collapse(streams, pre)
    mixed = hyper_recombine(y, streams, post, comb)
    return {"pre": pre, "post": post, "comb": comb, "collapsed": collapsed, "mixed": mixed}


def inputs(
    lead: tuple[int, ...], n: int, d: int, dtype: torch.dtype = torch.float64, std: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Streams of a scale far from one, and comb logits with standard deviation `std`."""
    torch.manual_seed(seed)
    m = (n + 2) * n
    streams = 3 * torch.randn(*lead, n, d, dtype=torch.float64)
    fn = torch.randn(m, n * d, dtype=torch.float64) / (n * d) ** 0.5
    scale = torch.tensor([0.7, 1.3, 0.7 * std], dtype=torch.float64)
    base = torch.randn(m, dtype=torch.float64)
    base[2 * n :] *= 0.7 * std
    y = torch.randn(*lead, d, dtype=torch.float64)
    return [
        streams.to(dtype),
        *(x.to(torch.promote_types(dtype, torch.float32)) for x in (fn, base, scale)),
        y.to(dtype),
    ]


def gradients(results: dict[str, Tensor], arguments: list[Tensor], seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in results.values()]
    return list(torch.autograd.grad(list(results.values()), arguments, weights))
