"""`attention` against a loop over queries in float64: window, entries by range and by index, sink, every gradient."""

import math

import pytest
import torch
from oracle import assert_same

from abyssal.kernels.attention import attention
from abyssal.kernels.attention.eager import sharing_pays

NAMES = ("q", "kv", "compressed", "sink")


def visible_keys(kv, compressed, b, t, queries, window, window_start, start, end, index):
    row = kv.shape[1] - queries + t
    first = max(0, row - window + 1)
    if window_start is not None:
        first = max(first, int(window_start.expand(kv.shape[0], -1)[b, t]))
    keys = [kv[b, j] for j in range(first, row + 1)]
    if index is not None:
        keys += [compressed[b, j] for j in index[b, t].tolist() if j >= 0]
    elif compressed is not None:
        ranges = (int(x.expand(kv.shape[0], -1)[b, t]) for x in (start, end))
        keys += [compressed[b, j] for j in range(*ranges)]
    return keys


def oracle(q, kv, compressed, sink, *, window, scale, window_start=None, start=None, end=None, index=None):
    out, lse = [], []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = visible_keys(kv, compressed, b, t, q.shape[1], window, window_start, start, end, index)
            if not keys:
                out.append(q[b, t] * 0)
                lse.append(sink)
                continue
            keys = torch.stack(keys)
            logits = torch.cat([scale * q[b, t] @ keys.T, sink[:, None]], 1)
            out.append(logits.softmax(-1)[:, :-1] @ keys)
            lse.append(logits.logsumexp(-1))
    return torch.stack(out).view(q.shape), torch.stack(lse).view(q.shape[:3])


def inputs(b, t, past, h, d, p, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, t, h, d), (b, t + past, d), (b, p, d), (h,))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors if p else [tensors[0], tensors[1], None, tensors[3]]


def causal(t, p):
    return ((torch.arange(t) + 1) * p // t)[None]


def cases():
    g = torch.Generator().manual_seed(1)

    def picks(b, t, p, k):
        return torch.randint(-1, p, (b, t, k), generator=g)

    yield "window", (2, 33, 4, 4, 8, 0), {"window": 8}
    yield "window-of-one", (1, 5, 0, 1, 16, 0), {"window": 1}
    yield (
        "one-query",
        (2, 1, 7, 6, 16, 5),
        {"window": 4, "start": torch.zeros(1, 1).long(), "end": torch.full((1, 1), 5)},
    )
    yield "shorter-than-window", (1, 3, 0, 2, 8, 0), {"window": 16}
    yield "range", (2, 70, 3, 2, 16, 40), {"window": 16, "start": causal(70, 40) // 3, "end": causal(70, 40)}
    yield "several-blocks", (1, 300, 0, 2, 8, 75), {"window": 16, "start": causal(300, 75) * 0, "end": causal(300, 75)}
    yield "picks-shared", (2, 37, 3, 3, 8, 9), {"window": 5, "index": picks(2, 37, 9, 4)}
    yield "picks-gathered", (2, 40, 0, 28, 4, 60), {"window": 8, "index": picks(2, 40, 60, 3)}
    yield "documents", (2, 37, 0, 3, 8, 9), {
        "window": 9, "window_start": torch.randint(0, 45, (2, 37), generator=g), "index": picks(2, 37, 9, 4),
    }  # fmt: skip


@pytest.mark.parametrize("shape, options", [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_forward_and_gradients(shape, options):
    tensors = inputs(*shape)
    used = [x for x in tensors if x is not None]
    out, lse = attention(*tensors, scale=0.3, **options)
    want, want_lse = oracle(*tensors, scale=0.3, **options)
    assert_same("out", out, want, 1e-12)
    assert_same("lse", lse, want_lse, 1e-12)
    dout = torch.randn_like(out)
    got, expected = (torch.autograd.grad(x, used, dout) for x in (out, want))
    for name, a, b in zip([n for n, x in zip(NAMES, tensors) if x is not None], got, expected):
        assert_same(f"d{name}", a, b, 1e-11)


def test_both_ways_of_looking_at_picks_are_taken():
    assert sharing_pays(9, 4, 3) and not sharing_pays(60, 3, 28)


def test_picks_counted_twice_equal_a_copied_entry():
    q, kv, compressed, sink = inputs(1, 2, 0, 2, 8, 3)
    twice = attention(q, kv, compressed, sink, window=2, scale=1.0, index=torch.tensor([[[1, 1], [0, 2]]]))[0]
    copied = torch.cat([compressed, compressed[:, 1:2]], 1)
    once = attention(q, kv, copied, sink, window=2, scale=1.0, index=torch.tensor([[[1, 3], [0, 2]]]))[0]
    assert_same("out", twice, once, 1e-14)


def test_a_query_that_sees_nothing_is_exactly_zero():
    q, kv, compressed, sink = inputs(1, 4, 0, 2, 8, 3)
    blind = {"window_start": torch.full((1, 4), 9), "index": torch.full((1, 4, 2), -1)}
    out, lse = attention(q, kv, compressed, sink, window=4, scale=1.0, **blind)
    assert not out.any() and torch.equal(lse, sink.expand(1, 4, 2))
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), [q, kv, compressed, sink]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1e30, 1e4])
def test_extreme_sinks(value):
    q, kv, _, _ = inputs(1, 20, 0, 2, 8, 0)
    sink = torch.full((2,), value, dtype=torch.float64, requires_grad=True)
    out, _ = attention(q, kv, None, sink, window=4, scale=1.0)
    want = torch.zeros_like(out) if value > 0 else oracle(q, kv, None, sink, window=4, scale=1.0)[0]
    torch.testing.assert_close(out, want)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, kv]))


