"""The experts against a float64 loop over tokens and slots: every routing, the clamp, rounding, what must not leak."""

import math

import pytest
import torch
import torch.nn.functional as F
from moe_cases import gate_up

from abyssal.kernels.moe_experts import eager, moe_experts, swiglu

NAMES = ("out", "dx", "dweights", "dw13", "dw2")


def relative_rms(name, got, want, limit=2e-6):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error < limit, f"{name}: relative RMS error {error:.2e}"


def case(n, k, e, d=20, f=12, dtype=torch.float32, scale=1.0, seed=0):
    """x, experts, weights, w13, w2."""
    torch.manual_seed(seed)
    experts = torch.rand(n, e).topk(k).indices
    weights = torch.rand(n, k) + 0.1
    x, w13, w2 = torch.randn(n, d) * scale, torch.randn(e, 2 * f, d) * 0.5, torch.randn(e, d, f) * 0.3
    return x.to(dtype), experts, weights, w13.to(dtype), w2.to(dtype)


def leaves(x, experts, weights, w13, w2, dtype=None):
    copies = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, weights, w13, w2)]
    return copies[0], experts, *copies[1:]


def oracle(x, experts, weights, w13, w2, limit):
    """One token, one slot at a time."""
    f = w2.shape[2]
    out = []
    for n in range(len(x)):
        total = torch.zeros_like(x[n])
        for e, weight in zip(experts[n].tolist(), weights[n]):
            h = w13[e] @ x[n]
            g, u = h[:f], h[f:]
            if limit is not None:
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
            total = total + w2[e] @ (F.silu(g) * u * weight)
        out.append(total)
    return torch.stack(out) if out else x.new_zeros(x.shape)


def results(run, args, limit, cotangent):
    out = run(*args, limit=limit)
    out.backward(cotangent.to(out.dtype))
    x, _, weights, w13, w2 = args
    return [out.detach(), x.grad, weights.grad, w13.grad, w2.grad]


def check(args, limit, tolerance=2e-6):
    cotangent = torch.randn(args[0].shape, dtype=torch.float64)
    got = results(moe_experts, leaves(*args), limit, cotangent)
    want = results(oracle, leaves(*args, dtype=torch.float64), limit, cotangent)
    for name, a, b in zip(NAMES, got, want):
        relative_rms(name, a, b, tolerance)
    return got


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_expert_is_added_before_rounding(n, learns, dtype):
    x, experts, weights, w13, w2 = (
        t.requires_grad_(learns and t.is_floating_point()) for t in case(n, 2, 5, dtype=dtype)
    )
    shared = torch.randn(x.shape).to(dtype).requires_grad_(learns)
    out = moe_experts(x, experts, weights, w13, w2, limit=10.0, shared=shared)
    alone = moe_experts(x.float(), experts, weights, w13.float(), w2.float(), limit=10.0)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    relative_rms("out", out.detach(), alone.detach() + shared.detach().float(), tolerance)
    if learns:
        cotangent = torch.randn(x.shape).to(dtype)
        (dshared,) = torch.autograd.grad(out, shared, cotangent)
        assert torch.equal(dshared, cotangent)


def test_the_sum_with_the_shared_expert_is_rounded_once():
    """2^-8 + 2^-17 is more than half of bfloat16's step at 1; rounded on its own, it would be half, and lost."""
    x, w13 = torch.ones(5, 1).bfloat16(), torch.tensor([[20.0], [1.0]]).bfloat16().expand(2, 2, 1)
    weights, w2 = torch.tensor([2**-8, 2**-17]).expand(5, 2) / 20, torch.ones(2, 1, 1).bfloat16()
    for n in (1, 5):
        ids = torch.tensor([[0, 1]]).expand(n, 2)
        out = moe_experts(x[:n], ids, weights[:n], w13, w2, limit=None, shared=torch.ones(n, 1).bfloat16())
        assert (out == 1 + 2**-7).all()


def test_a_shared_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shared has shape \(3, 20\): expected \(4, 20\)"):
        moe_experts(*case(4, 2, 5), limit=10.0, shared=torch.zeros(3, 20))


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 1), (1, 4, 16), (7, 2, 5), (33, 6, 160), (13, 5, 5), (300, 3, 7)])
@pytest.mark.parametrize("limit", [10.0, None])
def test_output_and_gradients(n, k, e, limit):
    check(case(n, k, e), limit)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_blocks_of_any_size_agree(rows, monkeypatch):
    monkeypatch.setattr(eager, "ROWS", rows)
    check(case(40, 3, 6), 10.0)


def test_blocks_hold_every_row_once_and_are_small(monkeypatch):
    monkeypatch.setattr(eager, "ROWS", 10)
    counts = [3, 0, 4, 5, 31, 0, 1, 10, 2]
    blocks = list(eager._blocks(counts))
    assert [b.rows.start for b in blocks] == [0, *(b.rows.stop for b in blocks[:-1])] and blocks[-1].rows.stop == 56
    assert all(sum(b.sizes) == b.rows.stop - b.rows.start <= 10 for b in blocks)
    seen = [0] * len(counts)
    for expert, size in ((e, n) for b in blocks for e, n in zip(b.experts, b.sizes)):
        seen[expert] += size
    assert seen == counts and list(eager._blocks([0, 0])) == []


