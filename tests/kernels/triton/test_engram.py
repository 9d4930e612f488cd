"""Engram's kernels: golden hashes, look-back, gather with collisions, the gate and every gradient in float64."""

import inspect
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import engram_gate, engram_gather, engram_hash
from abyssal.kernels.engram import eager, engram_layout
from abyssal.kernels.engram import triton as kernels
from abyssal.kernels.triton import scatter as triton_scatter

GOLDEN = [  # V4.1's layer 1, canonical ids 5 17 99091 0 42 behind pad 2: two heads of orders 2, 3 and 4
    [5412672, 2319102, 15493752, 7788297, 350501, 4420638],
    [4465417, 3956365, 1504235, 12469394, 13483205, 11535276],
    [379248, 2191136, 13970635, 4327030, 928962, 12736872],
    [11738160, 7620608, 7598184, 14316456, 7353253, 9277014],
    [7905795, 14439908, 503619, 7298820, 8577528, 68808],
]
GRADIENTS = ("dstreams", "dkey", "dvalue", "dweight_h", "dweight_k")


@pytest.fixture(autouse=True)
def small_blocks(emulated, monkeypatch):
    """In the interpreter a few tokens fill several blocks, strips and rounds of a loop."""
    if emulated:
        for name, value in {"ELEMENTS": 64, "STRIP": 3, "STRIPS": 3, "SHARES": 2}.items():
            monkeypatch.setattr(kernels.launch, name, value)
        monkeypatch.setattr(triton_scatter, "ROWS", 2)


def addresses(device, vocab_size=1000, heads=3, max_ngram=4):
    layout = engram_layout([1, 14], classes=99_092, vocab_size=vocab_size, max_ngram=max_ngram, heads=heads)[1]
    return [torch.tensor(x, device=device) for x in layout[:3]]


def error(got, want):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


# hash ----------------------------------------------------------------------------------------------------------------


def test_hash_of_the_release(device):
    arguments = addresses(device, 16_000_000, 8)
    rows = engram_hash(torch.tensor([[5, 17, 99091, 0, 42]], device=device), *arguments, pad=2)
    assert (rows - arguments[2])[0][:, [0, 1, 8, 9, 16, 17]].tolist() == GOLDEN


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("max_ngram", [2, 4])
def test_hash_of_documents_and_continued_rows(device, heads, max_ngram):
    g = torch.Generator().manual_seed(heads)
    b, t = 3, 400 // heads  # several programs
    arguments = addresses(device, heads=heads, max_ngram=max_ngram)
    ids = torch.randint(0, 99_092, (b, t), generator=g).to(device)
    start = (torch.arange(t) // 5 * 5).repeat(b, 1)
    start[1] = -1
    history = torch.randint(0, 99_092, (b, max_ngram - 1), generator=g).to(device)
    for begins in (None, start.to(device), start[:1].to(device), start.to(device) - 2):
        for before in (None, history):
            got, want = (
                engram_hash(ids, *arguments, pad=99_091, start=begins, history=before, backend=backend)
                for backend in ("triton", "eager")
            )
            assert torch.equal(got, want)
    strided = ids.T.contiguous().T
    assert torch.equal(engram_hash(strided, *arguments, pad=7), engram_hash(ids, *arguments, pad=7))


def test_hash_of_large_and_negative_ids(device):
    arguments = addresses(device)
    ids = torch.tensor([[2**62, -1, 2**40, -(2**62), 3]], device=device)
    got, want = (engram_hash(ids, *arguments, pad=-1, backend=backend) for backend in ("triton", "eager"))
    assert torch.equal(got, want) and (got >= arguments[2]).all()


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (1, 1)])
def test_hash_of_few_tokens(device, shape):
    arguments = addresses(device)
    ids = torch.full(shape, 5, device=device)
    got, want = (engram_hash(ids, *arguments, pad=0, backend=backend) for backend in ("triton", "eager"))
    assert torch.equal(got, want)


# gather --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "w", "b", "t", "k"), [(9, 5, 2, 7, 3), (4, 70, 1, 5, 2), (1, 1, 1, 9, 1), (30, 16, 1, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_and_its_gradient(device, r, w, b, t, k, dtype):
    g = torch.Generator().manual_seed(r)
    table = torch.randn(r, w, generator=g).to(device, dtype).requires_grad_()
    rows = torch.randint(0, r, (b, t, k), generator=g).to(device)
    grad = torch.randn(b, t, k * w, generator=g).to(device, dtype)
    got = engram_gather(table, rows)
    got.backward(grad)
    assert torch.equal(got, table[rows].flatten(2)) and got.dtype == dtype
    want = torch.zeros(r, w, dtype=torch.float64)
    for row, part in zip(rows.flatten().tolist(), grad.cpu().double().reshape(-1, w)):
        want[row] += part
    assert table.grad.dtype == dtype and error(table.grad, want) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert not table.grad[want.abs().sum(1) == 0].any()


