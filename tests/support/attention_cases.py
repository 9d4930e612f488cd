"""Inputs of attention and an independent float64 result: all keys at once, each with how often a query sees it."""

import torch

NAMES = ("out", "lse", "dq", "dkv", "dcompressed", "dsink")


def make(b, t, h, d, p=0, past=0, dtype=torch.float32, device="cpu", seed=0):
    """q [b, t, h, d], kv [b, past + t, d], compressed [b, p, d] (None for p = 0), sink [h]."""
    g = torch.Generator().manual_seed(seed)
    q, kv, compressed = (torch.randn(n, generator=g).to(dtype) for n in ((b, t, h, d), (b, past + t, d), (b, p, d)))
    sink = torch.randn(h, generator=g)
    return [x if x is None else x.to(device) for x in (q, kv, compressed if p else None, sink)]


def picks(b, t, k, p, device="cpu", seed=0):
    """index [b, t, k] with repeats and none (-1) anywhere."""
    return torch.randint(-1, p, (b, t, k), generator=torch.Generator().manual_seed(seed)).to(device)


def causal(t, p, device="cpu"):
    """start and end [1, t]: from nothing to all entries, the first of them forgotten later."""
    end = ((torch.arange(t, device=device) + 1) * p // max(t, 1))[None]
    return {"start": end // 3, "end": end}


def times_seen(q, kv, compressed, window, window_start=None, start=None, end=None, index=None):
    """[b, t, s + p]: how often each query sees each key."""
    b, t, s = q.shape[0], q.shape[1], kv.shape[1]
    row, own = torch.arange(s, device=q.device), torch.arange(s - t, s, device=q.device)[:, None]
    seen = ((row <= own) & (row > own - window)).expand(b, t, s)
    if window_start is not None:
        seen = seen & (row >= window_start[..., None])
    if compressed is None:
        return seen.double()
    entry = torch.arange(compressed.shape[1], device=q.device)
    if index is not None:
        times = (index[..., None] == entry).sum(2)
    else:
        times = ((entry >= start[..., None]) & (entry < end[..., None])).expand(b, -1, -1)
    return torch.cat([seen.double(), times.double()], -1)


def oracle(q, kv, compressed, sink, *, window, scale, **sight):
    times = times_seen(q, kv, compressed, window, **sight)
    keys = kv if compressed is None else torch.cat([kv, compressed], 1)
    logits = scale * torch.einsum("bthd,bld->bthl", q, keys) + times.log()[:, :, None]
    logits = torch.cat([logits, sink[:, None].expand(*logits.shape[:2], -1, 1)], -1)
    lse = logits.logsumexp(-1)
    return torch.einsum("bthl,bld->bthd", (logits - lse[..., None]).exp()[..., :-1], keys), lse


def results(run, tensors, dout, dtype=None, **options):
    """Output, log-sum-exp and gradients (see NAMES) of `run` at fresh leaves; None where an argument is."""
    leaves = [x if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, lse = run(*leaves, **options)
    out.backward(dout.to(out.dtype))
    return [out.detach(), lse.detach(), *(x if x is None else x.grad for x in leaves)]


def error(got, want, least=1e-30):
    """Relative, to a length of at least `least`."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=least))