def test_one_expert_takes_all(monkeypatch):
    monkeypatch.setattr(eager, "ROWS", 16)
    x, _, weights, w13, w2 = case(50, 1, 4)
    got = check((x, torch.full((50, 1), 2), weights, w13, w2), 10.0)
    for name, grad in zip(NAMES[3:], got[3:]):
        assert not grad[[0, 1, 3]].any(), f"{name} of an expert without tokens"
        assert grad[2].any()


def test_the_clamp_is_reached():
    args = case(60, 2, 4, scale=4.0)
    h = torch.einsum("nd,efd->nef", args[0], args[3])
    assert (h[..., :12] > 3.0).float().mean() > 0.05 and (h[..., 12:].abs() > 3.0).float().mean() > 0.05
    check(args, 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_swiglu_at_and_around_the_limit(dtype):
    edge = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, math.nextafter(2.0, 3.0), 2.5, 9.0], dtype=dtype)
    h = torch.cartesian_prod(edge, edge).T.reshape(1, -1).repeat(2, 1).requires_grad_()  # every pair of gate and up
    weight = torch.tensor([0.7, -1.5], requires_grad=True)
    grad = torch.randn(2, h.shape[1] // 2, dtype=dtype)
    swiglu(h, 2.0, weight).backward(grad)
    h64, weight64 = h.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    g, u = gate_up(h64, 2.0)
    want = F.silu(g) * u * weight64[:, None]
    want.backward(grad.double())
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
    relative_rms("swiglu", swiglu(h, 2.0, weight).detach(), want.detach(), tolerance)
    relative_rms("dh", h.grad, h64.grad, tolerance)
    relative_rms("dweight", weight.grad, weight64.grad, tolerance)
    assert torch.equal(h.grad == 0, h64.grad == 0), "a slope at the bounds, none outside"


@pytest.mark.parametrize("limit", [1.0, None])
def test_gradcheck(limit):
    x, experts, weights, w13, w2 = leaves(*case(6, 2, 4, d=3, f=2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: moe_experts(t[0], experts, *t[1:], limit=limit), (x, weights, w13, w2))
    h = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: swiglu(t, limit), (h,))


@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(needed):
    args = case(9, 2, 4)
    everything = results(moe_experts, leaves(*args), 10.0, torch.ones(9, 20))
    tensors = [t.detach().clone() for t in (args[0], *args[2:])]
    tensors[needed].requires_grad_()
    moe_experts(tensors[0], args[1], *tensors[1:], limit=10.0).sum().backward()
    assert torch.equal(tensors[needed].grad, everything[needed + 1]), NAMES[needed + 1]


def test_swiglu_of_any_leading_shape(monkeypatch):
    monkeypatch.setattr(eager, "ROWS", 3)
    h, weight = torch.randn(8, 2, 5).permute(1, 2, 0).requires_grad_(), torch.rand(2, 5, requires_grad=True)
    out = swiglu(h, 1.0, weight)
    g, u = h.double().chunk(2, -1)
    want = F.silu(g.clamp(max=1)) * u.clamp(-1, 1) * weight.double()[..., None]
    relative_rms("swiglu", out, want)
    got = torch.autograd.grad(out.square().sum(), (h, weight))
    for name, a, b in zip(("dh", "dweight"), got, torch.autograd.grad(want.square().sum(), (h, weight))):
        relative_rms(name, a, b)
    assert swiglu(h[0, 0], 1.0).shape == (4,)


def test_no_tokens():
    args = leaves(*case(0, 2, 4))
    got = results(moe_experts, args, 10.0, torch.zeros(0, 20))
    assert got[0].shape == (0, 20) and got[1].shape == (0, 20) and got[2].shape == (0, 2)
    assert got[3].shape == args[3].shape and not got[3].any() and not got[4].any()
    assert swiglu(torch.zeros(0, 6), 10.0).shape == (0, 3)


def test_the_weight_multiplies_before_w2():
    """In bf16 the order shows: the result is the emulation of one order bit for bit, and not that of the other."""
    x, experts, weights, w13, w2 = case(64, 2, 4, d=32, f=16, dtype=torch.bfloat16)
    got = moe_experts(x, experts, weights, w13, w2, limit=10.0).float()

    def emulate(weight_first):
        out = torch.zeros(64, 32)
        for n in range(64):
            for e, weight in zip(experts[n].tolist(), weights[n]):
                g, u = (x[n].float() @ w13[e].float().T).bfloat16().float().chunk(2)
                a = F.silu(g.clamp(max=10)) * u.clamp(-10, 10)
                a = (a * weight).bfloat16().float() if weight_first else a.bfloat16().float()
                y = (a @ w2[e].float().T).bfloat16().float()
                out[n] += y if weight_first else y * weight
        return out.bfloat16().float()

    before, after = (got - emulate(True)).norm(), (got - emulate(False)).norm()
    assert before < 0.2 * after, (before, after)
    assert (got == emulate(True)).float().mean() > 0.97


@pytest.mark.parametrize("rows", [1024, 8])
def test_bf16_accumulates_in_fp32(rows, monkeypatch):
    monkeypatch.setattr(eager, "ROWS", rows)
    args = case(200, 6, 8, d=32, f=16, dtype=torch.bfloat16)
    got = check(args, 10.0, tolerance=8e-3)
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] + [torch.bfloat16] * 2