def test_gather_of_strided_tables_and_unknown_rows(device):
    table = torch.arange(12.0, device=device).view(4, 3).T.contiguous().T
    rows = torch.tensor([[[0, 3], [4, -1]]], device=device)
    out = engram_gather(table, rows)[0]
    assert out[0].tolist() == [0, 1, 2, 9, 10, 11] and out[1].isnan().all()
    assert engram_gather(table, rows[:, :0]).shape == (1, 0, 6)


def test_a_nan_gradient_stays_in_its_row(device):
    table = torch.zeros(3, 4, device=device, requires_grad=True)
    rows = torch.tensor([[[0], [1], [1], [2], [0]]], device=device)
    grad = torch.ones(1, 5, 4, device=device)
    grad[0, 2] = math.nan
    engram_gather(table, rows).backward(grad)
    assert table.grad[1].isnan().all() and (table.grad[[0, 2]].sum(1) == torch.tensor([8.0, 4.0], device=device)).all()


def test_the_gradient_of_nothing_is_zero(device):
    table = torch.ones(5, 3, device=device, requires_grad=True)
    engram_gather(table, torch.zeros(1, 0, 2, dtype=torch.int64, device=device)).sum().backward()
    assert not table.grad.any()


def test_collisions_add_up_in_the_order_of_the_tokens(device):
    """A sum that depends on its order, in a row's look-ups spread over the sequence; the same bits in any company."""
    table = torch.zeros(6, 1, device=device, requires_grad=True)
    few = torch.tensor([[[2], [2], [2]]], device=device)
    alone = torch.autograd.grad(engram_gather(table, few), table, torch.tensor([[[1e8], [1.0], [-1e8]]], device=device))
    rows = torch.tensor([[[5], [2], [0], [2], [5], [2], [1]]], device=device)
    grad = torch.tensor([3.0, 1e8, 4.0, 1.0, 5.0, -1e8, 6.0], device=device).view(1, 7, 1)
    among = torch.autograd.grad(engram_gather(table, rows), table, grad)
    assert torch.equal(alone[0][2], among[0][2])
    assert among[0][[0, 1, 3, 4, 5], 0].tolist() == [4, 6, 0, 0, 8]


# gate ----------------------------------------------------------------------------------------------------------------


def case(device, b=2, t=7, n=4, d=12, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=g) for shape in ((b, t, n, d), (b, t, n, d), (b, t, d), (n, d), (n, d))]
    streams, key, value, weight_h, weight_k = draw
    tensors = [t.to(dtype) for t in (streams * 3, key * 2, value)] + [weight_h, weight_k + 1]
    return [t.to(device).requires_grad_() for t in tensors]


def oracle(streams, key, value, weight_h, weight_k, eps):
    """As the definition reads, by autograd in float64."""
    copies = [t.detach().cpu().double().requires_grad_() for t in (streams, key, value, weight_h, weight_k)]
    h, k, v, wh, wk = copies
    h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * wh
    k = k / (k.square().mean(-1, keepdim=True) + eps).sqrt() * wk
    s = (h * k).sum(-1) / math.sqrt(h.shape[-1])
    root = s.abs().clamp(min=1e-6).sqrt()
    return torch.sigmoid(torch.where(s >= 0, root, -root))[..., None] * v[:, :, None], copies


