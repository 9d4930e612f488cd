"""The loss kernel and its chunks against a float64 oracle and the reference: values, gradients, edges, operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import cross_entropy
from abyssal.kernels.cross_entropy import triton as op


@pytest.fixture(autouse=True)
def small_blocks(emulated, monkeypatch, backend):
    """A vocabulary of a few hundred takes several steps in the interpreter."""
    if emulated:
        monkeypatch.setattr(op, "next_power", lambda n, least=1: 64)


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)


def case(n=11, v=150, d=16, dtype=torch.float32, ignored=0.3, scale=2.0, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(n, d, generator=g) * scale, torch.randn(v, d, generator=g)
    targets = torch.randint(0, v, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < ignored, -100)
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets.to(device)


def oracle(x, weight, targets, z_loss=0.0, reduction="mean"):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x @ weight.T
    valid = targets != -100
    loss = F.cross_entropy(logits, targets, reduction="sum") + z_loss * logits.logsumexp(-1)[valid].square().sum()
    loss = loss / valid.sum() if reduction == "mean" else loss
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def results(x, weight, targets, upstream=1.0, **options):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    loss = cross_entropy(x, weight, targets, **options)
    (loss * upstream).backward()
    return loss.detach(), x.grad, weight.grad


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def check(x, weight, targets, slack=2.0, upstream=1.0, **options):
    """As near to float64 as the reference, within a factor, and of its dtypes."""
    got = results(x, weight, targets, upstream, **options)
    plain = results(x, weight, targets, upstream, backend="eager", **options)
    want = oracle(x, weight, targets, options.get("z_loss", 0.0), options.get("reduction", "mean"))
    for name, a, b, c, by in zip(("loss", "dx", "dweight"), got, plain, want, (1, upstream, upstream)):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        away, allowed = error(a, c * by), error(b, c * by)
        assert away <= slack * allowed + 4e-7, f"{name}: {away:.1e}, the reference {allowed:.1e}"
    return got


@pytest.mark.parametrize("chunk", [1, 4, 11, None])
@pytest.mark.parametrize(("z_loss", "reduction"), [(0.0, "mean"), (0.01, "sum")])
def test_value_and_gradients(device, chunk, z_loss, reduction):
    check(*case(device=device), chunk=chunk, z_loss=z_loss, reduction=reduction)


@pytest.mark.parametrize("v", [1, 63, 64, 65, 260])
def test_vocabularies_of_any_size(device, v):
    check(*case(n=5, v=v, device=device), z_loss=0.001, upstream=-2.5, chunk=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [150, 129])
def test_half_precisions(device, dtype, v):
    """The gradient of the logits, rounded, takes the place of the logits."""
    loss, _, dweight = check(*case(n=24, v=v, dtype=dtype, device=device), chunk=7, z_loss=1e-3)
    assert loss.dtype == torch.float32 and dweight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ignored_row_is_zero_whatever_its_logits(device, dtype):
    logits = torch.full((3, 150), math.nan, device=device)
    logits[1] = 0
    losses, grads = rows_of(logits, torch.tensor([-100, 149, -100], device=device), dtype)
    assert losses[[0, 2]].tolist() == [0, 0] and not grads[[0, 2]].any()
    assert abs(losses[1] - math.log(150)) < 1e-6 and grads[1, 149] < -0.9


def test_where_the_gradient_lies(device, monkeypatch):
    logits, targets = torch.randn(3, 150, device=device), torch.tensor([1, 2, 149], device=device)
    for architecture, dtype, same in (
        ("sm_90", torch.bfloat16, True),
        ("sm_90", torch.float32, True),
        ("hip", torch.float32, True),
        ("hip", torch.bfloat16, False),
    ):
        monkeypatch.setattr(op, "architecture", lambda name=architecture: name)
        place = logits.clone()
        grads = op.loss_rows(place, targets, logits.new_empty(3), -100, 0.0, dtype)
        assert (grads.data_ptr() == place.data_ptr()) == same and grads.dtype == dtype and grads.shape == (3, 150)
        assert error(grads, reference_rows(logits, targets)[1]) < 4e-3


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_mixed_precisions_are_multiplied_in_float32(device, dtypes):
    x, weight, targets = case(device=device)
    check(x.detach().to(dtypes[0]), weight.detach().to(dtypes[1]), targets, slack=1.05)


def test_the_weights_gradient_is_summed_in_float32(device):
    """Many small shares after a large one: each would be lost in bfloat16, chunk by chunk."""
    x = torch.full((33, 16), 2.0**-7, device=device).bfloat16()
    x[0] = 4.0
    targets = torch.zeros(33, dtype=torch.int64, device=device)
    weight = torch.zeros(2, 16, device=device).bfloat16()
    dweight = results(x, weight, targets, chunk=1, reduction="sum")[2]
    assert (dweight == torch.tensor([-2.125, 2.125], device=device)[:, None]).all()


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_a_valid_target_the_loss_and_its_gradients_are_zero(device, n, reduction):
    x, weight, _ = case(n=n, device=device)
    targets = torch.full((n,), -100, device=device)
    loss, dx, dweight = results(x, weight, targets, reduction=reduction)
    assert loss == 0 and dx.shape == (n, 16) and not dx.any() and not dweight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_ignored_tokens_hold_does_not_matter(device, dtype):
    x, weight, targets = case(ignored=0.5, dtype=dtype, device=device)
    want = results(x, weight, targets, chunk=4)
    with torch.no_grad():
        x[targets == -100] = math.nan
    for a, b in zip(results(x, weight, targets, chunk=4), want):
        assert torch.equal(a, b)


def test_another_ignore_index(device):
    x, weight, targets = case(device=device)
    want = cross_entropy(x, weight, targets)
    assert torch.equal(cross_entropy(x, weight, targets.masked_fill(targets == -100, 7000), ignore_index=7000), want)
    inside = targets.clamp(min=0)
    inside[3] = 0
    for a, b in zip(results(x, weight, inside, ignore_index=0), results(x, weight, inside.where(inside > 0, -100))):
        assert torch.equal(a, b)


def rows_of(logits, targets, dtype=torch.float32, z_loss=0.0):
    """Losses and gradients of given logits."""
    losses = logits.new_empty(len(logits))
    return losses, op.loss_rows(logits.clone(), targets, losses, -100, z_loss, dtype).clone()


def reference_rows(logits, targets, z_loss=0.0):
    """The reference's equations, in its order, in float64."""
    logits = logits.double()
    top = logits.amax(-1, keepdim=True)
    mass = (logits - top).exp().sum(-1, keepdim=True)
    norm = top + mass.log()
    losses = (mass.log() - (logits - top).gather(1, targets[:, None]) + z_loss * norm.square()).squeeze(1)
    return losses, (logits - top).exp() * ((1 + 2 * z_loss * norm) / mass) - F.one_hot(targets, logits.shape[1])


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_rows_with_large_and_missing_logits(device, z_loss):
    """+-1e4, -inf in places, in the first and in the last block, everywhere but at the target, and at it."""
    logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(1)).to(device)
    targets = torch.tensor([0, 5, 199, 70, 64, 3, 150, 9], device=device)
    logits[0] *= 1e4
    logits[1] -= 1e4
    logits[2, :100] = -math.inf
    logits[3, 128:] = -math.inf
    logits[4] = torch.where(torch.arange(200, device=device) == 64, 3.0, -math.inf)
    logits[5, 3] = -math.inf
    logits[6] = 1e4
    losses, grads = rows_of(logits, targets, z_loss=z_loss)
    want, dwant = reference_rows(logits, targets, z_loss)
    assert losses[5] == math.inf and want[5] == math.inf and not grads.isnan().any()
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads.double(), dwant, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(device, dtype):
    logits = torch.randn(6, 150, device=device)
    targets = torch.tensor([1, 2, 149, 4, 150, -1], device=device)
    clean = rows_of(logits, targets, dtype)
    logits[0, 77], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    losses, grads = rows_of(logits, targets, dtype)
    assert torch.equal(losses[3], clean[0][3]) and torch.equal(grads[3], clean[1][3])
    assert losses[:3].isnan().all() and grads[:3].isnan().any(1).all()
    assert losses[4:].isnan().all() and grads[4:].isnan().all(), "a target outside the vocabulary"


