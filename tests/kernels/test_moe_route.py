"""The router against plain float64: scores and slopes over the whole range, ties, padding, expert order, balance."""

import math

import pytest
import torch

from abyssal.kernels.moe_route import balance_loss, moe_permutation, moe_route
from abyssal.kernels.topk import stable_topk


def relative_rms(name, got, want):
    want = want.double()
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-300)
    assert error < 1e-5, f"{name}: relative RMS error {error:.2e}"


def sorted_topk(values, k, ordered=True):
    """The definition: the first k of a stable descending sort, NaN as -inf."""
    values = torch.where(values.isnan(), -math.inf, values.double()) + 0.0
    index = torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]
    return index if ordered else index.sort(-1).values


def tied_rows(width, generator):
    """Rows in which every kind of tie occurs."""
    normal = torch.randn(40, width, generator=generator)
    few = torch.randint(-1, 2, (40, width), generator=generator).float()  # ties at every rank
    signed = torch.where(torch.rand(20, width, generator=generator) < 0.5, 0.0, -0.0)
    hidden = normal[:20].masked_fill(torch.rand(20, width, generator=generator) < 0.7, -math.inf)
    nan = few[:20].masked_fill(torch.rand(20, width, generator=generator) < 0.3, math.nan)
    constant = torch.tensor([0.0, -math.inf, math.nan, math.inf]).repeat_interleave(2)[:, None].expand(8, width)
    return torch.cat([normal, few, signed, hidden, nan, constant])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 3), (16, 4), (33, 33), (160, 6), (257, 64)])
def test_topk_is_the_head_of_a_stable_sort(width, k, ordered, seed=0):
    rows = tied_rows(width, torch.Generator().manual_seed(seed))
    for values in (rows, rows.bfloat16(), rows.double(), rows.view(2, -1, width), rows.T.contiguous().T):
        assert torch.equal(stable_topk(values, k, ordered=ordered), sorted_topk(values, k, ordered))


def test_topk_of_no_rows_and_refused_k():
    assert stable_topk(torch.zeros(0, 5), 2).shape == (0, 2)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}"):
            stable_topk(torch.zeros(3, 5), k)


def oracle(z, top_k, scale, bias=None, experts=None):
    """Every token by itself, in Python floats."""
    scores = torch.zeros_like(z, dtype=torch.float64)
    chosen, weights = [], []
    for n, row in enumerate(z.tolist()):
        s = [math.sqrt(math.log1p(math.exp(v)) if v < 30 else v + math.exp(-v)) for v in row]
        scores[n] = torch.tensor(s, dtype=torch.float64)
        biased = [v + (0.0 if bias is None else float(bias[e])) for e, v in enumerate(s)]
        picks = sorted(range(len(s)), key=lambda e, b=biased: (-b[e], e))[:top_k]
        picks = picks if experts is None else experts[n].tolist()
        total = sum(s[e] for e in picks) + 1e-20
        chosen.append(picks)
        weights.append([s[e] / total * scale for e in picks])
    return scores, torch.tensor(chosen), torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize(("n", "e", "k"), [(1, 4, 1), (17, 16, 4), (5, 160, 6), (9, 5, 5)])
def test_route_matches_the_definition(n, e, k):
    torch.manual_seed(e)
    z, bias = torch.randn(n, e) * 4, torch.randn(e)
    for b in (None, bias):
        got, want = moe_route(z, top_k=k, scale=1.5, bias=b), oracle(z, k, 1.5, b)
        relative_rms("scores", got.scores, want[0])
        assert torch.equal(got.experts, want[1])
        relative_rms("weights", got.weights, want[2])
        relative_rms("total", got.weights.sum(-1), torch.full((n,), 1.5))


def test_bias_steers_the_selection_and_never_the_weights():
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    routing = moe_route(z, top_k=2, scale=1.0, bias=torch.tensor([10.0, 0.0, 0.0, 0.0]))
    assert routing.experts.tolist() == [[0, 3]]
    s = torch.sqrt(torch.nn.functional.softplus(z.double()))[0]
    relative_rms("weights", routing.weights[0], torch.stack([s[0], s[3]]) / (s[0] + s[3]))