@pytest.mark.parametrize(
    ("t", "n", "d", "eps"), [(7, 4, 12, 1e-20), (1, 1, 8, 1e-2), (9, 1, 33, 1e-2), (3, 3, 70, 1e-20), (5, 2, 1, 1e-2)]
)
def test_gate_and_gradients(device, t, n, d, eps):
    inputs = case(device, t=t, n=n, d=d)
    got, (want, copies) = engram_gate(*inputs, eps=eps), oracle(*inputs, eps)
    grad = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got.backward(grad.float().to(device)), want.backward(grad)
    assert error(got, want) < 2e-6
    plain = [x.detach().clone().requires_grad_() for x in inputs]
    engram_gate(*plain, eps=eps, backend="eager").backward(grad.float().to(device))
    for name, a, b, c in zip(GRADIENTS, inputs, plain, copies):
        assert error(a.grad, c.grad) < 1e-5 + 2 * error(b.grad, c.grad), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_in_half_precision_under_autocast(device, dtype):
    inputs = case(device, d=40, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        got = engram_gate(*inputs, eps=1e-6)
    want, copies = oracle(*inputs, 1e-6)
    got.float().sum().backward(), want.sum().backward()
    assert got.dtype == dtype and error(got, want) < 5e-3
    for name, a, b in zip(GRADIENTS, inputs, copies):
        assert a.grad.dtype == a.dtype and error(a.grad, b.grad) < (1e-5 if a.dtype == torch.float32 else 5e-3), name


def test_gate_at_and_below_the_clamp(device):
    """Orthogonal vectors: the gate is sigmoid(+-1e-3) by the sign bit, and nothing flows back to streams or key."""
    streams, key = torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4)
    streams[..., 0], key[..., 1] = 1.0, 1.0
    key[0, 1, 0, 0], key[0, 2, 0, 0] = 1e-7, -1e-7
    streams[0, 3] = -0.0
    inputs = [x.to(device).requires_grad_() for x in (streams, key, torch.ones(1, 4, 4), *torch.ones(2, 1, 4))]
    out = engram_gate(*inputs, eps=1e-20)
    out.sum().backward()
    up, down = (1 / (1 + math.exp(-v)) for v in (1e-3, -1e-3))
    assert out[0, :3, 0, 0].tolist() == pytest.approx([up, up, down], abs=1e-7) and out.isfinite().all()
    assert not any(x.grad.any() for x in (inputs[0], inputs[1], inputs[3], inputs[4]))
    assert inputs[2].grad[0, :3, 0].tolist() == pytest.approx([up, up, down], abs=1e-7)


def test_a_logit_that_underflows_keeps_its_sign(device):
    streams, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    streams[..., 0], key[0, :, 0, 0] = 1e-22, torch.tensor([1e-23, -1e-23])  # halved, their product is 0 and -0
    inputs = [x.to(device) for x in (streams, key, torch.ones(1, 2, 4), *torch.ones(2, 1, 4))]
    got, want = (engram_gate(*inputs, eps=1.0, backend=backend) for backend in ("triton", "eager"))
    assert torch.equal(got, want) and (got[0, 0] > 0.5).all() and (got[0, 1] < 0.5).all()


def test_gate_of_extreme_vectors(device):
    """Logits up to +-1e4, and vectors so small that eps is all of their norm."""
    inputs = case(device, t=3, d=8)
    with torch.no_grad():
        inputs[3].mul_(1e4)
        inputs[0][0] *= 1e-12
    got, (want, copies) = engram_gate(*inputs, eps=1e-6), oracle(*inputs, 1e-6)
    got.sum().backward(), want.sum().backward()
    assert error(got, want) < 1e-5
    for name, a, b in zip(GRADIENTS, inputs, copies):
        assert a.grad.isfinite().all() and error(a.grad, b.grad) < 1e-4, name


def test_gate_takes_slices_and_strides(device):
    streams, _, _, *weights = case(device, t=5)
    g = torch.Generator().manual_seed(3)
    both = torch.randn(2, 5, 5, 12, generator=g).to(device).requires_grad_()
    grad = torch.randn(2, 5, 12, 4, generator=g).to(device).transpose(2, 3)
    engram_gate(streams, both[:, :, :4], both[:, :, 4], *weights, eps=1e-6).backward(grad)
    got, both.grad = [both.grad, streams.grad], None
    streams.grad = None
    key, value = (x.detach().clone().requires_grad_() for x in (both[:, :, :4], both[:, :, 4]))
    turned = streams.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    wide = [w.detach().T.contiguous().T for w in weights]
    engram_gate(turned, key, value, *wide, eps=1e-6).backward(grad.contiguous())
    assert torch.equal(got[0], torch.cat([key.grad, value.grad[:, :, None]], 2)) and torch.equal(got[1], turned.grad)


