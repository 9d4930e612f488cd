"""The experts' kernels against the reference and a float64 oracle: every routing, the clamp, rounding, what leaks."""

import math

import moe_cases
import pytest
import torch
import torch.nn.functional as F
from moe_cases import NAMES, error, gate_up, make, oracle, results

from abyssal.kernels import moe_experts, swiglu
from abyssal.kernels.moe_experts import eager
from abyssal.kernels.moe_experts import triton as kernels
from abyssal.kernels.moe_experts.triton import launch


def check(arguments, limit, slack=3.0):
    """Each result is as near to float64 as the reference is, within a factor, and of its dtype."""
    dout = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(arguments[0])
    got = results(moe_experts, arguments, limit, dout)
    plain = results(eager.moe_experts, arguments, limit, dout)
    exact = results(oracle, arguments, limit, dout.double(), dtype=torch.float64)
    for name, a, b, c in zip(NAMES, got, plain, exact):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert error(a, c) <= slack * error(b, c) + 2e-7, f"{name}: {error(a, c):.2e}, the reference {error(b, c):.2e}"
    return got


@pytest.mark.parametrize(
    ("n", "k", "e", "d", "f", "limit"),
    [
        pytest.param(29, 3, 5, 40, 24, 1.0, id="blocks"),
        pytest.param(9, 2, 3, 40, 24, None, id="no-clamp"),
        pytest.param(1, 4, 16, 20, 12, 1.0, id="one-token"),
        pytest.param(6, 5, 5, 18, 7, 1.0, id="all-experts"),
        pytest.param(4, 6, 160, 16, 8, 1.0, id="160-experts"),
    ],
)
def test_output_and_gradients(small_blocks, device, n, k, e, d, f, limit):
    check(make(n, k, e, d, f, device=device), limit)


def test_more_rows_than_one_program_sums_shares_of(small_blocks, emulated, device):
    if emulated:
        small_blocks(rows=128)
    check(make(87, 3, 3, 16, 8, device=device), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(small_blocks, device, dtype):
    check(make(17, 3, 4, dtype=dtype, device=device), 1.0, slack=1.5)


@pytest.mark.parametrize("used", [[2], [1, 3]], ids=["one-expert", "the-same-two"])
def test_experts_without_tokens(small_blocks, device, used):
    x, _, weights, w13, w2 = make(37, len(used), 5, d=16, f=8, device=device)
    got = check((x, torch.tensor(used, device=device).expand(37, -1), weights, w13, w2), 1.0)
    idle = [e for e in range(5) if e not in used]
    assert not got[3][idle].any() and not got[4][idle].any() and got[3][used].flatten(1).any(1).all()


def test_no_tokens(small_blocks, device):
    arguments = make(0, 2, 4, device=device)
    got = results(moe_experts, arguments, 1.0, torch.zeros(0, 40, device=device))
    assert got[0].shape == (0, 40) and got[1].shape == (0, 40) and got[2].shape == (0, 2)
    assert not got[3].any() and not got[4].any()
    assert swiglu(torch.zeros(0, 6, device=device), 1.0).shape == (0, 3)


def test_the_clamp_is_reached(small_blocks, device):
    arguments = make(24, 2, 4, d=16, f=24, scale=3.0, device=device)
    h = torch.einsum("nd,efd->nef", arguments[0], arguments[3])
    assert (h[..., :24] > 2).float().mean() > 0.05 and (h[..., 24:].abs() > 2).float().mean() > 0.05
    check(arguments, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [2.0, None])
def test_swiglu_at_and_around_the_limit(device, dtype, limit):
    edge = torch.tensor([-1e4, -9.0, -2.0, -1.0, 0.0, 1.0, 2.0, math.nextafter(2.0, 3.0), 2.5, 9.0, 1e4], device=device)
    pairs = torch.cartesian_prod(edge, edge).T.reshape(1, -1).repeat(3, 1).to(dtype)
    weight = torch.tensor([0.7, -1.5, 0.0], device=device)
    grad = torch.randn(3, pairs.shape[1] // 2, device=device).to(dtype)
    for w in (weight, None):
        h, scale = pairs.clone().requires_grad_(), None if w is None else w.clone().requires_grad_()
        out = swiglu(h, limit, scale)
        out.backward(grad)
        h64, scale64 = pairs.double().requires_grad_(), None if w is None else w.double().requires_grad_()
        g, u = gate_up(h64, limit)
        want = F.silu(g) * u * (1 if w is None else scale64[:, None])
        want.backward(grad.double())
        tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-6
        assert error(out, want) < tolerance and error(h.grad, h64.grad) < tolerance
        assert w is None or error(scale.grad, scale64.grad) < tolerance
        assert limit is None or torch.equal(h.grad == 0, h64.grad == 0), "a slope at the bounds, none outside"


def test_swiglu_keeps_nan(device):
    h = torch.tensor([[math.nan, 1.0], [1.0, math.nan], [1.0, 1.0]], device=device).requires_grad_()
    out = swiglu(h, 2.0)
    out.sum().backward()
    assert out[:, 0].isnan().tolist() == [True, True, False]
    assert h.grad.isnan().any(1).tolist() == [True, True, False]


@pytest.mark.parametrize("shape", [(40, 2 * 60), (3, 2 * 1030)], ids=["many-rows", "wide-rows"])
def test_swiglu_by_several_programs(device, shape):
    h = torch.randn(shape, device=device).requires_grad_()
    weight = torch.rand(len(h), device=device, requires_grad=True)
    got, want = (swiglu(h, 1.0, weight, backend=b) for b in ("triton", "eager"))
    assert error(got, want) < 1e-6
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (h, weight)) for y in (got, want))):
        assert error(a, b) < 1e-6


