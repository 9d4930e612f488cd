"""The router's kernels: scores and slopes over the whole range, ties, NaN, the stable expert order, the gradient."""

import inspect
import math

import pytest
import torch

from abyssal.kernels import balance_loss, moe_permutation, moe_route
from abyssal.kernels.moe_experts import eager as experts_eager
from abyssal.kernels.moe_experts import triton as experts_triton
from abyssal.kernels.moe_route import eager
from abyssal.kernels.moe_route import triton as kernels
from abyssal.kernels.topk import stable_topk


def oracle(z, top_k, scale, bias=None, experts=None):
    """In float64, with the experts chosen by a stable sort of the float32 scores."""
    s = torch.nn.functional.softplus(z.double(), threshold=1e9).sqrt()
    if experts is None:
        experts = stable_topk(s.float() if bias is None else s.float() + bias, top_k)
    chosen = s.gather(1, experts)
    return s, experts, chosen / chosen.sum(-1, keepdim=True) * scale


def agree(got, want):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert float((got - want).norm()) < 1e-6 * float(want.norm()) + 1e-8


@pytest.mark.parametrize("hashed", [False, True], ids=["biased", "hashed"])
@pytest.mark.parametrize(("n", "e", "k"), [(1, 1, 1), (13, 8, 3), (9, 160, 6), (5, 7, 7), (300, 12, 2)])
def test_routing_and_its_gradient(device, n, e, k, hashed):
    g = torch.Generator().manual_seed(n)
    z = (torch.randn(n, e, generator=g) * 4).to(device)
    bias = None if hashed else torch.randn(e, generator=g).to(device)
    table = torch.rand(n, e, generator=g).topk(k).indices.to(device) if hashed else None
    a, b = z.clone().requires_grad_(), z.double().requires_grad_()
    got, want = moe_route(a, top_k=k, scale=1.5, bias=bias, experts=table), oracle(b, k, 1.5, bias, table)
    assert torch.equal(got.experts, want[1])
    agree(got.scores, want[0]), agree(got.weights, want[2])
    ds, dw = torch.randn(n, e, generator=g).to(device), torch.randn(n, k, generator=g).to(device)
    for loss in (
        lambda s, w: (s * ds).sum() + (w * dw).sum(),
        lambda s, w: (s * ds).sum(),
        lambda s, w: (w * dw).sum(),
    ):
        da, db = (torch.autograd.grad(loss(s, w), t, retain_graph=True)[0] for t, (s, _, w) in ((a, got), (b, want)))
        agree(da, db)


def test_the_same_choice_as_the_reference_whatever_ties(device):
    g = torch.Generator().manual_seed(0)
    few = torch.randint(-1, 2, (40, 33), generator=g).float()
    hidden = few.masked_fill(torch.rand(40, 33, generator=g) < 0.6, -math.inf)
    nan = few.masked_fill(torch.rand(40, 33, generator=g) < 0.3, math.nan)
    constant = torch.tensor([0.0, -math.inf, math.nan, math.inf])[:, None].expand(4, 33)
    z = torch.cat([few, hidden, nan, constant]).to(device)
    for bias in (None, torch.randint(-1, 2, (33,), generator=g).float().to(device), torch.full((33,), -math.inf)):
        bias = None if bias is None else bias.to(device)
        for k in (1, 5, 33):
            got = moe_route(z, top_k=k, scale=1.0, bias=bias)
            scores = got.scores if bias is None else got.scores + bias
            assert torch.equal(got.experts, stable_topk(scores, k))
            plain = moe_route(z, top_k=k, scale=1.0, bias=bias, backend="eager")
            assert torch.equal(got.experts, plain.experts)
            torch.testing.assert_close(got.weights, plain.weights, equal_nan=True)


