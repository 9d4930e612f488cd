"""Attention's kernels against the reference and a float64 oracle: what is seen, sinks, both ways for picks, chunks."""

import math

import pytest
import torch
from attention_cases import NAMES, causal, error, make, oracle, picks, results
from torch.utils.checkpoint import checkpoint

from abyssal.kernels.attention import attention, eager
from abyssal.kernels.attention import triton as operators
from abyssal.kernels.attention.triton import launch, tiles


@pytest.fixture(autouse=True)
def small_blocks(emulated, monkeypatch):
    """Blocks so small that a few queries need several, in the interpreter; the shipped ones on a GPU."""
    if emulated:
        emulate(monkeypatch, keys=16)
        monkeypatch.setattr(launch, "CHUNK", 8)
        monkeypatch.setattr(launch, "PROGRAMS", 4)


def emulate(monkeypatch, keys):
    """Steps of 16 keys, tiles of so many."""
    blocks = tiles.Blocks(16, 16, 4, 1)
    table = tiles.Tiles(blocks, blocks, blocks, tiles.Owned(keys, 16, 16, 4, 1))
    monkeypatch.setattr(launch, "tiles_for", lambda q: table)


@pytest.fixture(params=["rows", "counts"])
def form(request, monkeypatch):
    """The two ways in which gradients of picked entries come about."""
    monkeypatch.setattr(launch, "DENSE", {"rows": 0, "counts": 1000}[request.param])


def gradient(tensors):
    return torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)).to(tensors[0])


def terms_of_dsink(out, lse, sink, dout):
    """Their length: dsink sums over queries what has either sign and is itself a product that cancels."""
    return float(((sink.double() - lse).exp() * out.norm(dim=-1) * dout.double().norm(dim=-1)).norm())


def check(tensors, slack=3.0, floor=4e-7, **options):
    """Each result is as near to float64 as the reference is, within a factor, and of its dtype."""
    options = {"scale": 0.3, "window": 6, **options}
    dout = gradient(tensors)
    got, plain = (results(run, tensors, dout, **options) for run in (attention, eager.attention))
    exact = results(oracle, tensors, dout.double(), dtype=torch.float64, **options)
    for name, a, b, c in zip(NAMES, got, plain, exact):
        if c is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            least = terms_of_dsink(*exact[:2], tensors[3], dout) if name == "dsink" else 1e-30
            away, allowed = error(a, c, least), slack * error(b, c, least) + floor
            assert away <= allowed, f"{name}: {away:.2e}, allowed {allowed:.2e}"
    return got


# what is seen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "past", "window"),
    [
        pytest.param((2, 11, 6, 20), 12, 6, id="six-heads"),
        pytest.param((1, 9, 1, 16), 12, 18, id="one-head-past-rows"),
        pytest.param((1, 3, 2, 16), 0, 9, id="shorter-than-window"),
        pytest.param((2, 1, 33, 16), 7, 4, id="one-query-three-groups"),
        pytest.param((1, 5, 2, 17), 0, 1, id="itself-alone"),
    ],
)
def test_window(device, shape, past, window):
    check(make(*shape, past=past, device=device), window=window)


@pytest.mark.parametrize("entries", ["range", "picks"])
def test_steps_of_half_a_tile(device, emulated, monkeypatch, form, entries):
    """As they are shipped: dq's steps and dkv's tiles lie on different grids."""
    if emulated:
        emulate(monkeypatch, keys=32)
    options = causal(3, 35, device) if entries == "range" else {"index": picks(1, 3, 19, 35, device)}
    check(make(1, 3, 2, 16, p=35, past=37, device=device), window=20, **options)


@pytest.mark.parametrize("past", [0, 5])
def test_range(device, past):
    check(make(1, 11, 2, 16, p=35, past=past, device=device), **causal(11, 35, device))


def test_range_of_each_sequence(device):
    """Holes and bounds outside the entries: whoever sees a tile first and last, those between may see nothing."""
    start = torch.tensor([[0, 3, 9, 20, 17], [5] * 5], device=device)
    end = torch.tensor([[0, 19, 8, 20, 18], [6, 0, 20, 5, 17]], device=device)
    check(make(2, 5, 2, 16, p=20, device=device), start=start, end=end)