def test_hash_routing_keeps_the_order_and_weights_by_score():
    torch.manual_seed(0)
    z, table = torch.randn(6, 8), torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    got, want = moe_route(z, top_k=3, scale=2.5, experts=table), oracle(z, 3, 2.5, experts=table)
    assert torch.equal(got.experts, table)
    relative_rms("weights", got.weights, want[2])


def test_ties_go_to_the_lowest_expert_and_biased_order_is_descending():
    assert moe_route(torch.zeros(2, 9), top_k=4, scale=1.0).experts.tolist() == [[0, 1, 2, 3]] * 2
    z = torch.tensor([[0.0, 5.0, 0.0, 5.0, -1.0]])
    assert moe_route(z, top_k=4, scale=1.0).experts.tolist() == [[1, 3, 0, 2]]


def test_a_nan_row_stays_alone():
    torch.manual_seed(0)
    z = torch.randn(4, 6)
    clean = moe_route(z, top_k=2, scale=1.0)
    z[1] = math.nan
    dirty = moe_route(z, top_k=2, scale=1.0)
    assert dirty.experts[1].tolist() == [0, 1] and dirty.weights[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(dirty.weights[others], clean.weights[others])
    assert torch.equal(dirty.experts[others], clean.experts[others])


def test_score_and_slope_over_the_whole_range():
    z = torch.tensor([-150.0, -104.0, -90.0, -60.0, -40.1, -39.9, -21.0, -1.0, 0.0, 1.0, 19.9, 20.1, 41.0, 1e4])
    leaf = z.clone().requires_grad_()
    scores = moe_route(leaf[None], top_k=1, scale=1.0).scores[0]
    scores.sum().backward()
    for i, v in enumerate(z.tolist()):
        softplus = math.log1p(math.exp(v)) if v < 30 else v + math.log1p(math.exp(-v))
        sigma = 1 / (1 + math.exp(-v)) if v > -700 else 0.0
        s = math.sqrt(softplus)
        assert scores[i].item() == pytest.approx(s, rel=2e-6, abs=0), v
        assert leaf.grad[i].item() == pytest.approx(sigma / (2 * s), rel=4e-6, abs=0), v


@pytest.mark.parametrize("hashed", [False, True])
def test_gradcheck_through_scores_and_weights(hashed):
    torch.manual_seed(0)
    z = (torch.randn(5, 7, dtype=torch.float64) * 3).requires_grad_()
    experts = torch.stack([torch.randperm(7)[:3] for _ in range(5)]) if hashed else None
    bias = None if hashed else torch.randn(7, dtype=torch.float64)

    def run(logits):
        routing = moe_route(logits, top_k=3, scale=1.5, bias=bias, experts=experts)
        return routing.scores, routing.weights

    assert torch.autograd.gradcheck(run, (z,))


def test_no_gradient_to_the_bias_and_fp32_for_half_logits():
    z, bias = torch.randn(3, 8, dtype=torch.bfloat16).requires_grad_(), torch.zeros(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        routing = moe_route(z, top_k=2, scale=1.0, bias=bias)
        balance_loss(routing.scores[None], routing.experts[None]).add(routing.weights[:, 0].sum()).backward()
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    assert bias.grad is None and z.grad.dtype == torch.bfloat16 and z.grad.any()
    want = oracle(z.detach().float(), 2, 1.0)
    relative_rms("weights under autocast", routing.weights, want[2])


def test_no_tokens():
    z = torch.zeros(0, 4, requires_grad=True)
    routing = moe_route(z, top_k=2, scale=1.0)
    assert routing.experts.shape == (0, 2)
    routing.weights.sum().backward()
    assert z.grad.shape == (0, 4)
    assert moe_permutation(routing.experts, 4).counts.tolist() == [0] * 4
    assert balance_loss(torch.zeros(2, 0, 4), torch.zeros(2, 0, 2, dtype=torch.int64)) == 0


def test_refusals_name_the_argument():
    z, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="top_k=5"):
        moe_route(z, top_k=5, scale=1.0)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        moe_route(z, top_k=2, scale=1.0, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="bias and experts"):
        moe_route(z, top_k=2, scale=1.0, bias=torch.zeros(4), experts=ids)
    with pytest.raises(ValueError, match=r"experts is torch\.int32"):
        moe_route(z, top_k=2, scale=1.0, experts=ids.int())
    for bad in (-1, 4):
        with pytest.raises(IndexError, match=f"experts contains {bad}: allowed is 0..3"):
            moe_route(z, top_k=2, scale=1.0, experts=ids.clone().fill_(bad))
    with pytest.raises(ValueError, match="logits has shape"):
        moe_route(z[0], top_k=2, scale=1.0)
    with pytest.raises(ValueError, match=r"real is torch\.int64"):
        moe_permutation(ids, 4, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected \\[sequences, tokens, experts\\]"):
        balance_loss(z, ids)


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 1), (13, 3, 5), (50, 6, 160), (8, 4, 4)])
def test_permutation_is_a_stable_sort(n, k, e):
    torch.manual_seed(n)
    experts = torch.stack([torch.randperm(e)[:k] for _ in range(n)])
    order, counts, inverse = moe_permutation(experts, e)
    pairs = experts.flatten().tolist()
    assert order.tolist() == sorted(range(n * k), key=lambda p: (pairs[p], p))
    assert counts.tolist() == [pairs.count(i) for i in range(e)]
    assert [int(order[inverse[t, s]]) for t in range(n) for s in range(k)] == list(range(n * k))


