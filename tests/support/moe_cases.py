"""Inputs of the experts and an independent float64 result: every pair gathers its own weights, nothing is sorted."""

import torch
import torch.nn.functional as F

NAMES = ("out", "dx", "dweights", "dw13", "dw2")


def make(n, k, e, d=40, f=24, dtype=torch.float32, device="cpu", scale=1.0, seed=0):
    """x [n, d], experts [n, k], weights [n, k], w13 [e, 2 f, d], w2 [e, d, f]."""
    g = torch.Generator().manual_seed(seed)
    experts = torch.rand(n, e, generator=g).topk(k).indices
    weights = torch.rand(n, k, generator=g) + 0.1
    x, w13, w2 = (
        torch.randn(shape, generator=g) * by
        for shape, by in (((n, d), scale), ((e, 2 * f, d), d**-0.5 * 2), ((e, d, f), f**-0.5))
    )
    return [t.to(device) for t in (x.to(dtype), experts, weights, w13.to(dtype), w2.to(dtype))]


def clamp(x, low, high):
    """`min(max(x, low), high)` with the slope that the op promises: 1 from low to high, both included, 0 outside.

    torch.clamp's own slope at a bound was 1 up to 2.13 and is 0 since 2.14.
    """
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def gate_up(h, limit):
    """The halves of h after the SwiGLU clamp: gate from above alone, up from both sides."""
    g, u = h.chunk(2, -1)
    return (g, u) if limit is None else (clamp(g, -torch.inf, limit), clamp(u, -limit, limit))


def oracle(x, experts, weights, w13, w2, limit):
    """`sum_k w2 (silu(min(w1 x, limit)) clamp(w3 x, -limit, limit) weight_k)`, all pairs at once."""
    g, u = gate_up(torch.einsum("nd,nkfd->nkf", x, w13[experts]), limit)
    return torch.einsum("nkf,nkdf->nd", F.silu(g) * u * weights[..., None], w2[experts])


def results(run, arguments, limit, dout, dtype=None):
    """Output and gradients (see NAMES) of `run` at fresh leaves."""
    x, experts, weights, w13, w2 = arguments
    leaves = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, weights, w13, w2)]
    out = run(leaves[0], experts, *leaves[1:], limit=limit)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves)]


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))
