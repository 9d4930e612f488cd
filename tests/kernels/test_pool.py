"""The compressor's pooling: each engine against the definition, and the definition against loops over Python's numbers.

Axes: b batch · t tokens · p entries · D channels of an entry.
"""

import importlib.util
import inspect
import math

import numpy as np
import pytest
import torch
from oracle import distance, hold
from torch.utils.checkpoint import checkpoint

from abyssal.kernels.pool import eager as eager_engine
from abyssal.kernels.pool import pool
from abyssal.kernels.pool.step import pool_step

f64, f32, bf16, fp16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
overlaps = pytest.mark.parametrize("overlap", [True, False])
gathering = pytest.mark.parametrize("gathered", [True, False])


def engines(*, triton=(f32, bf16), eager=(f64, f32, bf16)):
    """The engines, each with the dtypes given."""
    pairs = [("eager", x, ()) for x in eager] + [("triton", x, needs_triton) for x in triton]
    values = [pytest.param(name, x, marks=marks, id=f"{name}-{str(x)[6:]}") for name, x, marks in pairs]
    return pytest.mark.parametrize("engine, dtype", values, indirect=["engine"])


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """In the interpreter programs are so few and small that entries and channels need several."""
    from abyssal.kernels.pool.triton import launch

    if emulated:
        monkeypatch.setattr(launch, "VALUES", 128)
        monkeypatch.setattr(launch, "PROGRAMS", 6)


@pytest.fixture
def where(engine, device):
    return device if engine == "triton" else "cpu"


def windows(b, t, d, ratio, overlap, first=None, follows=None):
    generator, c = torch.Generator().manual_seed(t), 2 * d if overlap else d
    kv, gate, bias = (torch.randn(s, generator=generator, dtype=f64) for s in ((b, t, c), (b, t, c), (ratio, c)))
    given = {"kv": kv, "gate": 2 * gate, "bias": bias, "ratio": ratio, "overlap": overlap}
    if first is None:
        return given
    first = torch.tensor(first)
    return given | {"first": first, "follows": first > 0 if follows is None else torch.tensor(follows)}