def test_a_nan_row_stays_alone(device):
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    clean = moe_route(z, top_k=2, scale=1.0)
    z[1] = math.nan
    dirty = moe_route(z, top_k=2, scale=1.0)
    assert dirty.experts[1].tolist() == [0, 1] and dirty.weights[1].isnan().all()
    for a, b in zip(clean, dirty):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_score_and_slope_over_the_whole_range(device):
    z = torch.tensor([-150.0, -104.0, -90.0, -60.0, -40.1, -39.9, -21.0, -1.0, 0.0, 1.0, 19.9, 20.1, 41.0, 1e4])
    leaf = z.to(device).requires_grad_()
    scores = moe_route(leaf[None], top_k=1, scale=1.0).scores[0]
    scores.sum().backward()
    for i, v in enumerate(z.tolist()):
        s = math.sqrt(math.log1p(math.exp(v)) if v < 30 else v + math.log1p(math.exp(-v)))
        sigma = 1 / (1 + math.exp(-v))
        assert scores[i].item() == pytest.approx(s, rel=2e-6, abs=0), v
        assert leaf.grad[i].item() == pytest.approx(sigma / (2 * s), rel=4e-6, abs=0), v


def test_half_logits_and_strides(device):
    z = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).to(device)
    half = z.bfloat16().requires_grad_()
    routing = moe_route(half, top_k=3, scale=1.0)
    routing.weights[:, 0].sum().backward()
    assert routing.scores.dtype == routing.weights.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    want, strided = moe_route(half.detach().float(), top_k=3, scale=1.0), half.detach().T.contiguous().T
    for a, b, c in zip(routing, want, moe_route(strided, top_k=3, scale=1.0)):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_an_unknown_hashed_expert_weighs_nan(device):
    table = torch.tensor([[0, 1], [2, 5], [3, -1]], device=device)
    weights = kernels.moe_route(torch.zeros(3, 4, device=device), top_k=2, scale=1.0, experts=table).weights
    assert weights[0].tolist() == [0.5, 0.5] and weights[1:].isnan().all()


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 1), (50, 3, 5), (9, 6, 160), (8, 4, 4), (333, 8, 11)])
def test_permutation_is_a_stable_sort(device, monkeypatch, n, k, e):
    monkeypatch.setattr(kernels, "SPAN", 3)
    experts = torch.rand(n, e, generator=torch.Generator().manual_seed(n)).topk(k).indices.to(device)
    real = torch.arange(n, device=device) % 3 > 0
    for mask in (None, real, torch.zeros_like(real)):
        got, want = (moe_permutation(experts, e, mask, backend=b) for b in ("triton", "eager"))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want))


def test_permutation_leaves_unknown_experts_out(device):
    experts = torch.tensor([[0, 2], [7, 1], [-1, 0]], device=device)
    order, counts, inverse = kernels.moe_permutation(experts, 3)
    assert order[:4].tolist() == [0, 5, 3, 1] and counts.tolist() == [2, 1, 1]
    assert inverse.tolist() == [[0, 3], [-1, 2], [-1, 1]]


def test_no_tokens(device):
    z = torch.zeros(0, 4, device=device, requires_grad=True)
    routing = moe_route(z, top_k=2, scale=1.0)
    routing.weights.sum().backward()
    assert routing.experts.shape == (0, 2) and z.grad.shape == (0, 4)
    assert moe_permutation(routing.experts, 4).counts.tolist() == [0] * 4


def test_balance_loss_reaches_the_logits(device):
    z = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for backend in ("triton", "eager"):
        leaf = z.clone().requires_grad_()
        routing = moe_route(leaf.flatten(0, 1), top_k=2, scale=1.0, backend=backend)
        scores, experts = routing.scores.unflatten(0, (2, 9)), routing.experts.unflatten(0, (2, 9))
        balance_loss(scores, experts, backend=backend).backward()
        grads.append(leaf.grad)
    agree(*grads)


def test_a_row_has_the_same_bits_in_any_batch(device):
    g = torch.Generator().manual_seed(0)
    z, order = (
        torch.randint(-3, 3, (70, 32), generator=g).float().to(device),
        torch.randperm(70, generator=g).to(device),
    )
    first, second = moe_route(z, top_k=6, scale=1.5), moe_route(z, top_k=6, scale=1.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a[order], b) for a, b in zip(first, moe_route(z[order], top_k=6, scale=1.5)))
    assert all(torch.equal(a[:7], b) for a, b in zip(first, moe_route(z[:7], top_k=6, scale=1.5)))


def test_twins_have_the_signature_of_the_reference():
    for plain, twin in ((eager, kernels), (experts_eager, experts_triton)):
        for name in twin.__all__:
            assert inspect.signature(getattr(plain, name)) == inspect.signature(getattr(twin, name)), name
