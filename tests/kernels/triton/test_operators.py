"""The operators as torch sees them: opcheck, torch.compile without a graph break, autocast, checkpointing."""

import moe_cases
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import moe_experts, moe_permutation, moe_route, swiglu
from abyssal.kernels.moe_experts import triton as experts
from abyssal.kernels.moe_route import triton as router


def layer(x, logits, w13, w2, table=None):
    routing = moe_route(logits * 1.1, top_k=2, scale=1.5, experts=table)
    out = moe_experts(x.sin(), routing.experts, routing.weights, w13, w2, limit=1.0, shared=x.cos())
    counts = moe_permutation(routing.experts, len(w13)).counts
    return out.cos().sum() + (routing.scores * counts).sum() + swiglu(out, 1.0).sum()


@pytest.fixture
def inputs(small_blocks, device):
    x, _, _, w13, w2 = moe_cases.make(9, 2, 4, d=16, f=8, device=device)
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).to(device)
    return [t.requires_grad_() for t in (x, logits, w13, w2)]


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


@pytest.mark.parametrize("op", ["route", "hashed", "permutation", "experts", "swiglu"])
def test_opcheck(real_memory, inputs, device, op):
    x, logits, w13, w2 = inputs
    ids = torch.arange(18, device=device).view(9, 2) % 4
    weights = torch.rand(9, 2, device=device, requires_grad=True)
    if op == "route":
        torch.library.opcheck(router._route, (logits, torch.randn(4, device=device), None, 2, 1.5))
    elif op == "hashed":
        torch.library.opcheck(router._route, (logits, None, ids, 2, 1.5))
    elif op == "permutation":
        torch.library.opcheck(router._permutation, (ids, 4, torch.arange(9, device=device) > 3))
    elif op == "experts":
        torch.library.opcheck(experts._experts, (x, weights, w13, w2, *moe_permutation(ids, 4), 1.0, True, None))
        shared = torch.randn(9, 16, device=device, requires_grad=True)
        torch.library.opcheck(experts._experts, (x, weights, w13, w2, *moe_permutation(ids, 4), None, True, shared))
    else:
        torch.library.opcheck(experts._swiglu, (torch.randn(6, 8, device=device, requires_grad=True), None, None))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("hashed", [False, True])
def test_compiles_without_a_graph_break(real_memory, inputs, device, dynamic, hashed):
    table = torch.arange(18, device=device).view(9, 2) % 4 if hashed else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*inputs, table), inputs) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_autocast_casts_like_the_reference(inputs, device):
    x, logits, w13, w2 = inputs
    weights = torch.rand(9, 2, device=device, requires_grad=True)
    ids = moe_route(logits, top_k=2, scale=1.0).experts
    grads = []
    for backend in ("triton", "eager"):
        with torch.autocast(device, torch.bfloat16):
            out = moe_experts(x, ids, weights, w13, w2, limit=1.0, backend=backend)
        assert out.dtype == torch.bfloat16
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), (x, weights, w13, w2))])
    for a, b in zip(*grads):
        assert a.dtype == b.dtype and moe_cases.error(a, b) < 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(inputs, reentrant):
    want = torch.autograd.grad(layer(*inputs), inputs)
    checkpoint(layer, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(want, inputs))


def test_backward_twice_adds_up(inputs):
    loss = layer(*inputs)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in inputs]
    loss.backward()
    assert all(torch.equal(2 * a, t.grad) for a, t in zip(once, inputs))


def test_an_unused_result_needs_no_gradient(inputs):
    x, logits = inputs[:2]
    routing = moe_route(logits, top_k=2, scale=1.0)
    (x.sum() + 0 * routing.experts.sum()).backward()
    assert logits.grad is None
    routing.scores.sum().backward()
    assert logits.grad.all()


def test_float64_is_refused_by_name(device):
    with pytest.raises(RuntimeError, match="float64"):
        moe_route(torch.zeros(2, 4, dtype=torch.float64, device=device), top_k=1, scale=1.0)
    assert moe_route(torch.zeros(2, 4, dtype=torch.float64, device=device), top_k=1, scale=1.0, backend="auto")
