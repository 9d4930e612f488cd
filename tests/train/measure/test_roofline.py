"""Lower bounds: by hand, against brute-force counts and counted FLOPs, and against published limits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from abyssal.train.measure import roofline
from abyssal.train.measure.roofline import H100_ACHIEVED, MoE, Peak, Work

SMALL = MoE(tokens=3, width=4, expert_width=2, experts=5, slots=2, itemsize=2)  # 6 rows


@pytest.mark.parametrize(
    "part, work",
    [
        (roofline.moe_logits, Work(2 * 3 * 4 * 5, 24 + 80 + 60 + 48)),
        (roofline.moe_route, Work(0, 60 + 60 + 48)),
        (roofline.moe_permutation, Work(0, 72 + 40)),
        (roofline.moe_up, Work(2 * 6 * 4 * 4, 24 + 160 + 24 + 48)),  # x, w13, a, h
        (roofline.moe_down, Work(2 * 6 * 2 * 4, 24 + 80 + 48)),  # a, w2, y
        (roofline.moe_combine, Work(0, 48 + 24)),
        (roofline.moe_down_backward, Work(2 * 6 * 4 * 2, 24 + 80 + 48 + 48 + 24 + 24)),  # dout w2 h, dh a dweights
        (roofline.moe_down_weight, Work(2 * 6 * 2 * 4, 24 + 24 + 80)),
        (roofline.moe_up_backward, Work(2 * 6 * 4 * 4, 48 + 160 + 48)),
        (roofline.moe_up_weight, Work(2 * 6 * 4 * 4, 48 + 24 + 160)),
    ],
)
def test_parts_by_hand(part, work):
    assert part(SMALL) == work


def test_what_is_not_kept_or_has_no_shared_expert_is_not_moved():
    assert roofline.moe_up(SMALL).bytes - roofline.moe_up(SMALL, keep=False).bytes == 48
    assert roofline.moe_combine(SMALL, shared=True).bytes - roofline.moe_combine(SMALL).bytes == 24
    assert roofline.moe_kept(SMALL) == 24 + 48


@pytest.mark.parametrize(
    "tokens, width, expert_width, experts, slots, forward, backward, bound",
    [
        (4096, 4096, 2048, 256, 6, 4.59, 9.10, "memory"),
        (8192, 4096, 2048, 256, 6, 4.88, 9.62, "memory"),
        (8192, 2048, 768, 128, 8, 0.775, 1.55, "compute"),
        (32768, 2048, 768, 128, 8, 3.10, 6.20, "compute"),
    ],
)
def test_limits_on_an_h100(tokens, width, expert_width, experts, slots, forward, backward, bound):
    m = MoE(tokens, width, expert_width, experts, slots)
    for work, milliseconds in ((roofline.moe_forward(m), forward), (roofline.moe_backward(m), backward)):
        assert 1e3 * H100_ACHIEVED.seconds(work) == pytest.approx(milliseconds, rel=2e-3)
        assert H100_ACHIEVED.bound(work) == bound


def test_limits_of_router_and_combine_on_an_h100():
    m = MoE(8192, 4096, 2048, 256, 6)
    assert 1e3 * H100_ACHIEVED.seconds(roofline.moe_logits(m)) == pytest.approx(0.027, abs=5e-4)
    assert 1e3 * H100_ACHIEVED.seconds(roofline.moe_combine(m, shared=True)) == pytest.approx(0.179, abs=5e-4)


def test_flops_are_those_of_the_products():
    m = MoE(tokens=50, width=24, expert_width=16, experts=6, slots=3, itemsize=4)
    x, w13, w2 = (torch.randn(s, requires_grad=True) for s in ((50, 24), (6, 32, 24), (6, 24, 16)))
    experts, out = torch.rand(50, 6).topk(3).indices, torch.zeros(50, 24)
    counter = FlopCounterMode(display=False)
    with counter:
        for e in range(6):
            token = (experts == e).any(-1).nonzero().flatten()
            g, u = F.linear(x[token], w13[e]).chunk(2, -1)
            out = out.index_add(0, token, F.linear(F.silu(g) * u, w2[e]))
    assert counter.get_total_flops() == roofline.moe_forward(m).flops
    with counter:
        out.sum().backward()
    assert counter.get_total_flops() == roofline.moe_backward(m).flops


def test_a_limit_is_the_larger_of_the_two_times():
    peak = Peak(100.0, 10.0, "invented")
    assert peak.seconds(Work(1000, 10)) == 10 and peak.bound(Work(1000, 10)) == "compute"
    assert peak.seconds(Work(1000, 200)) == 20 and peak.bound(Work(1000, 200)) == "memory"
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_known_devices_and_others():
    h100 = roofline.datasheet("NVIDIA H100 80GB HBM3", "bfloat16")
    assert (h100.flops, h100.bytes) == (989e12, 3350e9)
    assert H100_ACHIEVED.flops < h100.flops and H100_ACHIEVED.bytes < h100.bytes
    assert roofline.datasheet("NVIDIA A100-SXM4-80GB", "float32").flops == 19.5e12
    assert roofline.datasheet("x86_64", "float32") is None
    assert roofline.datasheet("NVIDIA H200", "float64") is None


# attention, indexer, streams, head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 37])
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("ratio, picks", [(0, None), (1, 3), (4, 3), (4, 100), (5, None), (64, 2)])
def test_pairs_are_those_that_are_seen(tokens, window, ratio, picks):
    a = roofline.Attention(tokens, 2, 8, window, ratio, picks)
    rows = sum(min(t + 1, window) for t in range(tokens))
    entries = sum(min((t + 1) // ratio, picks or tokens) for t in range(tokens)) if ratio else 0
    assert a.pairs == rows + entries
    assert a.forward.flops == 4 * 2 * 8 * a.pairs and a.backward.flops == 10 * 2 * 8 * a.pairs


def test_attention_bytes_by_hand():
    a = roofline.Attention(tokens=10, heads=3, dim=8, window=4, ratio=4, picks=1)  # 2 entries
    assert a.forward.bytes == 2 * (2 * 10 * 3 * 8) + 2 * 12 * 8 + 4 * 10 + 4 * 10 * 3  # q o; kv entries; picks; lse
    assert a.backward.bytes == 4 * (2 * 10 * 3 * 8) + 6 * 12 * 8 + 4 * 10 + 8 * 10 * 3
    assert a.kept == 4 * 10 * 3
    assert roofline.Attention(10, 3, 8, 4).forward.bytes == 2 * (2 * 10 * 3 * 8) + 2 * 10 * 8 + 4 * 10 * 3


def test_attention_flops_are_those_of_the_products():
    """Per pair; the backward pass makes the scores again."""
    q, k = torch.randn(6, 5, 8, requires_grad=True), torch.randn(6, 7, 8, requires_grad=True)
    counter, scores = FlopCounterMode(display=False), 2 * 8
    with counter:
        out = torch.bmm(torch.bmm(q, k.mT).softmax(-1), k)
    a = roofline.Attention(tokens=9, heads=1, dim=8, window=3)
    assert counter.get_total_flops() / (6 * 5 * 7) == a.forward.flops / a.pairs
    with counter:
        out.sum().backward()
    assert counter.get_total_flops() / (6 * 5 * 7) == a.backward.flops / a.pairs - scores


def test_indexer_by_hand():
    m = roofline.Indexer(tokens=10, heads=3, dim=8, ratio=4, picks=1)
    seen = sum((t + 1) // 4 for t in range(10))
    inputs = 2 * 10 * 3 * 8 + 2 * 2 * 8 + 4 * 10 * 3
    assert m.topk == Work(2 * 3 * 8 * seen, inputs + 4 * 10)
    assert m.selection == Work(0, 4 * seen + 4 * 10)
    picked = sum(min(1, (t + 1) // 4) for t in range(10))
    teacher = 2 * 10 * 2 * 16 + 2 * 2 * 16 + 4 * 10 * 2
    attention = roofline.Attention(10, 2, 16, 4, 4, 1)
    assert roofline.index_loss(m, attention) == Work(2 * (32 + 24) * picked, teacher + inputs + 4 * 10)
    assert roofline.index_loss_backward(m) == Work(4 * 24 * picked, 2 * inputs + 8 * 10)


def test_streams_by_hand():
    pool = roofline.Pool(tokens=10, dim=8, ratio=4, overlap=True, itemsize=4)
    assert (pool.forward.bytes, pool.backward.bytes) == (4 * (2 * 10 * 16 + 2 * 8), 4 * (4 * 10 * 16 + 2 * 8))
    assert roofline.Pool(10, 8, 4, False, 4).forward.bytes == 4 * (2 * 10 * 8 + 2 * 8)
    site = roofline.Hyper(tokens=5, width=8, streams=3, itemsize=2)
    row, numbers = 2 * 5 * 8, 4 * 5 * 15
    assert site.pre == Work(2 * 5 * 24 * 15 + 2 * 5 * 24, 4 * row + numbers)
    assert site.post == Work(2 * 5 * 24 * 4, 7 * row + 4 * 5 * 12)
    assert (site.post_backward.bytes, site.pre_backward.bytes) == (11 * row, 10 * row)
    assert site.kept == row + numbers
    engram = roofline.Engram(tokens=5, width=8, streams=3, itemsize=2)
    assert (engram.gate.bytes, engram.gate_backward.bytes) == (10 * row, 17 * row)
    assert engram.lookup(heads=4, dim=6).bytes == 8 * 5 + 2 * (2 * 5 * 4 * 6)
    assert engram.lookup_backward(heads=4, dim=6, rows=100).bytes == 2 * (5 * 4 + 100) * 6
    assert engram.hash(4).bytes == 8 * 5 * 5 and engram.kept == 12 * 5 * 3
    assert roofline.elementwise(7, 4, 2) == Work(0, 42)


def test_head_flops_are_those_of_the_products():
    head = roofline.CrossEntropy(tokens=12, width=8, vocabulary=20, itemsize=4)
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = F.cross_entropy(F.linear(x, weight), torch.zeros(12, dtype=torch.int64))
    assert counter.get_total_flops() == head.forward.flops
    with counter:
        loss.backward()
    assert counter.get_total_flops() == head.backward.flops
    assert head.forward.bytes == x.nbytes + weight.nbytes + 8 * 12 and head.backward.bytes == 2 * head.kept


@pytest.mark.parametrize("rows, columns", [(6, 10), (10, 6)])
def test_newton_schulz_flops_are_those_of_the_products(rows, columns):
    from abyssal.train.measure.bench.newton_schulz import MUON, by_bmm

    work = roofline.NewtonSchulz(count=3, rows=rows, columns=columns, steps=5).forward
    counter = FlopCounterMode(display=False)
    with counter:
        by_bmm(torch.randn(3, rows, columns), MUON)
    assert counter.get_total_flops() == work.flops
    assert work.bytes == 3 * 5 * 2 * (3 * 60 + 3 * 36)


@pytest.mark.parametrize(
    "work, milliseconds",
    [
        (roofline.Indexer(8192, 64, 128, 4, 512).topk, 0.172),
        (roofline.Indexer(65536, 64, 128, 4, 512).topk, 11.0),
        (roofline.Attention(8192, 64, 512, 128, 128).forward, 0.363),
        (roofline.Attention(8192, 64, 512, 128, 128).backward, 0.727),
        (roofline.Hyper(8192, 4096).pre, 0.112),
        (roofline.Hyper(8192, 4096).post, 0.202),
        (roofline.Hyper(8192, 4096).post_backward, 0.313),
        (roofline.Hyper(8192, 4096).pre_backward, 0.291),
        (roofline.Engram(8192, 5120).gate, 0.364),
        (roofline.Engram(8192, 5120).gate_backward, 0.615),
        (roofline.CrossEntropy(8192, 4096, 129280).forward + roofline.CrossEntropy(8192, 4096, 129280).backward, 32.6),
        (roofline.Pool(8192, 512, 4, True, 4).forward, 0.0238),
        (roofline.NewtonSchulz(1, 2048, 4096, 5).forward, 0.538),
    ],
)
def test_limits_of_other_ops_on_an_h100(work, milliseconds):
    assert 1e3 * H100_ACHIEVED.seconds(work) == pytest.approx(milliseconds, rel=8e-3)
