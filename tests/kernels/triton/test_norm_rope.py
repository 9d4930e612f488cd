"""The kernels of RMSNorm and RoPE against float64: every width and shape, gradients, the two fused, operators.

b batch · t tokens · h heads · d channels, the last `dim` of them rotated
"""

import inspect
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import norm_rope, rms_norm, rope, rope_rotation
from abyssal.kernels.norm_rope import eager
from abyssal.kernels.norm_rope import triton as kernels

EPS = 0.1  # large enough to matter


@pytest.fixture(autouse=True)
def several_blocks(emulated, monkeypatch):
    """Programs so few and small that rows need several."""
    torch.manual_seed(0)
    if emulated:
        monkeypatch.setattr(kernels.launch, "VALUES", 64)
        monkeypatch.setattr(kernels.launch, "PROGRAMS", 3)


def oracle(x, weight=None, angle=None, *, norm=True, inverse=False):
    """In float64; angle [b|1, t, dim / 2] in radians. Pairs are turned by a matrix of their own."""
    if norm:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        x = x if weight is None else x * weight
    if angle is None:
        return x
    dim, angle = 2 * angle.shape[2], -angle if inverse else angle
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    turn = turn.expand(len(x), *turn.shape[1:])
    flat = x.flatten(2, -2) if x.ndim > 3 else x.unsqueeze(2)
    pairs = flat[..., x.shape[-1] - dim :].unflatten(-1, (-1, 2))
    turned = torch.einsum("btjyz,bthjz->bthjy", turn, pairs).flatten(-2)
    return torch.cat([flat[..., : x.shape[-1] - dim], turned], -1).view(x.shape)


def results(run, *leaves, dtype=None):
    """The value and the gradients of all leaves."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    out = run(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(got, want):
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm().clamp_min(0.1))  # a lone channel's gradient cancels


def angles(device, b, t, dim):
    """Positions up to a million, float32 as the model's, and what they are in float64."""
    positions = torch.randint(1 << 20, (b, t), generator=torch.Generator().manual_seed(b))
    frequencies = 0.9 ** torch.arange(dim // 2)
    return rope_rotation(positions, frequencies).to(device), (positions[..., None].float() * frequencies).double()


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 17), (5, 64), (3, 100), (2, 1, 3, 48), (0, 5), (7,)])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_and_its_gradients(device, shape, weighted):
    x, weight = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    leaves = [x, weight] if weighted else [x]
    got = results(lambda x, w=None: rms_norm(x, w, EPS), *leaves)
    want = results(lambda x, w=None: oracle(x, w), *(y.cpu() for y in leaves), dtype=torch.float64)
    plain = results(lambda x, w=None: eager.rms_norm(x, w, EPS), *leaves)
    for a, b, c in zip(got, want, plain):
        assert error(a, b) < 1e-6 and error(a, c) < 1e-6


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 9, 12), (3, 2, 2, 2, 11), (2, 4, 1, 7), (2, 0, 3, 8), (0, 3, 8)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
def test_rotation_and_its_gradient(device, shape, shared, inverse):
    rotation, angle = angles(device, 1 if shared else shape[0], shape[1], 6)
    x = torch.randn(shape, device=device)
    got = results(lambda x: rope(x, rotation, inverse=inverse), x)
    want = results(lambda x: oracle(x, angle=angle, norm=False, inverse=inverse), x.cpu(), dtype=torch.float64)
    for a, b in zip(got, want):
        assert error(a, b) < 1e-6
    assert torch.equal(got[0][..., :-6], x[..., :-6])
    lazy = rope(x, rotation.conj(), inverse=inverse)
    assert torch.equal(lazy, rope(x, rotation, inverse=not inverse))


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 9, 12), (2, 4, 2, 7), (3, 2, 4)])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_and_rotation_in_one(device, shape, weighted):
    rotation, angle = angles(device, shape[0], shape[1], 4)
    leaves = [torch.randn(shape, device=device), torch.randn(shape[-1], device=device)][: 2 if weighted else 1]
    got = results(lambda x, w=None: norm_rope(x, w, EPS, rotation), *leaves)
    want = results(lambda x, w=None: oracle(x, w, angle), *(y.cpu() for y in leaves), dtype=torch.float64)
    both = results(lambda x, w=None: rope(rms_norm(x, w, EPS), rotation), *leaves)
    for a, b, c in zip(got, want, both):
        assert error(a, b) < 1e-6 and error(a, c) < 1e-6