def test_swiglu_of_any_leading_shape(device):
    h = torch.randn(10, 2, 5, device=device).permute(1, 2, 0).requires_grad_()
    weight = torch.rand(2, 5, device=device, requires_grad=True)
    got, want = (swiglu(h, 1.0, weight, backend=b) for b in ("triton", "eager"))
    assert got.shape == (2, 5, 5) and error(got, want) < 1e-6
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (h, weight)) for y in (got, want))):
        assert error(a, b) < 1e-6
    assert swiglu(h[0, 0], 1.0).shape == (5,)


def test_the_weight_multiplies_before_w2(small_blocks, device):
    """In bf16 the order shows: the result is the emulation of one order, and not that of the other."""
    x, experts, weights, w13, w2 = make(24, 2, 4, d=32, f=16, dtype=torch.bfloat16, device=device)
    got = moe_experts(x, experts, weights, w13, w2, limit=10.0).float()

    def emulate(weight_first):
        g, u = torch.einsum("nd,nkfd->nkf", x.float(), w13[experts].float()).bfloat16().float().chunk(2, -1)
        a, w = F.silu(g.clamp(max=10)) * u.clamp(-10, 10), weights[..., None]
        a = (a * w if weight_first else a).bfloat16().float()
        y = torch.einsum("nkf,nkdf->nkd", a, w2[experts].float()).bfloat16().float()
        return (y if weight_first else y * w).sum(1).bfloat16().float()

    assert (got - emulate(True)).norm() < 0.2 * (got - emulate(False)).norm()


def test_strided_inputs(small_blocks, device):
    x, experts, weights, w13, w2 = make(20, 2, 4, d=16, f=8, device=device)
    dout = torch.ones(20, 16, device=device)
    want = results(moe_experts, (x, experts, weights, w13, w2), 1.0, dout)
    strided = [
        torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
        experts.T.contiguous().T,
        torch.cat([torch.full_like(weights[:1], math.nan), weights])[1:].T.contiguous().T,
        w13.mT.contiguous().mT,
        w2.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ]
    assert not any(t.is_contiguous() for t in strided)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in strided]
    out = moe_experts(*leaves, limit=1.0)
    out.sum().backward()  # an expanded gradient
    for name, a, b in zip(NAMES, (out, *(t.grad for t in (leaves[0], *leaves[2:]))), want):
        assert torch.equal(a, b), name


def test_a_nan_token_stays_alone(small_blocks, device):
    x, experts, weights, w13, w2 = make(24, 2, 8, d=16, f=8, device=device)
    dout = torch.ones(24, 16, device=device)
    clean = results(moe_experts, (x, experts, weights, w13, w2), 1.0, dout)
    x[7] = math.nan
    dirty = results(moe_experts, (x, experts, weights, w13, w2), 1.0, dout)
    others = [n for n in range(24) if n != 7]
    for name, a, b in zip(NAMES[:3], dirty, clean):
        assert torch.equal(a[others], b[others]), name
        assert a[7].isnan().all(), name
    elsewhere = [e for e in range(8) if e not in experts[7]]
    assert torch.equal(dirty[3][elsewhere], clean[3][elsewhere])
    assert torch.equal(dirty[4][elsewhere], clean[4][elsewhere])