@pytest.mark.parametrize("index", [None, "shared", "gathered"])
def test_nan_in_a_key_reaches_only_those_who_see_it(index):
    t, p, heads = 40, 60, 28
    q, kv, compressed, sink = (x.detach() for x in inputs(1, t, 0, heads, 4, p))
    kv[0, 30], compressed[0, 7] = math.nan, math.inf
    if index is None:
        options = {"start": torch.zeros(1, t).long(), "end": torch.arange(t)[None] // 3}
        reads = torch.arange(t) // 3 > 7
    else:
        k = 3 if index == "gathered" else 40
        picks = torch.arange(k)[None, None].expand(1, t, k) + 10
        picks = picks.clone()
        picks[0, 5, 0] = 7
        options, reads = {"index": picks}, torch.arange(t) == 5
    reads = reads | ((torch.arange(t) >= 30) & (torch.arange(t) < 38))
    out, _ = attention(q, kv, compressed, sink, window=8, scale=0.1, **options)
    assert torch.equal(~out.isfinite().all(-1).all(-1)[0], reads)


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)], ids=str
)
def test_precision_is_that_of_the_inputs(dtype, limit):
    tensors = inputs(2, 50, 0, 2, 16, 12, dtype)
    options = {"window": 8, "scale": 0.25, "start": torch.zeros(1, 50).long(), "end": (torch.arange(50)[None] + 1) // 4}
    out, lse = attention(*tensors, **options)
    want, _ = oracle(*(x.double() for x in tensors), **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_same("out", out, want, limit)


def test_autocast_does_not_round_the_scores():
    tensors = inputs(1, 20, 0, 2, 16, 0, torch.float32)
    plain, _ = attention(*tensors, window=8, scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*tensors, window=8, scale=0.25)[0], plain)


def test_same_bits_on_every_run():
    tensors = inputs(2, 200, 0, 28, 8, 100, torch.float32)
    index = torch.randint(0, 100, (2, 200, 6), generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):
        out, _ = attention(*tensors, window=16, scale=0.3, index=index)
        runs.append((out, *torch.autograd.grad(out.sum(), tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_zero_queries():
    q, kv, compressed, sink = inputs(2, 0, 0, 2, 8, 3)
    options = {"start": torch.zeros(1, 0).long(), "end": torch.zeros(1, 0).long()}
    out, lse = attention(q, kv, compressed, sink, window=4, scale=1.0, **options)
    assert out.shape == (2, 0, 2, 8) and lse.shape == (2, 0, 2)


def test_memory_of_scores_is_bounded():
    """No tensor of t x p exists: with it, 2 GiB would be needed."""
    from abyssal.train.metrics import peak_memory_gib

    t, p = 32768, 8192
    q, kv, compressed, sink = (x.detach() for x in inputs(1, t, 0, 2, 4, p, torch.float32))
    end = ((torch.arange(t) + 1) // 4)[None]
    before = peak_memory_gib(q.device)
    attention(q[:, -4096:], kv, compressed, sink, window=8, scale=0.5, start=end[:, -4096:] * 0, end=end[:, -4096:])
    grown = peak_memory_gib(q.device) - before
    assert grown < 0.1, f"{grown:.2f} GiB more at the peak"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sink": torch.zeros(3)}, "sink"),
        ({"kv": torch.zeros(1, 2, 8)}, "kv"),
        ({"window": 0}, "window=0"),
        ({"compressed": torch.zeros(1, 3, 8)}, "start and end"),
        ({"backend": "fast"}, "backend='fast'"),
    ],
)
def test_bad_input(change, message):
    call = {"q": torch.zeros(1, 4, 2, 8), "kv": torch.zeros(1, 4, 8), "compressed": None, "sink": torch.zeros(2)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        attention(**{**call, "window": 4, "scale": 1.0, **change})