def test_autocast_casts_like_a_linear_layer():
    args = leaves(*case(30, 2, 4))
    half = [t if t.dtype == torch.int64 else t.detach().bfloat16() for t in args]
    want = moe_experts(half[0], half[1], args[2].detach(), half[3], half[4], limit=10.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(moe_experts, args, 10.0, torch.ones(30, 20))
        twice = moe_experts(*(t if t.dtype == torch.int64 else t.detach().double() for t in args), limit=10.0)
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0], want)
    assert all(t.dtype == torch.float32 and t.any() for t in got[1:])
    assert twice.dtype == torch.float64


def test_strided_inputs():
    args = case(30, 2, 4)
    want = results(moe_experts, leaves(*args), 10.0, torch.ones(30, 20))
    x = torch.stack([args[0], torch.full_like(args[0], math.nan)], -1)[..., 0]  # every second value
    w13, w2 = args[3].mT.contiguous().mT, args[4].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = [x, args[1], args[2].T.contiguous().T, w13, w2]
    assert not any(t.is_contiguous() for t in (x, strided[2], w13, w2))
    got = results(
        moe_experts,
        [t.requires_grad_() if t.is_floating_point() else t for t in strided],
        10.0,
        torch.ones(()).expand(30, 20),
    )
    for name, a, b in zip(NAMES, got, want):
        relative_rms(name, a, b)


def test_a_nan_token_stays_alone():
    x, experts, weights, w13, w2 = case(40, 2, 8)
    clean = results(moe_experts, leaves(x, experts, weights, w13, w2), 10.0, torch.ones(40, 20))
    x[7] = math.nan
    dirty = results(moe_experts, leaves(x, experts, weights, w13, w2), 10.0, torch.ones(40, 20))
    others = [n for n in range(40) if n != 7]
    for name, a, b in zip(NAMES[:3], dirty, clean):
        assert torch.equal(a[others], b[others]), name
        assert a[7].isnan().all(), name
    elsewhere = [e for e in range(8) if e not in experts[7]]
    assert torch.equal(dirty[3][elsewhere], clean[3][elsewhere]) and torch.equal(
        dirty[4][elsewhere], clean[4][elsewhere]
    )


def test_permuted_tokens_permute_the_outputs_bitwise():
    """With sums that are exact in any order (integer inputs, expert width 1), so that the matrix library has no say."""
    torch.manual_seed(0)
    n, k, e, d = 700, 3, 5, 16
    x, w13 = torch.randint(-2, 3, (n, d)).float(), torch.randint(-1, 2, (e, 2, d)).float()
    w2, experts, weights = torch.randn(e, d, 1), torch.rand(n, e).topk(k).indices, torch.rand(n, k)
    out, order = moe_experts(x, experts, weights, w13, w2, limit=10.0), torch.randperm(n)
    assert torch.equal(moe_experts(x[order], experts[order], weights[order], w13, w2, limit=10.0), out[order])
    swapped = moe_experts(x, experts.flip(1), weights.flip(1), w13, w2, limit=10.0)
    relative_rms("slots in another order", swapped, out)


def test_same_bits_on_each_run():
    args = case(500, 4, 16)
    first = results(moe_experts, leaves(*args), 10.0, torch.ones(500, 20))
    second = results(moe_experts, leaves(*args), 10.0, torch.ones(500, 20))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_backward_keeps_only_inputs_and_pre_activations():
    args = leaves(*case(64, 4, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        moe_experts(*args, limit=10.0)
    x, _, weights, w13, w2 = args
    assert sum(kept) == x.numel() + 64 * 4 * 24 + weights.numel() + w13.numel() + w2.numel()


def test_refusals_name_the_argument():
    x, experts, weights, w13, w2 = case(5, 2, 4)
    with pytest.raises(IndexError, match=r"experts contains 4: allowed is 0\.\.3"):
        moe_experts(x, torch.full_like(experts, 4), weights, w13, w2, limit=1.0)
    for name, bad in {
        "x has shape": (x[0], experts, weights, w13, w2),
        "experts is": (x, experts.int(), weights, w13, w2),
        "weights has shape": (x, experts, weights[:, :1], w13, w2),
        "w13 has shape": (x, experts, weights, w13[..., 1:], w2),
        "w2 has shape": (x, experts, weights, w13, w2[..., 1:]),
        "they must agree": (x.bfloat16(), experts, weights, w13, w2),
    }.items():
        with pytest.raises(ValueError, match=name):
            moe_experts(*bad, limit=1.0)
    with pytest.raises(ValueError, match=r"h has shape \(2, 3\)"):
        swiglu(torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\): expected \(2,\)"):
        swiglu(torch.zeros(2, 4), 1.0, torch.zeros(3))