def test_nan_weights_of_other_experts_stay_out(small_blocks, device):
    """The widths fit no block: what lies behind an expert's last row must not be read as its own."""
    x, experts, weights, w13, w2 = make(9, 2, 5, d=18, f=7, device=device)
    experts = experts // 2 * 2  # 0, 2, 4
    dout = torch.ones(9, 18, device=device)
    clean = results(moe_experts, (x, experts, weights, w13, w2), 1.0, dout)
    w13[1::2], w2[1::2] = math.nan, math.nan
    for name, a, b in zip(NAMES, results(moe_experts, (x, experts, weights, w13, w2), 1.0, dout), clean):
        assert torch.equal(a, b), name


def test_an_unknown_expert_gives_nan(small_blocks, device):
    x, experts, weights, w13, w2 = make(9, 2, 4, d=16, f=8, device=device)
    clean = kernels.moe_experts(x, experts, weights, w13, w2, limit=1.0)
    experts[2, 1], experts[5, 0] = 4, -1
    out = kernels.moe_experts(x, experts, weights, w13, w2, limit=1.0)
    known = [n for n in range(9) if n not in (2, 5)]
    assert out[[2, 5]].isnan().all() and torch.equal(out[known], clean[known])


def test_a_token_has_the_same_bits_in_any_batch(small_blocks, device):
    """Integers keep the sums exact in any order, so that on a CPU the matrix library has no say."""
    g = torch.Generator().manual_seed(0)
    x, experts, weights, w13, w2 = make(40, 2, 3, d=16, f=8, device=device)
    if device == "cpu":
        x, w13, w2 = (torch.randint(-2, 3, t.shape, generator=g).float() for t in (x, w13, w2))
        weights = torch.randint(1, 4, weights.shape, generator=g) / 4
    dout = torch.randint(-2, 3, x.shape, generator=g).to(x)
    full = results(moe_experts, (x, experts, weights, w13, w2), 2.0, dout)
    again = results(moe_experts, (x, experts, weights, w13, w2), 2.0, dout)
    assert all(torch.equal(a, b) for a, b in zip(full, again)), "run to run"
    order = torch.randperm(40, generator=g).to(device)
    mixed = results(moe_experts, (x[order], experts[order], weights[order], w13, w2), 2.0, dout[order])
    few = results(moe_experts, (x[:7], experts[:7], weights[:7], w13, w2), 2.0, dout[:7])
    for name, a, b, c in zip(NAMES[:3], full, mixed, few):
        assert torch.equal(a[order], b), f"{name} of permuted tokens"
        assert torch.equal(a[:7], c), f"{name} of a prefix"