def test_a_token_has_the_same_bits_in_any_company(device):
    inputs = case(device, t=11)
    grad = torch.randn(2, 11, 4, 12, generator=torch.Generator().manual_seed(1)).to(device)
    first, again = ([engram_gate(*inputs, eps=1e-6)] for _ in range(2))
    for kept in (first, again):
        kept += torch.autograd.grad(kept[0], inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    few = [x[:, :5].detach().clone().requires_grad_() for x in inputs[:3]] + inputs[3:]
    part = [engram_gate(*few, eps=1e-6)]
    part += torch.autograd.grad(part[0], few[:3], grad[:, :5])
    assert all(torch.equal(a[:, :5], b) for a, b in zip(first, part))


def test_a_nan_token_stays_alone(device):
    inputs = case(device)
    clean = engram_gate(*inputs, eps=1e-6)
    grads = torch.autograd.grad(clean, inputs[:3], torch.ones_like(clean))
    with torch.no_grad():
        inputs[0][1, 3, 2, 5], inputs[1][0, 1, 0, 3], inputs[2][0, 0, 1] = math.nan, math.inf, -math.inf
    dirty = engram_gate(*inputs, eps=1e-6)
    assert dirty[1, 3, 2].isnan().all() and not dirty[1, 3, [0, 1, 3]].isnan().any()
    others = torch.ones(2, 7, dtype=torch.bool)
    others[1, 3] = others[0, 1] = others[0, 0] = False
    for a, b in zip((clean, *grads), (dirty, *torch.autograd.grad(dirty, inputs[:3], torch.ones_like(dirty)))):
        assert torch.equal(a[others], b[others])


def test_gate_of_no_tokens(device):
    inputs = case(device, t=0)
    engram_gate(*inputs, eps=1e-6).sum().backward()
    assert inputs[0].grad.shape == (2, 0, 4, 12) and not inputs[3].grad.any() and not inputs[4].grad.any()


def test_gate_keeps_three_scalars_per_token_and_stream(device):
    inputs, kept = case(device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        engram_gate(*inputs, eps=1e-6)
    assert sum(kept) == sum(x.numel() for x in inputs) + 3 * 2 * 7 * 4


# as operators --------------------------------------------------------------------------------------------------------


def layer(ids, addresses, table, streams, wkv, weight_h, weight_k):
    """From ids to what the memory writes, as `model.engram` does it."""
    rows = engram_hash(ids, *addresses, pad=1, start=torch.zeros_like(ids))
    keys = (engram_gather(table.sin(), rows) @ wkv).unflatten(-1, (3, 4))
    return engram_gate(streams.cos(), keys[:, :, :2], keys[:, :, 2], weight_h, weight_k, eps=1e-6).sin().sum()


@pytest.fixture
def inputs(device):
    g = torch.Generator().manual_seed(0)
    where = addresses(device, vocab_size=20, heads=1, max_ngram=3)
    shapes = (60, 5), (2, 6, 2, 4), (10, 12), (2, 4), (2, 4)
    leaves = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
    return torch.randint(0, 50, (2, 6), generator=g).to(device), where, *leaves


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


@pytest.mark.parametrize("op", ["hash", "gather", "gather backward", "gate", "gate backward"])
def test_opcheck(real_memory, inputs, device, op):
    ids, where, table, *_ = inputs
    check = torch.library.opcheck
    streams, key, value, *weights = (x.detach() for x in case(device))
    gate = [*(x.flatten(0, 1) for x in (streams, key, value)), *weights]
    if op == "hash":
        check(kernels._hash, (ids, *where, 2, None, None))
        check(
            kernels._hash, (ids, *where, 2, torch.zeros_like(ids), torch.zeros(2, 2, dtype=torch.int64, device=device))
        )
    elif op == "gather":
        check(kernels._gather, (table, ids.flatten()))
    elif op == "gather backward":
        check(kernels._sum_lookups, (torch.randn(12, 5, device=device), ids.flatten(), 60))
    elif op == "gate":
        check(kernels._gated, (*(x.requires_grad_() for x in gate), 1e-6))
    else:
        out, *kept = kernels._gated(*gate, 1e-6)
        check(kernels._gate_gradients, (out, *gate, *kept))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, inputs, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*inputs), inputs[2:]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_looks_up_twice_and_learns_once(inputs, reentrant):
    want = torch.autograd.grad(layer(*inputs), inputs[2:])
    checkpoint(layer, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(want, inputs[2:]))


def test_only_some_inputs_learn(inputs):
    whole = torch.autograd.grad(layer(*inputs), inputs[2:])
    for learns in range(5):
        leaves = [t.detach().requires_grad_(i == learns) for i, t in enumerate(inputs[2:])]
        layer(*inputs[:2], *leaves).backward()
        assert torch.equal(leaves[learns].grad, whole[learns])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != learns)
    with torch.no_grad():
        assert not layer(*inputs).requires_grad


def test_backward_twice_adds_up(inputs):
    loss = layer(*inputs)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in inputs[2:]]
    loss.backward()
    assert all(torch.equal(2 * a, t.grad) for a, t in zip(once, inputs[2:]))


def test_twins_have_the_signature_of_the_reference():
    for name in kernels.__all__:
        assert inspect.signature(getattr(eager, name)) == inspect.signature(getattr(kernels, name)), name