def test_wide_rows(device):
    x, weight = torch.randn(3, 5000, device=device), torch.randn(5000, device=device)
    got = results(lambda x, w: rms_norm(x, w, EPS), x, weight)
    want = results(lambda x, w: oracle(x, w), x.cpu(), weight.cpu(), dtype=torch.float64)
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(device, dtype):
    rotation, _ = angles(device, 2, 5, 4)
    x, weight = torch.randn(2, 5, 3, 16, device=device).to(dtype), torch.randn(16, device=device)
    for run in (
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: norm_rope(x, w, EPS, rotation),
        lambda x, w: rope(x, rotation) * w.to(x.dtype),
    ):
        got, exact = results(run, x, weight), results(run, x, weight, dtype=torch.float32)
        assert [y.dtype for y in got] == [dtype, dtype, torch.float32]
        for a, b in zip(got[:2], exact):
            assert error(a, b) < 2 * torch.finfo(dtype).eps
    half = results(lambda x, w: rms_norm(x, w, EPS), x.float(), weight.to(dtype))
    assert [y.dtype for y in half] == [torch.float32, torch.float32, dtype]
    assert torch.equal(rms_norm(x, None, EPS), rms_norm(x.float(), None, EPS).to(dtype))


def test_rows_stay_alone(device):
    rotation, _ = angles(device, 1, 12, 4)
    x, weight = torch.randn(2, 12, 3, 16, device=device), torch.randn(16, device=device)
    run = lambda x: norm_rope(x, weight, EPS, rotation[:, : x.shape[1]])  # noqa: E731
    full = results(run, x)
    assert all(torch.equal(a, b) for a, b in zip(full, results(run, x)))
    assert torch.equal(full[0][:, :7], run(x[:, :7])) and torch.equal(full[0].flip(0), run(x.flip(0)))
    spoilt = x.clone()
    spoilt[0, 3, 1, 2], spoilt[1, 5, 2, 15] = math.nan, math.inf
    for a, b in zip(full, results(run, spoilt)):
        bad = torch.zeros_like(x, dtype=torch.bool)
        bad[0, 3, 1] = bad[1, 5, 2] = True
        assert torch.equal(a[~bad], b[~bad]) and b[0, 3, 1].isnan().all()
    assert not rms_norm(torch.zeros(3, 5, device=device), None, EPS).any()


def test_strided_inputs(device):
    rotation, _ = angles(device, 2, 5, 4)
    x, weight = torch.randn(2, 5, 3, 16, device=device), torch.randn(32, device=device)
    run = lambda x: norm_rope(x, weight[::2], EPS, rotation.mT.contiguous().mT).cos()  # noqa: E731
    wide = torch.cat([x, x], -1)[..., :16]
    for strided in (wide, x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert all(torch.equal(a, b) for a, b in zip(results(run, x), results(run, strided)))
    leaf = x.clone().requires_grad_()
    rope(leaf, rotation).sum().backward()  # an expanded gradient
    assert error(leaf.grad, rope(torch.ones_like(x), rotation, inverse=True)) < 1e-6


# as torch sees it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def layer(x, weight, rotation):
    q = norm_rope(x * 1.5, None, EPS, rotation) + norm_rope(x.sin(), weight, EPS, rotation)
    return rope(rms_norm(q, weight, EPS), rotation, inverse=True).cos().sum()


@pytest.fixture
def leaves(device):
    rotation, _ = angles(device, 1, 4, 4)
    x, weight = torch.randn(2, 4, 3, 9, device=device), torch.randn(9, device=device)
    return x.requires_grad_(), weight.requires_grad_(), rotation


@pytest.mark.parametrize("op", ["norm", "weighted", "fused", "rope"])
def test_opcheck(real_memory, leaves, op):
    x, weight, rotation = leaves
    turn = kernels._angles(rotation)
    if op == "rope":
        torch.library.opcheck(kernels._rope, (x, turn, True))
    else:
        arguments = {"norm": (None, None), "weighted": (weight, None), "fused": (weight, turn)}[op]
        torch.library.opcheck(kernels._norm, (x, *arguments, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, leaves, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*leaves), leaves[:2]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(leaves, reentrant):
    want = torch.autograd.grad(layer(*leaves), leaves[:2])
    checkpoint(layer, *leaves, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, leaves))


def test_some_gradients_alone_and_twice(leaves):
    x, weight, rotation = leaves
    want = torch.autograd.grad(norm_rope(x, weight, EPS, rotation).sum(), (x, weight))
    for i, some in enumerate(((x, weight.detach()), (x.detach(), weight))):
        loss = norm_rope(*some, EPS, rotation).sum()
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss, some[i], retain_graph=True)[0], want[i])
    with torch.no_grad():
        assert not norm_rope(x, weight, EPS, rotation).requires_grad


def test_autocast_leaves_the_norm_in_float32(device, leaves):
    x, weight, rotation = leaves
    with torch.autocast(device, torch.bfloat16):
        out = norm_rope(x, weight, EPS, rotation)
    assert out.dtype == torch.float32 and torch.equal(out, norm_rope(x, weight, EPS, rotation))


def test_twins_have_the_signature_of_the_reference():
    for name in kernels.__all__:
        assert inspect.signature(getattr(eager, name)) == inspect.signature(getattr(kernels, name)), name