def packed(lengths, ratio):
    """The windows of documents that lie one after the other in one row."""
    first = [sum(lengths[:i]) + start for i, x in enumerate(lengths) for start in range(0, x // ratio * ratio, ratio)]
    follows = [start > 0 for x in lengths for start in range(0, x // ratio * ratio, ratio)]
    return [first], [follows]


def regular(given):
    """The windows that are meant where none are given, by name."""
    kv, ratio = given["kv"], given["ratio"]
    first = torch.arange(0, kv.shape[1] // ratio * ratio, ratio).expand(len(kv), -1)
    return given | {"first": first, "follows": first > 0}


def with_nan(given):
    kv, gate = (given[name].clone() for name in ("kv", "gate"))
    kv[0, 9] = gate[0, 9] = math.nan
    kv[1, 10] = gate[1, 10] = math.inf
    return given | {"kv": kv, "gate": gate}


def extreme(given):
    """Logits up to 2e4, which float32 holds exactly, and the two largest of a window equal."""
    gate, bias = (5e3 * given["gate"]).round(), (3 * given["bias"]).round()
    gate[:, 4:6], bias[1] = 2e4, bias[0]
    return given | {"gate": gate, "bias": bias}


def transposed(given):
    return given | {name: given[name].mT.contiguous().mT for name in ("kv", "gate", "bias")}


LENGTHS = [9, 3, 4, 0, 13]
FIRST = [[4, 4, 6, 5, -1, 2], [-1, 4, 8, 12, 15, 0]]  # unsorted, shared rows, missing entries, gaps, the last row
FOLLOWS = [[True, False, True, True, True, False], [True, False, True, True, False, False]]
SIZES = [(2, 16, 3, 4), (2, 30, 5, 4), (2, 4, 20, 4), (1, 5, 3, 1), (2, 11, 5, 3), (2, 71, 3, 32), (1, 300, 3, 128)]
CASES = {}
for lap in (True, False):
    CASES |= {f"{size}, {lap}": windows(*size, lap) for size in SIZES}
    missing = windows(2, 3, 5, 4, lap, [[-1] * 3] * 2)
    CASES |= {
        f"too few tokens, {lap}": windows(2, 3, 5, 4, lap),
        f"no tokens, {lap}": windows(2, 0, 5, 4, lap),
        f"no batch, {lap}": windows(0, 9, 5, 4, lap),
        f"no entries, {lap}": missing | {"first": missing["first"][:, :0], "follows": missing["follows"][:, :0]},
        f"every entry missing, {lap}": missing | {"follows": missing["first"] < 0},
        f"shared rows, {lap}": windows(2, 19, 5, 4, lap, FIRST, FOLLOWS),
        f"shared rows of many channels, {lap}": windows(2, 19, 20, 4, lap, FIRST, FOLLOWS),
        f"documents, {lap}": windows(1, sum(LENGTHS), 3, 4, lap, *packed(LENGTHS, 4)),
        f"regular windows by name, {lap}": regular(windows(2, 131, 5, 32, lap)),
        f"extreme gates, {lap}": extreme(windows(1, 16, 3, 4, lap)),
        f"extreme gates by name, {lap}": regular(extreme(windows(1, 16, 3, 4, lap))),
        f"not finite, {lap}": with_nan(windows(2, 26, 3, 4, lap)),
        f"not finite by name, {lap}": with_nan(windows(2, 26, 3, 4, lap, [[0, 4, 8, 12], [0, 4, -1, 12]])),
        f"not contiguous, {lap}": transposed(windows(2, 19, 3, 4, lap)),
    }
CASES["follows left out, False"] = windows(2, 19, 5, 4, False, FIRST) | {"follows": None}


def leaves(given, device="cpu", dtype=f32):
    """The three floating inputs, and the options."""
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    tensors = [moved.pop(name).to(dtype if name != "bias" else f32) for name in ("kv", "gate", "bias")]
    return [x.requires_grad_() for x in tensors], moved


def results(tensors, options, backend=None):
    """The entries, and the gradients for fixed upstream ones."""
    out = pool(*tensors, **options, backend=backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


# the definition -------------------------------------------------------------------------------------------------------


def in_loops(kv, gate, bias, ratio, overlap, first, follows):
    """The entries of one row, number by number."""
    d, entries = len(kv[0]) // (2 if overlap else 1), []
    for start, joined in zip(first, follows):
        slots = [(start + r, r, len(kv[0]) - d) for r in range(ratio)]
        slots += [(start - ratio + r, r, 0) for r in range(ratio) if overlap and joined]
        entry = []
        for channel in range(d):
            weights = [math.exp(gate[t][half + channel] + bias[r][half + channel]) for t, r, half in slots]
            pooled = sum(w * kv[t][half + channel] for w, (t, _, half) in zip(weights, slots)) / sum(weights)
            entry.append(0.0 if start < 0 else pooled)
        entries.append(entry)
    return entries


@overlaps
@pytest.mark.parametrize("by_name", [True, False])
def test_the_definition_in_loops(overlap, by_name):
    given = windows(2, 19, 3, 4, overlap, FIRST, FOLLOWS)
    given = given if by_name else windows(2, 19, 3, 4, overlap)
    got, named = pool(**given, backend="reference"), given if by_name else regular(given)
    for b in range(2):
        rows = [named[name][b].tolist() for name in ("kv", "gate", "first", "follows")]
        want = in_loops(*rows[:2], given["bias"].tolist(), 4, overlap, *rows[2:])
        assert distance(got[b], torch.tensor(want, dtype=f64)) < 1e-14


@overlaps
def test_packed_documents_equal_separate_ones(overlap):
    given = CASES[f"documents, {overlap}"]
    (kv, gate, bias), options = leaves(given, dtype=f64)
    got = pool(kv, gate, bias, **options, backend="reference")
    pieces = zip(kv.split(LENGTHS, 1), gate.split(LENGTHS, 1))
    want = [pool(k, z, bias, ratio=4, overlap=overlap, backend="reference") for k, z in pieces]
    assert distance(got, torch.cat(want, 1)) < 1e-7
    joined = pool(kv, gate, bias, **options | {"follows": given["first"] >= 4}, backend="reference")
    assert (distance(joined, got) > 1e-2) == overlap, "the window of another document makes a difference"


@gathering
@overlaps
def test_nan_stays_in_the_entries_of_its_window(overlap, gathered):
    given = windows(2, 24, 3, 4, overlap)
    given["kv"][0, 9] = given["gate"][0, 9] = math.nan
    spoilt = pool(**regular(given) if gathered else given, backend="reference").isnan().all(-1)
    assert spoilt.nonzero().tolist() == ([[0, 2], [0, 3]] if overlap else [[0, 2]])


# every engine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@engines()
def test_entries_and_gradients(engine, dtype, case, where):
    given = CASES[case]
    got = hold(pool, given, engine, dtype, kept=["bias"], device=where)
    assert got["out"].dtype == dtype and got["dbias"].dtype == torch.promote_types(dtype, f32)
    if "first" not in given:
        tail = slice(got["out"].shape[1] * given["ratio"], None)
        assert not got["dkv"][:, tail].any() and not got["dgate"][:, tail].any()


def test_a_missing_entry_is_zero_and_takes_no_gradient(engine, where):
    tensors, options = leaves(windows(1, 8, 3, 4, True, [[-1, 4]], [[True, False]]), where)
    with torch.no_grad():
        tensors[0][:, :4] = tensors[1][:, :4] = math.nan
    for backend in (engine, "reference"):
        out = pool(*tensors, **options, backend=backend)
        dout = torch.ones_like(out)
        dout[:, 0] = math.nan
        assert not out[:, 0].any() and out[:, 1].all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(out, tensors, dout))


def test_the_gradient_of_nan_stays_in_its_document(engine, where):
    (kv, gate, bias), options = leaves(windows(1, 24, 3, 4, True, *packed([12, 12], 4)), where)
    with torch.no_grad():
        kv[:, 12:16] = gate[:, 12:16] = math.nan
    for grad in results([kv, gate, bias], options, engine)[1:3]:
        assert grad[:, :12].isfinite().all() and grad[:, 20:].isfinite().all() and grad[:, 12:16].isnan().any()


@overlaps
def test_windows_by_name_equal_regular_ones(engine, where, overlap):
    given = windows(2, 23, 5, 4, overlap)
    plain, named = (results(*leaves(x, where), engine) for x in (given, regular(given)))
    assert distance(named[0], plain[0]) < (1e-6 if engine == "eager" else 1e-30)
    assert all(distance(a, b) < 2e-6 for a, b in zip(named, plain))


@overlaps
@engines(eager=(bf16, fp16), triton=(bf16, fp16))
def test_halves_are_rounded_once(engine, dtype, overlap, where):
    tensors, options = leaves(windows(2, 37, 5, 4, overlap), dtype=dtype)
    got = pool(*(x.to(where) for x in tensors), **options, backend=engine).cpu().double()
    want = pool(*(x.double() for x in tensors), **options, backend="reference")
    assert ((got - want).abs() / want.abs().clamp_min(1e-3)).max() < 1.01 * torch.finfo(dtype).eps / 2


@gathering
def test_mixed_dtypes_and_autocast(engine, where, gathered):
    given = windows(2, 37, 5, 4, True)
    (kv, gate, bias), options = leaves(regular(given) if gathered else given, where)
    mixed = [x.detach().requires_grad_() for x in (kv.bfloat16(), gate, bias.half())]
    found = results(mixed, options, engine)
    with torch.autocast(where, bf16):
        cast = results(mixed, options, engine)
    assert all(torch.equal(a, b) for a, b in zip(found, cast))
    assert [x.dtype for x in found] == [bf16, bf16, f32, fp16]
    exact = [x.detach().double().requires_grad_() for x in mixed]
    assert all(distance(a, b) < 1e-2 for a, b in zip(found, results(exact, options, "reference")))


def test_inputs_need_not_be_contiguous(engine, where):
    (kv, gate, bias), options = leaves(windows(2, 13, 5, 4, True), where)
    want = results([kv, gate, bias], options, engine)
    both = torch.cat([kv, gate], -1).chunk(2, -1)
    for tensors in ([*both, bias], [kv.mT.contiguous().mT, gate, bias.T.contiguous().T]):
        assert all(torch.equal(a, b) for a, b in zip(want, results(tensors, options, engine)))


@gathering
def test_the_same_bits_on_every_run(engine, where, gathered):
    given = windows(2, 3000 if engine == "eager" else 43, 16, 4, True)
    tensors, options = leaves(regular(given) if gathered else given, where)
    runs = [results(tensors, options, engine) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_an_entry_has_the_same_bits_in_any_batch(engine, where):
    (kv, gate, bias), options = leaves(windows(3, 40, 20, 4, True), where)
    full, few = (pool(x, z, bias, **options, backend=engine) for x, z in ((kv, gate), (kv[1:2, :21], gate[1:2, :21])))
    assert torch.equal(full[1:2, :5], few)
    assert torch.equal(full.flip(0), pool(kv.flip(0), gate.flip(0), bias, **options, backend=engine))


def test_some_gradients_alone_and_twice(engine, where):
    tensors, options = leaves(windows(2, 13, 3, 4, True), where)
    want = torch.autograd.grad(pool(*tensors, **options, backend=engine).sum(), tensors)
    for i in range(3):
        some = [x if i == j else x.detach() for j, x in enumerate(tensors)]
        for _ in range(2):
            loss = pool(*some, **options, backend=engine).sum()
            assert all(
                torch.equal(torch.autograd.grad(loss, some[i], retain_graph=x)[0], want[i]) for x in (True, False)
            )
    with torch.no_grad():
        assert not pool(*tensors, **options, backend=engine).requires_grad


def test_only_the_inputs_are_saved(engine, where):
    tensors, options = leaves(windows(2, 64, 8, 4, True), where)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.untyped_storage().data_ptr()), lambda x: x):
        pool(*tensors, **options, backend=engine)
    assert set(saved) == {x.untyped_storage().data_ptr() for x in tensors}


@gathering
@overlaps
def test_blocks_of_entries_change_nothing(overlap, gathered, monkeypatch):
    given = windows(2, 44, 3, 4, overlap)
    tensors, options = leaves(regular(given) if gathered else given, dtype=f64)
    whole = results(tensors, options, "eager")
    for entries in (1, 3):
        monkeypatch.setattr(eager_engine, "_BLOCK_VALUES", entries * 2 * tensors[2].numel())
        blocks = results(tensors, options, "eager")
        assert torch.equal(whole[0], blocks[0])
        assert all(distance(a, b) < 1e-7 for a, b in zip(whole, blocks))


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("triton", marks=needs_triton)])
def test_the_public_signature(name):
    own = importlib.import_module(f"{pool.__module__}.{name}").pool
    public, own = (inspect.signature(x).parameters for x in (pool, own))
    want = {k: (v.kind, v.default) for k, v in public.items() if k != "backend"}
    assert {k: (v.kind, v.default) for k, v in own.items()} == want


def test_errors_name_the_argument():
    (kv, gate, bias), options = leaves(windows(2, 16, 3, 4, True))
    first = torch.tensor([[0, 4], [0, -1]])
    follows = first > 0
    wrong = {
        "ratio=0": lambda: pool(kv, gate, bias, ratio=0, overlap=True),
        "kv": lambda: pool(kv[..., :5], gate, bias, **options),
        "gate": lambda: pool(kv, gate[:, :3], bias, **options),
        "bias": lambda: pool(kv, gate, bias[:3], **options),
        "first": lambda: pool(kv, gate, bias, first=first[:1], follows=follows, **options),
        "follows": lambda: pool(kv, gate, bias, first=first, follows=follows[:, :1], **options),
        "follows: None": lambda: pool(kv, gate, bias, first=first, **options),
        "follows: given without first": lambda: pool(kv, gate, bias, follows=follows, **options),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
    for bad in (13, -2):
        with pytest.raises(IndexError, match=r"^first"):
            pool(kv, gate, bias, first=torch.full((2, 1), bad), follows=torch.zeros(2, 1, dtype=torch.bool), **options)
    with pytest.raises(IndexError, match=r"^follows"):
        pool(kv, gate, bias, first=first, follows=first >= 0, **options)


# numpy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, limit", [(np.float32, 3e-6), (np.float64, 1e-13)], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1, 300])
@pytest.mark.parametrize("m", [1, 4, 33])
@pytest.mark.parametrize("count, overlap", [(1, False), (1, True), (2, True)])
def test_step(count, overlap, m, scale, dtype, limit):
    """The last of the windows given; logits up to a thousand."""
    given = windows(1, count * m, 3, m, overlap)
    given["gate"] *= scale
    arrays = [given[name].numpy().astype(dtype) for name in ("kv", "gate", "bias")]
    got = pool_step(arrays[0][0], arrays[1][0], arrays[2], overlap)
    exact = (torch.from_numpy(x).double() for x in arrays)
    want = pool(*exact, ratio=m, overlap=overlap, backend="reference")[0, -1]
    assert got.dtype == dtype and distance(torch.from_numpy(got), want) < limit


# Triton ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and poisoned memory would fill gigabytes of a GPU."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def layer(kv, gate, bias, first, follows):
    out = pool(kv.sin(), gate * 2, bias, ratio=4, overlap=True)
    return out.cos().sum() + pool(kv, gate, bias, ratio=4, overlap=True, first=first, follows=follows).sin().sum()


@pytest.fixture
def arguments(device):
    tensors, options = leaves(windows(2, 13, 3, 4, True, [[0, 4, 9], [-1, 5, 1]], [[False, False, True]] * 2), device)
    return [*tensors, options["first"], options["first"] > 4]


@needs_triton
@gathering
def test_opcheck(real_memory, arguments, gathered):
    from abyssal.kernels.pool import triton

    torch.library.opcheck(triton._pool, (*arguments[:3], *(arguments[3:] if gathered else (None, None)), 4, True))


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, arguments, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(*arguments), arguments[:3]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


@needs_triton
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(by_triton, arguments, reentrant):
    want = torch.autograd.grad(layer(*arguments), arguments[:3])
    checkpoint(layer, *arguments, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, x.grad) for a, x in zip(want, arguments))


# on a GPU, at sizes with many programs --------------------------------------------------------------------------------

REAL = [(4, 512, True), (4, 128, True), (128, 512, False), (3, 20, True), (100, 72, False)]


def real(ratio, d, overlap, gathered):
    """Windows of documents of 700 tokens, the last of which leaves a gap; the second row has no entry at its end."""
    first = torch.cat([torch.arange(o, o + 700 - ratio + 1, ratio) for o in range(0, 2302, 700)]).expand(2, -1).clone()
    follows = first % 700 > 0
    first[1:, -2:] = -1
    return windows(2, 3001, d, ratio, overlap) | ({"first": first, "follows": follows} if gathered else {})


@pytest.mark.gpu
@gathering
@pytest.mark.parametrize("dtype", [f32, bf16, fp16], ids=str)
@pytest.mark.parametrize("ratio, d, overlap", REAL)
def test_real_sizes(real_memory, ratio, d, overlap, dtype, gathered):
    given = real(ratio, d, overlap, gathered)
    got = hold(
        pool, given, "triton", dtype, kept=["bias"], limits={} if dtype != f32 else {"dbias": 1e-5}, device="cuda"
    )
    again = hold(pool, given, "triton", dtype, kept=["bias"], limits={"dbias": 1}, device="cuda")
    assert all(torch.equal(x, again[name]) for name, x in got.items())


@pytest.mark.gpu
@pytest.mark.parametrize("ratio, d, overlap", REAL)
def test_an_entry_does_not_depend_on_its_batch(real_memory, ratio, d, overlap):
    (kv, gate, bias), options = leaves(real(ratio, d, overlap, False), "cuda")
    few = pool(kv[1:, : 7 * ratio + 1], gate[1:, : 7 * ratio + 1], bias, **options)
    assert torch.equal(pool(kv, gate, bias, **options)[1:, :7], few)


@pytest.mark.gpu
@gathering
def test_a_cuda_graph_replays_other_values(real_memory, gathered):
    (kv, gate, bias), options = leaves(real(4, 128, True, gathered), "cuda")
    dout = torch.randn_like(pool(kv, gate, bias, **options))

    def step():
        tensors = [x.detach().requires_grad_() for x in (kv, gate, bias)]
        return torch.autograd.grad(pool(*tensors, **options), tensors, dout)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    kv.data.normal_(), gate.data.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.gpu
@gathering
def test_nothing_waits_for_the_device(real_memory, gathered):
    tensors, options = leaves(real(4, 128, True, gathered), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pool(*tensors, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nothing_is_kept_for_the_backward_pass(real_memory):
    tensors, options = leaves(real(4, 128, True, False), "cuda")
    before = torch.cuda.memory_allocated()
    out = pool(*tensors, **options)
    assert torch.cuda.memory_allocated() - before - out.nbytes < 100_000