def test_a_target_outside_the_vocabulary(device):
    x, weight, targets = case(ignored=0.0, device=device)
    if device == "cpu":
        with pytest.raises(IndexError, match="targets contains 150"):
            cross_entropy(x, weight, targets.where(targets != targets[3], 150))
    else:
        assert cross_entropy(x, weight, targets.where(targets != targets[3], 150)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(device, dtype):
    logits, targets = torch.randn(9, 300, device=device) * 5, torch.randint(300, (9,), device=device)
    losses, grads = rows_of(logits, targets, dtype, 1e-3)
    order = torch.randperm(9, device=device)
    again = rows_of(logits[order], targets[order], dtype, 1e-3)
    assert torch.equal(losses[order], again[0]) and torch.equal(grads[order], again[1])


def test_same_bits_on_each_run_and_strided_inputs(device):
    x, weight, targets = case(device=device, dtype=torch.bfloat16)
    want = results(x, weight, targets, chunk=4)
    for a, b in zip(want, results(x, weight, targets, chunk=4)):
        assert torch.equal(a, b)
    spread = torch.stack([x.detach(), torch.full_like(x, math.nan)], -1)[..., 0]
    other = torch.stack([targets, targets + 1], -1)[:, 0]
    for a, b in zip(want, results(spread, weight.detach().T.contiguous().T, other, chunk=4)):
        assert error(a, b) < 1e-6


def test_each_gradient_alone_and_none(device, monkeypatch):
    x, weight, targets = case(device=device)
    _, dx, dweight = results(x, weight, targets)
    alone = x.detach().clone().requires_grad_()
    cross_entropy(alone, weight.detach(), targets).backward()
    assert torch.equal(alone.grad, dx)
    alone = weight.detach().clone().requires_grad_()
    cross_entropy(x.detach(), alone, targets).backward()
    assert torch.equal(alone.grad, dweight)
    kinds, loss_rows = [], op.loss_rows
    monkeypatch.setattr(op, "loss_rows", lambda *a: kinds.append(a[-1]) or loss_rows(*a))
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets).requires_grad
    cross_entropy(x.detach(), weight.detach(), targets)
    assert kinds == [None, None], "no gradient is made"