def test_slots_are_summed_in_order(device):
    """1e8 + 1 - 1e8 is 0 in float32 in this order, and 1 in others."""
    rows = torch.tensor([1.0, 1e8, -1e8], device=device)[:, None].expand(3, 8).contiguous()
    inverse = torch.tensor([[1, 0, 2], [1, 2, 0], [2, 1, 0]], device=device)
    assert launch._combine(rows, inverse)[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_slots_are_summed_in_float32(device):
    """1 and eight times 2^-9: each alone is lost in bfloat16, their sum is not."""
    rows = torch.tensor([1.0, *[2**-9] * 8], device=device).bfloat16()[:, None].expand(9, 8).contiguous()
    assert launch._combine(rows, torch.arange(9, device=device)[None])[0, 0] == 1 + 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_expert_is_added_before_rounding(small_blocks, device, dtype):
    arguments = make(9, 2, 3, d=20, f=8, dtype=dtype, device=device)
    shared = torch.randn(20, 9, generator=torch.Generator().manual_seed(2)).T.to(device, dtype).requires_grad_()
    got, want = (moe_experts(*arguments, limit=1.0, shared=shared, backend=b) for b in ("triton", "eager"))
    assert error(got, want) < (1e-6 if dtype == torch.float32 else 4e-3)
    grad = torch.randn(9, 20, device=device).to(dtype)
    assert torch.equal(torch.autograd.grad(got, shared, grad)[0], grad)
    rows = torch.tensor([[2**-8], [2**-17]], device=device).bfloat16().repeat(1, 8)
    one = torch.ones(1, 8, device=device).bfloat16()
    assert (launch._combine(rows, torch.tensor([[0, 1]], device=device), one) == 1 + 2**-7).all()


@pytest.mark.parametrize("shape", [(40, 24), (18, 7)], ids=["aligned", "not-aligned"])
def test_descriptors_change_nothing(small_blocks, device, emulated, shape):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need Hopper")
    arguments = make(20, 2, 4, *shape, dtype=torch.bfloat16, device=device)
    dout = torch.ones_like(arguments[0])
    small_blocks(tma=False, columns=16 if emulated else 32)
    want = results(moe_experts, arguments, 1.0, dout)
    small_blocks(tma=True, columns=16 if emulated else 32)
    for name, a, b in zip(NAMES, results(moe_experts, arguments, 1.0, dout), want):
        assert torch.equal(a, b), name


def test_tiles_cover_every_row_once(device):
    for counts in ([3, 0, 17, 16, 0], [0, 0, 0], [40], [1] * 33):
        c = torch.tensor(counts, device=device)
        s = launch._schedule(c, sum(counts), 16)
        rows = []
        for expert, first in s.tiles.tolist():
            if expert >= 0:
                end = int(s.offsets[expert + 1])
                assert sum(counts[:expert]) <= first < end == sum(counts[: expert + 1])
                rows += range(first, min(first + 16, end))
        assert rows == list(range(sum(counts))) and s.offsets.tolist()[0] == 0


def test_weight_gradients_add_to_float32(small_blocks, device):
    x, experts, weights, w13, w2 = make(20, 2, 4, d=16, f=8, dtype=torch.bfloat16, device=device)
    rows = launch.Rows(*kernels.moe_permutation(experts, 4))
    out, h = launch.forward(x, weights, w13, w2, rows, 1.0, keep=True)
    new = launch.backward(out, x, h, weights, w13, w2, rows, 1.0)
    into = torch.ones_like(w13, dtype=torch.float32), torch.full_like(w2, -2.0, dtype=torch.float32)
    added = launch.backward(out, x, h, weights, w13, w2, rows, 1.0, into_w13=into[0], into_w2=into[1])
    assert added.w13 is into[0] and added.w2 is into[1]
    for name, a, b, start in (("dw13", into[0], new.w13, 1.0), ("dw2", into[1], new.w2, -2.0)):
        assert torch.equal((a - start).bfloat16(), b) or error(a - start, b) < 4e-3, name


@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(small_blocks, device, needed):
    arguments = make(9, 2, 4, d=16, f=8, device=device)
    everything = results(moe_experts, arguments, 1.0, torch.ones(9, 16, device=device))
    tensors = [t.detach().clone() for t in (arguments[0], *arguments[2:])]
    tensors[needed].requires_grad_()
    moe_experts(tensors[0], arguments[1], *tensors[1:], limit=1.0).sum().backward()
    assert torch.equal(tensors[needed].grad, everything[needed + 1]), NAMES[needed + 1]


def test_backward_keeps_inputs_pre_activations_and_routing(small_blocks, device):
    arguments = make(16, 4, 8, d=16, f=8, device=device)
    kept = []
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in arguments]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        moe_experts(*leaves, limit=1.0)
    routing = [(64,), (8,), (16, 4)]  # order, counts, inverse
    assert sorted(kept) == sorted([*(t.shape for t in leaves if t.requires_grad), (64, 16), *routing])


def test_without_gradients_no_pre_activations(small_blocks, device, monkeypatch):
    kept, forward = [], launch.forward
    monkeypatch.setattr(launch, "forward", lambda *a: kept.append(a[6]) or forward(*a))
    arguments = make(5, 2, 4, d=16, f=8, device=device)
    moe_experts(*arguments, limit=1.0)
    arguments[0].requires_grad_()
    with torch.no_grad():
        moe_experts(*arguments, limit=1.0)
    moe_experts(*arguments, limit=1.0)
    assert kept == [False, False, True]


def test_the_oracle_is_the_reference():
    arguments = [t.double() if t.is_floating_point() else t for t in make(12, 3, 6, scale=3.0)]
    dout = torch.randn(12, 40, dtype=torch.float64)
    for a, b in zip(results(oracle, arguments, 2.0, dout), results(eager.moe_experts, arguments, 2.0, dout)):
        assert moe_cases.error(a, b) < 1e-13