def test_picks(device, form):
    check(make(2, 7, 3, 20, p=19, past=3, device=device), index=picks(2, 7, 5, 19, device))


def test_more_picks_than_a_tile(device, form):
    check(make(1, 3, 17, 16, p=20, device=device), index=picks(1, 3, 37, 20, device))


@pytest.mark.parametrize("entries", ["range", "picks"])
def test_documents(device, form, entries):
    t, p = 11, 12
    own = 13 + torch.tensor([0] * 4 + [4] * 2 + [6] * 5, device=device)[None]  # a tile of rows ends at 16
    if entries == "picks":
        own = torch.cat([own, torch.randint(0, 28, (1, t), generator=torch.Generator().manual_seed(2)).to(device)])
        options = {"index": picks(2, t, 4, p, device), "window_start": own}
    else:
        end = torch.cat([torch.arange(4), 3 + torch.arange(2), 4 + 2 * torch.arange(5)])[None].to(device)
        start = torch.tensor([0] * 4 + [3] * 2 + [4] * 5, device=device)[None]
        options = {"start": start, "end": end, "window_start": own}
    check(make(2, t, 2, 16, p=p, past=13, device=device), **options)


def test_picks_counted_twice_equal_a_copied_entry(device, form):
    q, kv, compressed, sink = make(1, 2, 2, 16, p=3, device=device)
    options = {"window": 2, "scale": 0.3}
    twice = attention(q, kv, compressed, sink, index=torch.tensor([[[1, 1], [0, 2]]], device=device), **options)[0]
    copied = torch.cat([compressed, compressed[:, 1:2]], 1)
    once = attention(q, kv, copied, sink, index=torch.tensor([[[1, 3], [0, 2]]], device=device), **options)[0]
    assert error(twice, once) < 1e-6


def test_picks_replace_the_range_and_no_entries_are_none(device):
    q, kv, compressed, sink = make(1, 5, 2, 16, p=3, device=device)
    options, index = {"window": 2, "scale": 0.3}, picks(1, 5, 2, 3, device)
    bounds = {"start": index[..., 0] * 0, "end": index[..., 0] * 0 + 3}
    want = attention(q, kv, compressed, sink, index=index, **options)
    assert torch.equal(attention(q, kv, compressed, sink, index=index, **bounds, **options)[0], want[0])
    alone = attention(q, kv, None, sink, **options)[0]
    assert torch.equal(attention(q, kv, compressed[:, :0], sink, **bounds, **options)[0], alone)
    assert torch.equal(attention(q, kv, compressed, sink, index=index[..., :0], **options)[0], alone)
    empty = compressed[:, :0].clone().requires_grad_()
    attention(q, kv, empty, sink, index=index, **options)[0].sum().backward()
    assert empty.grad.shape == (1, 0, 16)


def test_a_query_that_sees_nothing_is_exactly_zero(device, form):
    tensors = make(1, 2, 33, 16, p=3, device=device)
    blind = {"window_start": torch.full((1, 2), 9), "index": torch.full((1, 2, 2), -1)}
    blind = {name: x.to(device) for name, x in blind.items()}
    out, lse, *grads = results(attention, tensors, gradient(tensors), window=4, scale=1.0, **blind)
    assert not out.any() and torch.equal(lse, tensors[3].expand(1, 2, 33))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("index", [None, "picks"])
def test_no_queries(device, index):
    tensors = make(2, 0, 2, 16, p=3, device=device)
    nothing = torch.zeros(1, 0, dtype=torch.int64, device=device)
    options = {"start": nothing, "end": nothing} if index is None else {"index": picks(2, 0, 2, 3, device)}
    out, lse, *grads = results(attention, tensors, gradient(tensors), window=4, scale=1.0, **options)
    assert out.shape == (2, 0, 2, 16) and lse.shape == (2, 0, 2)
    assert [g.shape for g in grads] == [x.shape for x in tensors] and not any(g.any() for g in grads)


# numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entries", ["range", "picks"])
def test_half_precisions(device, monkeypatch, dtype, entries):
    monkeypatch.setattr(launch, "DENSE", 0)
    tensors = make(1, 7, 3, 32, p=20, dtype=dtype, device=device)
    options = causal(7, 20, device) if entries == "range" else {"index": picks(1, 7, 5, 20, device)}
    check(tensors, slack=2.0, floor=4e-3 if dtype == torch.bfloat16 else 5e-4, **options)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -1e30, 1e30, 1e4, -1e4])
def test_extreme_sinks(device, value):
    """As the reference has them, also where a query sees nothing but the sink."""
    q, kv, _, _ = make(1, 9, 2, 16, device=device)
    sink = torch.tensor([value, 0.5], device=device)
    first = torch.tensor([0] * 8 + [9], device=device)[None]
    options = {"window": 4, "scale": 1.0, "window_start": first}
    tensors, dout = (q, kv, None, sink), gradient([q])
    got, want = (results(run, tensors, dout, **options) for run in (attention, eager.attention))
    assert not got[0][0, 8].any() and torch.equal(got[1][0, 8], want[1][0, 8])
    for name, a, b in zip(NAMES, got, want):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_large_logits(device):
    q, kv, compressed, sink = make(1, 9, 2, 16, p=4, device=device)
    got = check((q * 3e3, kv, compressed, sink), slack=10, window=4, scale=1.0, index=picks(1, 9, 3, 4, device))
    assert got[1].abs().max() > 1e4 and all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("entries", ["range", "picks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_key_reaches_only_those_who_see_it(device, monkeypatch, entries, value):
    monkeypatch.setattr(launch, "DENSE", 1000 if math.isnan(value) else 0)
    tensors = make(1, 19, 2, 16, p=9, device=device)
    if entries == "range":
        options = {"start": torch.zeros(1, 19, dtype=torch.int64), "end": torch.arange(19)[None] // 3}
    else:
        options = {"index": torch.arange(3).expand(1, 19, 3).clone()}
        options["index"][0, 4, 1] = 5
    options = {"window": 4, "scale": 0.1, **{name: x.to(device) for name, x in options.items()}}
    clean = results(attention, tensors, gradient(tensors), **options)
    tensors[1][0, 12, 3], tensors[2][0, 5, 7] = value, value
    broken = results(attention, tensors, gradient(tensors), **options)
    sees = torch.zeros(19, dtype=torch.bool)
    sees[12:16] = True
    sees |= torch.arange(19) // 3 > 5 if entries == "range" else torch.arange(19) == 4
    for name, a, b in zip(NAMES[:3], clean, broken):
        assert torch.equal(a[0, ~sees], b[0, ~sees]), name
        assert not b[0, sees].isfinite().any() or name == "dq", name
    seen_by_them = {"range": [6, 7, 8], "picks": [3, 4, 6, 7, 8]}[entries]
    untouched = seen_by_them if entries == "picks" else []
    assert torch.equal(clean[4][0, untouched], broken[4][0, untouched]), "entries that only others see"


def test_strided_and_misaligned_inputs(device, form):
    tensors, index = make(1, 5, 3, 16, p=11, dtype=torch.bfloat16, device=device), picks(1, 5, 4, 11, device)
    options = {"window": 4, "scale": 0.3, "window_start": torch.arange(5, device=device)[None] // 2}
    want = results(attention, tensors, gradient(tensors), index=index, **options)
    options["window_start"] = options["window_start"].repeat_interleave(2, 1)[:, ::2]
    strided = [
        torch.stack([tensors[0], torch.full_like(tensors[0], math.nan)], -1)[..., 0],
        torch.cat([tensors[1].new_zeros(1), tensors[1].flatten()])[1:].view(tensors[1].shape),
        tensors[2].mT.contiguous().mT,
        torch.stack([tensors[3], tensors[3]], -1)[:, 0],
    ]
    leaves = [x.detach().requires_grad_() for x in strided]
    out, _ = attention(*leaves, index=index.mT.contiguous().mT, **options)
    grads = torch.autograd.grad(out, leaves, gradient(tensors).mT.contiguous().mT)
    for name, a, b in zip((NAMES[0], *NAMES[2:]), (out, *grads), (want[0], *want[2:])):
        assert torch.equal(a, b), name
    expanded = torch.autograd.grad(attention(*leaves, index=index, **options)[0].sum(), leaves)
    assert all(g.isfinite().all() for g in expanded)


def test_mixed_dtypes_meet_in_the_wider(device):
    q, kv, compressed, sink = make(1, 5, 2, 16, p=4, device=device)
    tensors, index = (q.bfloat16(), kv, compressed, sink.bfloat16()), picks(1, 5, 2, 4, device)
    got, want = (
        results(run, tensors, gradient(tensors), window=3, scale=0.3, index=index)
        for run in (attention, eager.attention)
    )
    for name, a, b in zip(NAMES, got, want):
        assert a.dtype == b.dtype and error(a, b) < 1e-2, name  # the output is rounded where q is


# order of sums, chunks, what is asked for ----------------------------------------------------------------------------


def sparse(device, t=6):
    return make(2, t, 3, 16, p=21, past=5, device=device), {
        "index": picks(2, t, 4, 21, device),
        "window": 6,
        "scale": 0.3,
    }


def test_the_same_bits_on_each_run_and_for_each_query_in_any_batch(device, form):
    tensors, options = sparse(device)
    full, again = (results(attention, tensors, gradient(tensors), **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(full, again)), "run to run"
    q, kv, compressed, sink = tensors
    index, dout = options.pop("index"), gradient(tensors)
    few = results(
        attention, (q[:1, :4], kv[:1, :9], compressed[:1], sink), dout[:1, :4], index=index[:1, :4], **options
    )
    for name, a, b in zip(NAMES[:3], full, few):
        assert torch.equal(a[:1, :4], b), f"{name} of a prefix"
    swapped = results(
        attention, (q.flip(0), kv.flip(0), compressed.flip(0), sink), dout.flip(0), index=index.flip(0), **options
    )
    for name, a, b in zip(NAMES[:5], full, swapped):
        assert torch.equal(a.flip(0), b), f"{name} of sequences in another order"


@pytest.mark.parametrize("entries", ["range", "picks"])
def test_chunks_of_queries(device, monkeypatch, form, entries):
    tensors, options = sparse(device)
    if entries == "range":
        options = {"window": 6, "scale": 0.3, **causal(6, 18, device)}
    monkeypatch.setattr(launch, "BUDGET", 1)
    monkeypatch.setattr(launch, "CHUNK", 4)
    calls, queries = [], launch._queries
    monkeypatch.setattr(launch, "_queries", lambda *a: calls.append(a[6:8]) or queries(*a))
    check(tensors, **options)
    assert calls == [(0, 4), (4, 2)]


def test_chunks_keep_to_the_budget(device):
    for shape, k, p in (((1, 4096, 64, 512), 512, 1024), ((1, 65536, 64, 512), 512, 16384), ((3, 5000, 6, 40), 7, 900)):
        b, t, h, d = shape
        q, kv = (torch.empty(n, dtype=torch.bfloat16, device="meta") for n in (shape, (b, t, d)))
        index = torch.empty(b, t, k, dtype=torch.int64, device="meta")
        inputs = launch._Inputs(q, kv, torch.empty(b, p, d, device="meta"), launch.Sight(128, picks=index), "list", 1.0)
        chunks = launch._chunks(inputs)
        assert [first for first, _ in chunks] == [0, *torch.tensor([n for _, n in chunks]).cumsum(0).tolist()][:-1]
        assert sum(n for _, n in chunks) == t and all(n % launch.CHUNK == 0 for _, n in chunks[:-1])
        each = 2 * 2 * h * sum(launch._slots(inputs)) + 2 * k * d
        assert b * chunks[0][1] * each <= launch.BUDGET


@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(device, monkeypatch, needed):
    monkeypatch.setattr(launch, "DENSE", needed % 2)
    tensors, options = sparse(device, t=7)
    everything = results(attention, tensors, torch.ones_like(tensors[0]), **options)
    kinds, owned = [], launch._owned
    monkeypatch.setattr(launch, "_owned", lambda *a, **k: kinds.append(a[4]) or owned(*a, **k))
    leaves = [x.detach().clone().requires_grad_(i == needed) for i, x in enumerate(tensors)]
    attention(*leaves, **options)[0].sum().backward()
    assert torch.equal(leaves[needed].grad, everything[needed + 2]), NAMES[needed + 2]
    assert kinds == [[], ["window"], ["list"], []][needed] or (needed == 2 and len(kinds) == 1)


def test_atomics_change_nothing_but_the_order(device, monkeypatch):
    tensors, options = sparse(device)
    want = results(attention, tensors, gradient(tensors), **options)
    monkeypatch.setenv("ABYSSAL_ATOMICS", "1")
    kinds, owned = [], launch._owned
    monkeypatch.setattr(launch, "_owned", lambda *a, **k: kinds.append(k.get("atomic", False)) or owned(*a, **k))
    got = results(attention, tensors, gradient(tensors), **options)
    assert kinds == [False, True] and all(error(a, b) < 1e-6 for a, b in zip(got, want))
    monkeypatch.setenv("ABYSSAL_ATOMICS", "yes")
    with pytest.raises(ValueError, match="ABYSSAL_ATOMICS='yes'"):
        results(attention, tensors, gradient(tensors), **options)


# as torch sees it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, small_blocks, backend):
    """Fake tensors cannot be filled with NaN."""
    new_empty = torch.Tensor.new_empty.__closure__
    monkeypatch.setattr(
        torch.Tensor, "new_empty", next(c.cell_contents for c in new_empty if callable(c.cell_contents))
    )


def leaves_of(device, index=True):
    tensors = [x.requires_grad_() for x in make(1, 5, 2, 16, p=6, past=2, device=device)]
    return tensors, picks(1, 5, 3, 6, device) if index else None


@pytest.mark.parametrize("entries", ["none", "range", "picks"])
def test_opcheck(real_memory, device, entries):
    (q, kv, compressed, sink), index = leaves_of(device)
    bounds = (None, None, index) if entries == "picks" else (index[..., 0] * 0, index[..., 0] * 0 + 4, None)
    if entries == "none":
        compressed, bounds = None, (None, None, None)
    torch.library.opcheck(operators._attention, (q, kv, compressed, sink, index[..., 0] * 0, *bounds, 3, 0.3))


def layer(q, kv, compressed, sink, index):
    out, lse = attention(q * 1.1, kv.sin(), compressed.cos(), sink, window=3, scale=0.3, index=index)
    return out.cos().sum() + lse.sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, device, dynamic):
    tensors, index = leaves_of(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*tensors, index), tensors) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_second_backward(device, reentrant):
    tensors, index = leaves_of(device)
    want = torch.autograd.grad(layer(*tensors, index), tensors)
    loss = checkpoint(layer, *tensors, index, use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, tensors))
    loss = layer(*tensors, index)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(error(x.grad, 3 * a) < 1e-6 for a, x in zip(want, tensors))


def test_autocast_does_not_round(device):
    tensors, index = leaves_of(device)
    want, _ = attention(*tensors, window=3, scale=0.3, index=index)
    with torch.autocast(device, torch.bfloat16):
        out, lse = attention(*tensors, window=3, scale=0.3, index=index)
    assert torch.equal(out, want) and lse.dtype == torch.float32


def test_the_log_sum_exp_has_no_gradient(device):
    tensors, index = leaves_of(device)
    with torch.no_grad():
        assert not attention(*tensors, window=3, scale=0.3, index=index)[0].requires_grad
    out, lse = attention(*tensors, window=3, scale=0.3, index=index)
    assert out.requires_grad and not lse.requires_grad


def test_backward_keeps_inputs_output_and_log_sum_exp(device):
    tensors, index = leaves_of(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out, lse = attention(*tensors, window=3, scale=0.3, index=index)
    assert sorted(kept) == sorted(x.shape for x in (*tensors, out, lse, index))
