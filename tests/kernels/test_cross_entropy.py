"""Linear cross-entropy against torch's in float64: value and gradients, ignored tokens, chunks, dtypes, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abyssal.kernels.cross_entropy import cross_entropy


def relative_rms(name, got, want, limit=2e-6):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error < limit, f"{name}: relative RMS error {error:.2e}"


def case(n=37, v=53, d=16, dtype=torch.float32, ignored=0.3, scale=2.0, seed=0):
    torch.manual_seed(seed)
    targets = torch.randint(0, v, (n,)).masked_fill(torch.rand(n) < ignored, -100)
    return (torch.randn(n, d) * scale).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_(), targets


def oracle(x, weight, targets, z_loss=0.0, reduction="mean"):
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x @ weight.T
    valid = targets != -100
    loss = F.cross_entropy(logits, targets, reduction="sum") + z_loss * logits.logsumexp(-1)[valid].square().sum()
    loss = loss / valid.sum() if reduction == "mean" else loss
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def check(x, weight, targets, limit=2e-6, upstream=1.0, **options):
    loss = cross_entropy(x, weight, targets, **options)
    (loss * upstream).backward()
    want = oracle(x, weight, targets, options.get("z_loss", 0.0), options.get("reduction", "mean"))
    relative_rms("loss", loss.detach(), want[0], limit)
    relative_rms("dx", x.grad, want[1] * upstream, limit)
    relative_rms("dweight", weight.grad, want[2] * upstream, limit)
    assert loss.ndim == 0 and x.grad.dtype == x.dtype and weight.grad.dtype == weight.dtype
    return loss


@pytest.mark.parametrize("chunk", [1, 2, 7, 36, 37, 38, 1000, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients(chunk, z_loss, reduction):
    check(*case(), chunk=chunk, z_loss=z_loss, reduction=reduction)


def test_the_upstream_gradient_scales_both():
    check(*case(), upstream=-3.5)


def test_no_target_ignored_and_one_token():
    check(*case(ignored=0.0))
    check(*case(n=1, ignored=0.0))


def test_gradcheck():
    x, weight, targets = case(n=5, v=7, d=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, targets, z_loss=0.1, chunk=2), (x, weight))
    assert cross_entropy(x, weight, targets).dtype == torch.float64


@pytest.mark.parametrize("n", [0, 6])
def test_without_a_valid_target_the_loss_and_its_gradients_are_zero(n):
    x, weight, _ = case(n=n)
    for reduction in ("mean", "sum"):
        x.grad = weight.grad = None
        loss = cross_entropy(x, weight, torch.full((n,), -100), reduction=reduction)
        loss.backward()
        assert loss == 0 and x.grad.shape == (n, 16) and not x.grad.any() and not weight.grad.any()


def test_ignored_tokens_are_not_read():
    x, weight, targets = case(ignored=0.5)
    want = check(x, weight, targets)
    kept = x.grad.clone(), weight.grad.clone()
    with torch.no_grad():
        x[targets == -100] = math.nan
    x.grad = weight.grad = None
    loss = cross_entropy(x, weight, targets)
    loss.backward()
    assert torch.equal(loss, want) and torch.equal(x.grad, kept[0]) and torch.equal(weight.grad, kept[1])


def test_another_ignore_index():
    x, weight, targets = case()
    want = cross_entropy(x, weight, targets)
    assert torch.equal(cross_entropy(x, weight, targets.masked_fill(targets == -100, 7000), ignore_index=7000), want)
    inside = targets.clamp(min=0)
    assert torch.equal(
        cross_entropy(x, weight, inside, ignore_index=0), cross_entropy(x, weight, inside.where(inside > 0, -100))
    )


@pytest.mark.parametrize(
    ("dx", "dweight"), [(torch.bfloat16, torch.float32), (torch.bfloat16,) * 2, (torch.float16,) * 2]
)
def test_half_precision_inputs(dx, dweight):
    x, weight, targets = case(n=300, v=40)
    x, weight = x.detach().to(dx).requires_grad_(), weight.detach().to(dweight).requires_grad_()
    loss = check(x, weight, targets, limit=6e-3)
    assert loss.dtype == torch.float32
    relative_rms("loss", loss.detach(), oracle(x, weight, targets)[0])


def test_autocast_leaves_the_logits_in_fp32():
    x, weight, targets = case()
    want = cross_entropy(x, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_entropy(x, weight, targets), want)
        with torch.no_grad():
            assert torch.equal(cross_entropy(x, weight, targets), want)
        check(x, weight, targets)


def test_large_logits_do_not_overflow():
    x, weight, targets = case(scale=1e4)
    loss = check(x, weight, targets, z_loss=1e-9)
    assert loss.isfinite()


def test_each_gradient_alone_and_none():
    x, weight, targets = case()
    check(x, weight, targets)
    alone = x.detach().clone().requires_grad_()
    cross_entropy(alone, weight.detach(), targets).backward()
    assert torch.equal(alone.grad, x.grad)
    alone = weight.detach().clone().requires_grad_()
    cross_entropy(x.detach(), alone, targets).backward()
    assert torch.equal(alone.grad, weight.grad)
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets).requires_grad


def test_backward_twice_and_strided_inputs():
    x, weight, targets = case()
    loss = cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, (x, weight))))
    a, b = (t.detach().T.contiguous().T.requires_grad_() for t in (x, weight))
    strided = torch.autograd.grad(cross_entropy(a, b, targets), (a, b))
    for name, got, want in zip(("dx", "dweight"), strided, first):
        relative_rms(name, got, want)


def test_same_bits_on_each_run():
    runs = [case(n=500, v=300) for _ in range(2)]
    for x, weight, targets in runs:
        cross_entropy(x, weight, targets, chunk=64).backward()
    assert torch.equal(runs[0][0].grad, runs[1][0].grad) and torch.equal(runs[0][1].grad, runs[1][1].grad)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, and where tensors of that size lie."""

    numel, places = 0, frozenset()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.places = (self.places if t.numel() == self.numel else frozenset()) | {t.data_ptr()}
                self.numel = t.numel()
        return out


def test_one_chunk_of_logits_exists_at_a_time_however_many_the_tokens():
    sizes = []
    for n in (64, 640):
        x, weight, targets = case(n=n, v=1000, d=4, ignored=0.0)
        with Largest() as largest:
            cross_entropy(x, weight, targets, chunk=16).backward()
        assert len(largest.places) == 1
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1] == 16 * 1000


def test_refusals_name_the_argument():
    x, weight, targets = case(ignored=0.0)
    for bad in (53, -1, -99):
        with pytest.raises(IndexError, match=rf"targets contains {bad}: allowed are 0\.\.52 and ignore_index=-100"):
            cross_entropy(x, weight, targets.where(targets != targets[3], bad))
    for message, call in {
        "expected \\[tokens, d\\]": lambda: cross_entropy(x, weight[:, 1:], targets),
        "targets is torch.int32": lambda: cross_entropy(x, weight, targets.int()),
        "reduction='none'": lambda: cross_entropy(x, weight, targets, reduction="none"),
        "chunk=0": lambda: cross_entropy(x, weight, targets, chunk=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
