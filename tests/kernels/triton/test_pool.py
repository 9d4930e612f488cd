"""The pooling's kernels against loops in float64: regular windows, documents, windows that share rows, NaN, operators.

b batch · t tokens · p entries · D channels of an entry
"""

import inspect
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import pool
from abyssal.kernels.pool import eager
from abyssal.kernels.pool import triton as kernels
from abyssal.kernels.pool.triton import launch

NAMES = ("entries", "dkv", "dgate", "dbias")
FIRST = [[4, 4, 6, 5, -1, 2], [-1, 4, 8, 12, 15, 0]]  # unsorted, shared rows, missing entries, gaps, the last row
FOLLOWS = [[True, False, True, True, True, False], [True, False, True, True, False, False]]


@pytest.fixture(autouse=True)
def several_blocks(emulated, monkeypatch):
    """Programs so few and small that entries and channels need several."""
    if emulated:
        monkeypatch.setattr(launch, "VALUES", 128)
        monkeypatch.setattr(launch, "PROGRAMS", 6)


def oracle(kv, gate, bias, *, ratio, overlap, first=None, follows=None):
    """Entry by entry: a list of (value, logit) pairs, and their softmax."""
    d = kv.shape[2] // (2 if overlap else 1)
    batch = []
    for b in range(len(kv)):
        starts = range(0, kv.shape[1] // ratio * ratio, ratio) if first is None else first[b].tolist()
        entries = []
        for i, start in enumerate(starts):
            joined = overlap and (i > 0 if follows is None else bool(follows[b, i]))
            pairs = [(kv[b, start + r, -d:], (gate[b, start + r] + bias[r])[-d:]) for r in range(ratio) if start >= 0]
            if joined and start >= 0:
                earlier = range(start - ratio, start)
                pairs += [(kv[b, t, :d], (gate[b, t] + bias[r])[:d]) for r, t in enumerate(earlier)]
            if not pairs:
                pairs = [(kv.new_zeros(d), kv.new_zeros(d))]
            values, logits = (torch.stack(part) for part in zip(*pairs))
            entries.append((logits.softmax(0) * values).sum(0))
        batch.append(torch.stack(entries) if entries else kv.new_zeros(0, d))
    return torch.stack(batch)


def inputs(device, b, t, d, ratio, overlap, dtype=torch.float32):
    g, c = torch.Generator().manual_seed(t), 2 * d if overlap else d
    kv, gate, bias = (torch.randn(shape, generator=g) for shape in ((b, t, c), (b, t, c), (ratio, c)))
    return [kv.to(device, dtype), (2 * gate).to(device, dtype), bias.to(device)]


def results(run, arguments, dtype=None, **options):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in arguments]
    out = run(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(got, want):
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def agree(arguments, **options):
    on_cpu = {key: x.cpu() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    got = results(pool, arguments, **options)
    exact = results(oracle, [x.cpu() for x in arguments], torch.float64, **on_cpu)
    plain = results(eager.pool, arguments, first=None, follows=None, **options) if "first" not in options else None
    for i, (name, a, b) in enumerate(zip(NAMES, got, exact)):
        assert a.isfinite().all() and error(a, b) < 1e-6, f"{name}: {error(a, b):.1e}"
        assert plain is None or error(a, plain[i]) < 1e-6, f"{name} of the reference"
    return got


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("ratio", "t", "d"), [(4, 30, 5), (4, 4, 20), (1, 3, 2), (3, 11, 5), (32, 71, 3)])
def test_regular_windows(device, ratio, t, d, overlap):
    got = agree(inputs(device, 2, t, d, ratio, overlap), ratio=ratio, overlap=overlap)
    tail = slice(t // ratio * ratio, t)
    assert not got[1][:, tail].any() and not got[2][:, tail].any()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("d", [5, 20])
def test_gathered_windows_that_share_rows(device, d, overlap):
    first, follows = torch.tensor(FIRST, device=device), torch.tensor(FOLLOWS, device=device)
    windows = {"first": first, "follows": follows} if overlap else {"first": first}
    got = agree(inputs(device, 2, 19, d, 4, overlap), ratio=4, overlap=overlap, **windows)
    assert not got[0][0, 4].any() and not got[1][0, 10:].any() and not got[2][0, 10:].any()
    again = results(pool, inputs(device, 2, 19, d, 4, overlap), ratio=4, overlap=overlap, **windows)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.parametrize("overlap", [True, False])
def test_gathered_windows_equal_regular_ones(device, overlap):
    arguments = inputs(device, 2, 23, 5, 4, overlap)
    first = torch.arange(0, 20, 4, device=device).expand(2, -1)
    regular = results(pool, arguments, ratio=4, overlap=overlap)
    gathered = results(pool, arguments, ratio=4, overlap=overlap, first=first, follows=first > 0)
    assert torch.equal(regular[0], gathered[0])
    assert all(error(a, b) < 1e-6 for a, b in zip(gathered[1:], regular[1:]))


@pytest.mark.parametrize("overlap", [True, False])
def test_too_few_tokens(device, overlap):
    for b, t in ((2, 0), (2, 3), (0, 9)):
        entries = results(pool, inputs(device, b, t, 5, 4, overlap), ratio=4, overlap=overlap)
        assert entries[0].shape == (b, t // 4, 5) and not any(x.any() for x in entries[1:])
    none = {
        "first": torch.full((2, 3), -1, device=device),
        "follows": torch.ones(2, 3, dtype=torch.bool, device=device),
    }
    for first in (none, {key: x[:, :0] for key, x in none.items()}):
        entries = results(pool, inputs(device, 2, 3, 5, 4, overlap), ratio=4, overlap=overlap, **first)
        assert entries[0].shape == (2, first["first"].shape[1], 5) and not any(x.any() for x in entries)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_nan_stays_in_its_windows(device, overlap, gathered):
    arguments = inputs(device, 2, 26, 3, 4, overlap)
    first = torch.arange(0, 24, 4, device=device).expand(2, -1).clone()
    first[1, 2] = -1
    windows = {"first": first, "follows": first > 0} if gathered else {}
    clean = results(pool, arguments, ratio=4, overlap=overlap, **windows)
    for x in arguments[:2]:
        x[0, 9], x[1, 10] = math.nan, math.inf
    got = results(pool, arguments, ratio=4, overlap=overlap, **windows)
    plain = results(eager.pool, arguments, ratio=4, overlap=overlap, **windows)
    for a, b, c in zip(got[:3], clean, plain):
        assert torch.equal(a.isnan(), c.isnan()) and torch.equal(a[~a.isnan()], b[~a.isnan()])
    assert got[3].isnan().any() and not got[0].isnan().all()


def test_a_missing_entry_takes_no_gradient(device):
    kv, gate, bias = (x.requires_grad_() for x in inputs(device, 1, 8, 3, 4, True))
    with torch.no_grad():
        kv[:, :4] = gate[:, :4] = math.nan
    windows = {"first": torch.tensor([[-1, 4]], device=device), "follows": torch.tensor([[True, False]], device=device)}
    out = pool(kv, gate, bias, ratio=4, overlap=True, **windows)
    dout = torch.ones_like(out)
    dout[:, 0] = math.nan
    assert not out[:, 0].any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, (kv, gate, bias), dout))


@pytest.mark.parametrize("overlap", [True, False])
def test_extreme_gates_select_a_value(device, overlap):
    kv, gate, bias = inputs(device, 1, 16, 3, 4, overlap)
    gate = 1e4 * gate
    first = torch.arange(0, 16, 4, device=device)[None]
    for windows in ({}, {"first": first, "follows": first > 0}):
        on_cpu = {key: x.cpu() for key, x in windows.items()}
        exact = [x.double().cpu() for x in (kv, gate + bias.repeat(4, 1), 0 * bias)]  # as float32 rounds the logits
        want = results(oracle, exact, ratio=4, overlap=overlap, **on_cpu)
        got = results(pool, (kv, gate, bias), ratio=4, overlap=overlap, **windows)
        assert all(error(a, b) < 1e-5 for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(device, dtype):
    arguments = inputs(device, 2, 22, 5, 4, True, dtype)
    got, exact = (
        results(pool, arguments, ratio=4, overlap=True),
        results(pool, arguments, torch.float32, ratio=4, overlap=True),
    )
    assert [x.dtype for x in got] == [dtype, dtype, dtype, torch.float32]
    for a, b in zip(got[:3], exact):
        torch.testing.assert_close(a, b.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    first = torch.arange(0, 20, 4, device=device).expand(2, -1)
    for a, b in zip(got, results(pool, arguments, ratio=4, overlap=True, first=first, follows=first > 0)):
        assert a.dtype == b.dtype and error(a, b) < 1e-2


def test_strided_inputs_and_mixed_dtypes(device):
    kv, gate, bias = inputs(device, 2, 13, 5, 4, True)
    want = results(pool, (kv, gate, bias), ratio=4, overlap=True)
    both = torch.cat([kv, gate], -1).chunk(2, -1)
    for arguments in ((*both, bias), (kv.mT.contiguous().mT, gate, bias.T.contiguous().T)):
        assert all(torch.equal(a, b) for a, b in zip(want, results(pool, arguments, ratio=4, overlap=True)))
    mixed = results(pool, (kv.bfloat16(), gate, bias.half()), ratio=4, overlap=True)
    assert [x.dtype for x in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    assert all(error(a, b) < 2e-2 for a, b in zip(mixed, want))


def test_an_entry_has_the_same_bits_in_any_batch(device):
    arguments = inputs(device, 3, 40, 20, 4, True)
    full = results(pool, arguments, ratio=4, overlap=True)
    again = results(pool, arguments, ratio=4, overlap=True)
    assert all(torch.equal(a, b) for a, b in zip(full, again))
    kv, gate, bias = arguments
    assert torch.equal(full[0][1:2, :5], pool(kv[1:2, :21], gate[1:2, :21], bias, ratio=4, overlap=True))
    assert torch.equal(full[0].flip(0), pool(kv.flip(0), gate.flip(0), bias, ratio=4, overlap=True))


# as torch sees it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def layer(kv, gate, bias, first, follows):
    regular = pool(kv.sin(), gate * 2, bias, ratio=4, overlap=True)
    return regular.cos().sum() + pool(kv, gate, bias, ratio=4, overlap=True, first=first, follows=follows).sin().sum()


@pytest.fixture
def leaves(device):
    first = torch.tensor([[0, 4, 9], [-1, 5, 1]], device=device)
    return [*(x.requires_grad_() for x in inputs(device, 2, 13, 3, 4, True)), first, first > 4]


@pytest.mark.parametrize("gathered", [True, False])
def test_opcheck(real_memory, leaves, gathered):
    torch.library.opcheck(kernels._pool, (*leaves[:3], *(leaves[3:] if gathered else (None, None)), 4, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, leaves, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*leaves), leaves[:3]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(leaves, reentrant):
    want = torch.autograd.grad(layer(*leaves), leaves[:3])
    checkpoint(layer, *leaves, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, leaves))


def test_some_gradients_alone_and_twice(leaves):
    kv, gate, bias = leaves[:3]
    want = torch.autograd.grad(pool(kv, gate, bias, ratio=4, overlap=True).sum(), (kv, gate, bias))
    for i in range(3):
        some = [x if i == j else x.detach() for j, x in enumerate((kv, gate, bias))]
        loss = pool(*some, ratio=4, overlap=True).sum()
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(loss, some[i], retain_graph=True)[0], want[i])
    with torch.no_grad():
        assert not pool(kv, gate, bias, ratio=4, overlap=True).requires_grad


def test_the_twin_has_the_signature_of_the_reference():
    assert inspect.signature(eager.pool) == inspect.signature(kernels.pool)