def test_backward_twice_and_accumulation(device):
    x, weight, targets = case(device=device)
    loss = cross_entropy(x, weight, targets)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])
    cross_entropy(x, weight, targets).backward()
    assert error(weight.grad, 3 * once[1]) < 1e-6


def test_autocast_leaves_the_logits_in_float32(device):
    x, weight, targets = case(device=device)
    want = results(x, weight, targets)
    with torch.autocast(device, torch.bfloat16):
        for a, b in zip(results(x, weight, targets), want):
            assert torch.equal(a, b)


def test_opcheck(real_memory, device):
    for dtype, needs in ((torch.float32, (True, True)), (torch.bfloat16, (True, False))):
        x, weight, targets = case(n=3, v=70, dtype=dtype, device=device)
        weight.requires_grad_(needs[1])
        torch.library.opcheck(op._cross_entropy, (x, weight, targets, -100, 0.01, True, 2, *needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, device, dynamic):
    x, weight, targets = case(n=5, device=device)

    def run(x, weight):
        return cross_entropy(x.sin(), weight.cos(), targets, z_loss=0.01, chunk=3) * 1.5

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(x, weight), (x, weight)) for f in (run, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(device, reentrant):
    x, weight, targets = case(n=5, device=device)
    want = results(x, weight, targets)
    checkpoint(cross_entropy, x, weight, targets, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, want[1]) and torch.equal(weight.grad, want[2])


def test_a_second_derivative_is_refused(device):
    x, weight, targets = case(n=3, device=device)
    (dx,) = torch.autograd.grad(cross_entropy(x, weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.square().sum().backward()


def test_one_chunk_of_logits_exists_at_a_time(device, monkeypatch):
    shapes, loss_rows = [], op.loss_rows
    monkeypatch.setattr(op, "loss_rows", lambda *a: shapes.append(a[0].shape) or loss_rows(*a))
    x, weight, targets = case(n=11, v=70, device=device)
    results(x, weight, targets, chunk=4)
    assert shapes == [(4, 70), (4, 70), (3, 70)]
    assert op.CHUNK >= 4096


def test_float64_is_refused_by_name(device):
    x, weight, targets = case(device=device)
    for a, b in ((x.double(), weight), (x, weight.double())):
        with pytest.raises(RuntimeError, match="float64"):
            cross_entropy(a, b, targets)
        assert cross_entropy(a, b, targets, backend="auto").dtype == torch.float64
