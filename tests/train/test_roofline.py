"""Lower bounds of the experts: by hand, against the counted FLOPs of the reference, and against published limits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from abyssal.train import roofline
from abyssal.train.roofline import H100_ACHIEVED, MoE, Peak, Work

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