def test_padding_is_routed_but_not_counted():
    torch.manual_seed(0)
    experts, real = torch.randint(0, 5, (9, 2)), torch.arange(9) % 3 > 0
    with_padding, plain = moe_permutation(experts, 5, real), moe_permutation(experts, 5)
    assert torch.equal(with_padding.order, plain.order) and torch.equal(with_padding.inverse, plain.inverse)
    assert with_padding.counts.tolist() == torch.bincount(experts[real].flatten(), minlength=5).tolist()
    assert moe_permutation(experts, 5, torch.zeros(9, dtype=torch.bool)).counts.tolist() == [0] * 5


def balance_oracle(scores, experts, real):
    losses = []
    for s, x, r in zip(scores.double(), experts, real):
        s, x = s[r], x[r]
        if not len(s):
            continue
        load = torch.bincount(x.flatten(), minlength=s.shape[1]).double() * s.shape[1] / x.numel()
        losses.append((load * (s / s.sum(-1, keepdim=True)).mean(0)).sum())
    return torch.stack(losses).mean()


def test_balance_loss_and_its_gradient():
    torch.manual_seed(0)
    scores, experts = torch.rand(4, 11, 6, dtype=torch.float64), torch.rand(4, 11, 6).topk(2).indices
    real = torch.rand(4, 11) < 0.7
    real[2] = False
    for mask in (real, torch.ones(4, 11, dtype=torch.bool)):
        a, b = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        got, want = balance_loss(a, experts, mask), balance_oracle(b, experts, mask)
        got.backward(), want.backward()
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(balance_loss(scores, experts), balance_loss(scores, experts, mask))


def test_balance_loss_is_one_at_balance_and_follows_the_score():
    even = torch.arange(8).view(1, 4, 2)
    scores = torch.rand(1, 4, 8)
    assert balance_loss(scores, even).item() == pytest.approx(1.0, rel=1e-6)
    crowded = torch.zeros(1, 4, 1, dtype=torch.int64)
    first = torch.tensor([1.0] + [0.0] * 7).expand(1, 4, 8).clone().requires_grad_()
    loss = balance_loss(first + 1e-3, crowded)
    loss.backward()
    assert loss > 7 and (first.grad[..., 0] > 0).all() and (first.grad[..., 1:] < 0).all()
    assert balance_loss(scores, even, torch.zeros(1, 4, dtype=torch.bool)) == 0


def test_a_nan_in_padding_does_not_reach_the_loss():
    scores, experts = torch.rand(1, 5, 4), torch.rand(1, 5, 4).topk(2).indices
    real = torch.tensor([[True, True, False, True, True]])
    want = balance_loss(scores, experts, real)
    scores[0, 2] = math.nan
    assert torch.equal(balance_loss(scores, experts, real), want)


def test_same_bits_on_each_run():
    torch.manual_seed(0)
    z = torch.randint(-3, 3, (300, 32)).float()
    first, second = moe_route(z, top_k=6, scale=1.5), moe_route(z, top_k=6, scale=1.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    order = torch.randperm(300)
    assert all(torch.equal(a[order], b) for a, b in zip(first, moe_route(z[order], top_k=6, scale=1.5)))
