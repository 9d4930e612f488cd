"""Engram: its definition against published numbers and plain Python, its engines against the definition; tokenizer
compression.
"""

import importlib
import inspect
import math
import unicodedata

import numpy as np
import pytest
import torch
from oracle import assert_same, hold
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import engram
from abyssal.kernels.engram import (
    compress_vocabulary,
    eager,
    engram_gate,
    engram_gather,
    engram_hash,
    engram_layout,
    engram_multipliers,
    engram_primes,
    reference,
)
from abyssal.kernels.engram.layout import _is_prime
from abyssal.kernels.engram.vocabulary import normalise

V41 = {"classes": 99_092, "vocab_size": 16_000_000, "max_ngram": 4, "heads": 8}
FLOATS = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # once; a gradient's upstream is rounded too
LEARNED = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1.3e-3,
}  # upstream is rounded


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(eager, "VALUES", 100)


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """In the interpreter a few tokens fill several blocks, strips and rounds of a loop."""
    from abyssal.kernels.engram.triton import launch
    from abyssal.kernels.triton import scatter

    if emulated:
        for name, value in {"ELEMENTS": 64, "STRIP": 3, "STRIPS": 3, "SHARES": 2}.items():
            monkeypatch.setattr(launch, name, value)
        monkeypatch.setattr(scatter, "ROWS", 2)


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def drawing(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def whole(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["engram_hash", "engram_gather", "engram_gate"])
def test_one_signature(engine, name):
    public = dict(inspect.signature(getattr(engram, name)).parameters)
    public.pop("backend")
    for module in (reference, importlib.import_module(f"abyssal.kernels.engram.{engine}")):
        given = inspect.signature(getattr(module, name)).parameters
        assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in given.items()}


# tables --------------------------------------------------------------------------------------------------------------


def test_primes_are_those_of_a_sieve():
    sieve = np.ones(20_000, dtype=bool)
    sieve[:2] = False
    for i in range(2, 142):
        sieve[i * i :: i] &= ~sieve[i]
    assert [n for n in range(20_000) if _is_prime(n)] == sieve.nonzero()[0].tolist()
    for composite in (3_215_031_751, 3_474_749_660_383, 341_550_071_728_321, (2**31 - 1) ** 2):  # strong pseudoprimes
        assert not _is_prime(composite)
    assert _is_prime(2**61 - 1) and _is_prime(2**31 - 1)


def test_multipliers_of_the_release():
    assert engram_multipliers(99_092, 4, 1).tolist() == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    layer_14 = [67716810739261, 51510806800915, 30921347202721, 82619226485591]
    assert engram_multipliers(99_092, 4, 14).tolist() == layer_14
    assert engram_multipliers(99_092, 4, 1, seed=1).tolist() != engram_multipliers(99_092, 4, 1).tolist()
    for classes in (1, 512, 99_092, 2**62):
        m = engram_multipliers(classes, 4, 3)
        assert m.dtype == np.int64 and all(v % 2 == 1 and v * (classes - 1) < 2**63 for v in m.tolist())


def test_tables_of_the_release():
    first, second = engram_layout([1, 14], **V41).values()
    assert first.moduli[0][:3] == [16000057, 16000079, 16000081] and first.moduli[2][7] == 16000463
    assert second.moduli[0][0] == 16000477 and second.moduli[2][7] == 16000889
    assert (first.rows, second.rows) == (384_006_168, 384_016_682)
    assert (first.rows + second.rows) * 256 == 196_613_849_600
    assert first.multipliers == engram_multipliers(99_092, 4, 1).tolist()


def test_tables_of_the_demo_and_of_the_paper():
    demo = engram_layout([1, 15], classes=1000, vocab_size=646_400, max_ngram=3, heads=8)
    assert demo[1].moduli[0] == [646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523]
    assert (demo[1].moduli[1][0], demo[1].moduli[1][7]) == (646537, 646619)
    assert [order[0] for order in demo[15].moduli] == [646631, 646781]
    assert (demo[1].rows, demo[15].rows) == (10_344_164, 10_348_242)
    for vocab_size, billions in ((2_262_400, 5.792), (7_239_680, 18.534)):
        tables = engram_layout([1, 14], classes=99_092, vocab_size=vocab_size, max_ngram=3, heads=8).values()
        assert sum(t.rows for t in tables) * 80 / 1e9 == pytest.approx(billions, abs=1e-3)


def test_no_prime_is_given_out_twice_and_offsets_are_exclusive_sums():
    layout = engram_layout([0, 1, 2], classes=10, vocab_size=50, max_ngram=4, heads=3)
    primes = [p for table in layout.values() for order in table.moduli for p in order]
    assert len(set(primes)) == len(primes) == 27 and min(primes) == 53
    for table in layout.values():
        flat = [p for order in table.moduli for p in order]
        assert table.offsets == [sum(flat[:i]) for i in range(9)] and table.rows == sum(flat)
    assert engram_primes(2, 0, 2, 1) == []


@pytest.mark.parametrize("bad", [{"vocab_size": 1}, {"max_ngram": 1}, {"heads": 0}, {"classes": 0}, {"seed": -1}])
def test_layout_refuses_by_name(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
        engram_layout([1], **{**V41, **bad})


# hash ----------------------------------------------------------------------------------------------------------------


def addresses(vocab_size=1000, heads=3, max_ngram=4, device="cpu"):
    layout = engram_layout([1, 14], **V41 | {"vocab_size": vocab_size, "heads": heads, "max_ngram": max_ngram})[1]
    return {name: torch.tensor(getattr(layout, name), device=device) for name in ("multipliers", "moduli", "offsets")}


GOLDEN = [
    [5412672, 2319102, 15493752, 7788297, 350501, 4420638],
    [4465417, 3956365, 1504235, 12469394, 13483205, 11535276],
    [379248, 2191136, 13970635, 4327030, 928962, 12736872],
    [11738160, 7620608, 7598184, 14316456, 7353253, 9277014],
    [7905795, 14439908, 503619, 7298820, 8577528, 68808],
]


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_hash_of_the_release(backend):
    """V4.1's layer 1: two heads of orders 2, 3 and 4."""
    where = addresses(16_000_000, 8)
    rows = engram_hash(torch.tensor([[5, 17, 99091, 0, 42]]), **where, pad=2, backend=backend)
    assert (rows - where["offsets"])[0][:, [0, 1, 8, 9, 16, 17]].tolist() == GOLDEN
    assert rows.dtype == torch.int64 and rows.shape == (1, 5, 24)
    assert (rows >= where["offsets"]).all() and (rows < where["offsets"] + where["moduli"].flatten()).all()


def hash_of_last(sequence, multipliers, moduli, offsets, pad, first=0):
    """Rows of the last token of a list, in Python integers; only `sequence[first:]` is its document."""
    mix, rows, t = 0, [], len(sequence) - 1
    for back, multiplier in enumerate(multipliers.tolist()):
        mix ^= (sequence[t - back] if t - back >= max(first, 0) else pad) * multiplier
        rows += [mix % p for p in moduli[back - 1].tolist()] if back else []
    return [r + o for r, o in zip(rows, offsets.tolist())]


@pytest.mark.parametrize("max_ngram", [2, 3, 4])
def test_definition_of_the_hash(max_ngram):
    """In documents from columns 0, 5 and 6, and after three tokens of history of which the last two count."""
    where, ids = addresses(max_ngram=max_ngram), whole(0, 99_092, 2, 12)
    start = torch.tensor([[0] * 5 + [5] + [6] * 6, [1 - max_ngram] * 12])
    history = whole(0, 99_092, 2, max_ngram - 1, seed=1)
    rows = engram_hash(ids, **where, pad=3, start=start, history=history, backend="reference")
    known, past = torch.cat([history, ids], 1), max_ngram - 1
    for b, t in np.ndindex(2, 12):
        want = hash_of_last(known[b, : past + t + 1].tolist(), **where, pad=3, first=past + int(start[b, t]))
        assert rows[b, t].tolist() == want


def hashes():
    for max_ngram, heads in ((2, 1), (2, 8), (4, 1), (4, 3), (4, 8)):
        t = 270 // heads // 2  # several programs
        ids, start = whole(0, 99_092, 3, t), (torch.arange(t) // 5 * 5).repeat(3, 1)
        start[1] = -1
        given = {"ids": ids, **addresses(heads=heads, max_ngram=max_ngram), "pad": 99_091}
        history = {"history": whole(0, 99_092, 3, max_ngram - 1, seed=1)}
        for name, begins in {"": None, "documents": start, "shared": start[:1], "earlier": start - 2}.items():
            for before in ({}, history):
                yield (
                    f"{name} {max_ngram}-grams {heads} heads {'after' * bool(before)}",
                    given | {"start": begins} | before,
                )
    given = {**addresses(), "pad": -1}
    yield "columns first", given | {"ids": ids.T.contiguous().T}
    yield "large and negative", given | {"ids": torch.tensor([[2**62, -1, 2**40, -(2**62), 3]])}
    for shape in ((2, 0), (0, 3), (1, 1)):
        yield f"few {shape}", given | {"ids": torch.full(shape, 5)}


HASHES = dict(hashes())


@pytest.mark.parametrize("name", HASHES)
def test_hash(engine, name, device):
    got = hold(engram_hash, HASHES[name], engine, torch.float32, device=device)["out"].cpu()
    assert got.dtype == torch.int64 and (got >= HASHES[name]["offsets"]).all()


def test_a_document_is_hashed_as_if_alone(engine, device):
    where, ids = addresses(heads=2, device=device), whole(0, 99_092, 1, 12).to(device)
    start = torch.tensor([[0] * 5 + [5] + [6] * 6], device=device)
    rows = engram_hash(ids, **where, pad=3, start=start, backend=engine)
    for a, z in ((0, 5), (5, 6), (6, 12)):
        assert torch.equal(rows[:, a:z], engram_hash(ids[:, a:z], **where, pad=3, backend=engine))
    ids[0, 7] += 1
    changed = (engram_hash(ids, **where, pad=3, start=start, backend=engine) != rows).any(-1)[0].tolist()
    assert changed == [t in (7, 8, 9, 10) for t in range(12)]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 11])
def test_decoding_in_pieces_equals_the_whole(engine, piece, device):
    where, pad, ids = addresses(heads=2, device=device), 9, whole(0, 99_092, 2, 11).to(device)
    for start in (None, torch.tensor([[0] * 4 + [4] * 7, [0] * 11], device=device)):
        want = engram_hash(ids, **where, pad=pad, start=start, backend=engine)
        history, got = torch.full((2, 3), pad, device=device), []
        for a in range(0, 11, piece):
            part = ids[:, a : a + piece]
            begins = None if start is None else start[:, a : a + piece] - a
            got.append(engram_hash(part, **where, pad=pad, start=begins, history=history, backend=engine))
            history = torch.cat([history, part], 1)[:, -3:]
        assert torch.equal(torch.cat(got, 1), want)


def test_hash_refusals_name_the_argument():
    where = addresses(heads=2)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    for message, changes in {
        r"ids is torch\.int32": {"ids": ids.int()},
        r"ids has shape \(0,\)": {"ids": ids[0]},
        r"moduli has shape": {"moduli": where["moduli"][:2]},
        r"offsets has shape": {"offsets": where["offsets"][:2]},
        r"multipliers has shape": {"multipliers": where["multipliers"][:1]},
        r"start has shape": {"start": torch.zeros(3, 0)},
        r"history has shape": {"history": torch.zeros(2, 2)},
    }.items():
        with pytest.raises(ValueError, match=message):
            engram_hash(**{"ids": ids, "pad": 0, **where, **changes})


# gather --------------------------------------------------------------------------------------------------------------


def lookup(r, w, *shape):
    return {"table": drawing(r)(r, w), "rows": whole(0, r, *shape, seed=r)}


GATHERS = {
    "odd": lookup(9, 5, 2, 7, 3),
    "wide": lookup(4, 70, 1, 5, 2),
    "one row for all": lookup(1, 1, 1, 9, 1),
    "most rows for none": lookup(30, 16, 1, 1, 2),
    "no tokens": lookup(5, 3, 1, 0, 2),
    "columns first": {"table": drawing()(3, 4).T, "rows": whole(0, 4, 1, 2, 2)},
}


@pytest.mark.parametrize("name", GATHERS)
def test_gather(engine, name, device):
    for dtype in FLOATS[engine]:
        limits = {"out": 0.0} | ({"dtable": LEARNED[dtype]} if engine == "triton" else {})
        got = hold(engram_gather, GATHERS[name], engine, dtype, limits=limits, device=device)
        assert got["out"].dtype == got["dtable"].dtype == dtype


def test_definition_of_the_gather():
    table, rows = torch.arange(6.0).view(3, 2).requires_grad_(), torch.tensor([[[2, 0], [2, 2]]])
    out = engram_gather(table, rows, backend="reference")
    assert out.tolist() == [[[4, 5, 0, 1], [4, 5, 4, 5]]]
    out.backward(torch.arange(8.0).view(1, 2, 4))
    assert table.grad.tolist() == [[2, 3], [0, 0], [0 + 4 + 6, 1 + 5 + 7]]


def test_unknown_rows(engine, device):
    table, rows = torch.ones(3, 2, device=device), torch.tensor([[[0, 2], [3, -1]]], device=device)
    if engine == "triton":
        out = engram_gather(table, rows, backend=engine)[0]
        assert (out[0] == 1).all() and out[1].isnan().all()
        return
    for backend in ("reference", "eager"):
        for row in (3, -1):
            with pytest.raises(IndexError):
                engram_gather(table.cpu(), torch.full((1, 1, 1), row), backend=backend)


def test_a_nan_gradient_stays_in_its_row(engine, device):
    table = torch.zeros(3, 4, device=device, requires_grad=True)
    grad = torch.ones(1, 5, 4, device=device)
    grad[0, 2] = math.nan
    engram_gather(table, torch.tensor([[[0], [1], [1], [2], [0]]], device=device), backend=engine).backward(grad)
    assert table.grad[1].isnan().all() and table.grad[[0, 2]].sum(1).tolist() == [8.0, 4.0]


def test_collisions_add_up_in_the_order_of_the_tokens(by_triton, device):
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

WEIGHTS = ("weight_h", "weight_k")


def gating(b=2, t=7, n=4, d=12, eps=1e-6, seed=0):
    draw = drawing(seed)
    streams, key, value = 3 * draw(b, t, n, d), 2 * draw(b, t, n, d), draw(b, t, d)
    return {
        "streams": streams, "key": key, "value": value, "weight_h": draw(n, d), "weight_k": draw(n, d) + 1, "eps": eps
    }  # fmt: skip


def orthogonal():
    """Logits of 0, -0, +-1e-7 and two that float32 cannot hold."""
    streams, key = torch.zeros(1, 6, 1, 4), torch.zeros(1, 6, 1, 4)
    streams[..., 0], key[..., 1], key[0, 1, 0, 0], key[0, 2, 0, 0] = 1.0, 1.0, 1e-7, -1e-7
    streams[0, 3] = -0.0
    streams[0, 4:, 0, 0], key[0, 4:, 0, 0] = 1e-22, torch.tensor([1e-23, -1e-23])
    ones = torch.ones(1, 6, 4), torch.ones(1, 4), torch.ones(1, 4)
    return dict(zip(("streams", "key", "value", *WEIGHTS), (streams, key, *ones))) | {"eps": 1e-20}


SIZES = [(7, 4, 12), (1, 4, 8), (1, 1, 8), (19, 1, 33), (5, 2, 256), (3, 3, 70)]
GATES = {f"t{t} n{n} d{d} eps {eps}": gating(t=t, n=n, d=d, eps=eps) for t, n, d in SIZES for eps in (1e-20, 1e-2)}
GATES["one channel"] = gating(t=5, n=2, d=1, eps=1e-2)
GATES["no tokens"] = gating(t=0)
GATES["eps is all of the norm"] = gating(t=3, d=8) | {"streams": 1e-12 * drawing()(2, 3, 4, 8)}
GATES["orthogonal"] = orthogonal()
GATES["channels first"] = gating() | {"streams": drawing()(2, 7, 12, 4).mT}


@pytest.mark.parametrize("name", GATES)
def test_gate(engine, name, device):
    gradients = [f"d{x}" for x in GATES[name]]
    for dtype in FLOATS[engine]:
        if name == "orthogonal" and dtype in ROUNDED:
            continue  # does not hold such values
        limits = dict.fromkeys(gradients, LEARNED[dtype]) | ({"out": ROUNDED[dtype]} if dtype in ROUNDED else {})
        got = hold(engram_gate, GATES[name], engine, dtype, kept=WEIGHTS, limits=limits, device=device)
        assert all(got[x].dtype == dtype for x in ("out", "dstreams", "dkey", "dvalue"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_of_half_precision_keys_under_autocast(engine, dtype, device):
    limits = {f"d{x}": LEARNED[torch.bfloat16] for x in gating()} | {"out": ROUNDED.get(dtype, 2e-6)}
    with torch.autocast(device, torch.bfloat16):
        kept = (*WEIGHTS, "streams") if dtype == torch.float32 else WEIGHTS
        got = hold(engram_gate, gating(d=40), engine, torch.bfloat16, kept=kept, limits=limits, device=device)
    assert got["out"].dtype == dtype


def test_gate_of_large_logits(engine, device):
    inputs = gating(t=3, d=8)
    inputs["weight_h"] *= 1e4
    hold(engram_gate, inputs, engine, torch.float32, limits={f"d{x}": 1e-4 for x in inputs}, device=device)


@pytest.mark.parametrize("sign", [1, -1])
def test_definition_of_the_gate(sign):
    """One stream of two channels, by hand; and below the clamp, by the sign bit, where only the value learns."""
    h, k, w, v = (3.0, 1.0), (sign * 2.0, 0.5), (0.7, 1.3), (5.0, -7.0)
    rms = [math.sqrt((x * x + y * y) / 2 + 0.1) for x, y in (h, k)]
    s = sum(a * b * c for a, b, c in zip(h, k, w)) / (rms[0] * rms[1]) / math.sqrt(2)
    want = [x / (1 + math.exp(-math.copysign(math.sqrt(abs(s)), s))) for x in v]
    one = lambda *x: torch.tensor(x, dtype=torch.float64).view(1, 1, 1, -1)  # noqa: E731
    got = engram_gate(one(*h), one(*k), one(*v)[0], one(*w)[0, 0], one(1, 1)[0, 0], eps=0.1, backend="reference")
    assert got.flatten().tolist() == pytest.approx(want, abs=1e-14)
    leaves = [x.requires_grad_() for x in (one(1, 0), one(sign * 1e-7, 1), one(1, 1)[0], one(1, 1)[0, 0])]
    out = engram_gate(*leaves, one(1, 1)[0, 0], eps=0.0, backend="reference")
    out.sum().backward()
    small = 1 / (1 + math.exp(-1e-3 * sign))
    assert out.flatten().tolist() == pytest.approx([small] * 2, abs=1e-14)
    assert [bool(x.grad.any()) for x in leaves] == [False, False, True, False]


def test_gate_takes_slices_and_strides(engine, device):
    streams, _, _, *weights, _ = (x.to(device) if isinstance(x, torch.Tensor) else x for x in gating(t=5).values())
    both = drawing(3)(2, 5, 5, 12).to(device).requires_grad_()
    turn = (lambda x: x.clone()) if engine == "eager" else lambda x: x.mT.contiguous().mT  # eager sums in another order
    leaf, grad = streams.clone().requires_grad_(), drawing(4)(2, 5, 4, 12).to(device)
    engram_gate(leaf, both[:, :, :4], both[:, :, 4], *weights, eps=1e-6, backend=engine).backward(turn(grad))
    key, value = (x.detach().clone().requires_grad_() for x in (both[:, :, :4], both[:, :, 4]))
    turned, apart = turn(streams).requires_grad_(), [w.T.contiguous().T for w in weights]
    engram_gate(turned, key, value, *apart, eps=1e-6, backend=engine).backward(grad)
    assert torch.equal(both.grad, torch.cat([key.grad, value.grad[:, :, None]], 2))
    assert torch.equal(leaf.grad, turned.grad)


def gated(inputs, engine, tokens=slice(None), grad=None):
    """The result and all gradients."""
    leaves = [x.detach() if x.ndim == 2 else x.detach()[:, tokens] for x in inputs]
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = engram_gate(*leaves, eps=1e-6, backend=engine)
    grad = torch.ones_like(out) if grad is None else grad[:, tokens]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_a_token_has_the_same_bits_in_any_company(engine, device):
    *inputs, _ = gating(t=11).values()
    inputs, grad = [x.to(device) for x in inputs], drawing(1)(2, 11, 4, 12).to(device)
    first, again, part = (gated(inputs, engine, slice(t), grad) for t in (11, 11, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(a[:, :5], b) for a, b in zip(first[:4], part))
    inputs[0][1, 3, 2, 5], inputs[1][0, 1, 0, 3], inputs[2][0, 0, 1] = math.nan, math.inf, -math.inf
    spoilt = gated(inputs, engine, grad=grad)
    assert spoilt[0][1, 3, 2].isnan().all() and not spoilt[0][1, 3, [0, 1, 3]].isnan().any()
    others = torch.ones(2, 11, dtype=torch.bool)
    others[1, 3] = others[0, 1] = others[0, 0] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(first[:4], spoilt))


def test_gate_keeps_three_scalars_per_token_and_stream(engine, device):
    *inputs, _ = gating().values()
    leaves, kept = [x.to(device).requires_grad_() for x in inputs], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        engram_gate(*leaves, eps=1e-6, backend=engine)
    assert sum(kept) == sum(x.numel() for x in inputs) + 3 * 2 * 7 * 4


def test_gate_refusals_name_the_argument():
    inputs = gating()
    for message, changes in {
        "expected the same": {"key": inputs["key"][:, :, :2]},
        "value has shape": {"value": inputs["key"]},
        "weight_h has shape": {"weight_h": inputs["weight_h"][0]},
        "weight_k has shape": {"weight_k": inputs["weight_k"][:1]},
    }.items():
        with pytest.raises(ValueError, match=message):
            engram_gate(**inputs | changes)


# as operators --------------------------------------------------------------------------------------------------------


def layer(backend, ids, where, table, streams, wkv, weight_h, weight_k):
    """From ids to what the memory writes, as `model.engram` does it."""
    rows = engram_hash(ids, **where, pad=1, start=torch.zeros_like(ids), backend=backend)
    keys = (engram_gather(table.sin(), rows, backend=backend) @ wkv).unflatten(-1, (3, 4))
    out = engram_gate(streams.cos(), keys[:, :, :2], keys[:, :, 2], weight_h, weight_k, eps=1e-6, backend=backend)
    return out.sin().sum()


@pytest.fixture
def inputs(device):
    shapes, draw = ((60, 5), (2, 6, 2, 4), (10, 12), (2, 4), (2, 4)), drawing()
    leaves = [draw(*shape).to(device).requires_grad_() for shape in shapes]
    return whole(0, 50, 2, 6).to(device), addresses(20, 1, 3, device), *leaves


def test_all_learn_what_is_asked_of_them_and_backward_twice_adds_up(engine, inputs):
    want = torch.autograd.grad(layer(engine, *inputs), inputs[2:])
    for learns in range(5):
        leaves = [t.detach().requires_grad_(i == learns) for i, t in enumerate(inputs[2:])]
        layer(engine, *inputs[:2], *leaves).backward()
        assert torch.equal(leaves[learns].grad, want[learns])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != learns)
    with torch.no_grad():
        assert not layer(engine, *inputs).requires_grad
    loss = layer(engine, *inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(2 * a, t.grad) for a, t in zip(want, inputs[2:]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_looks_up_twice_and_learns_once(engine, inputs, reentrant):
    want = torch.autograd.grad(layer(engine, *inputs), inputs[2:])
    checkpoint(layer, engine, *inputs, use_reentrant=reentrant).backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(want, inputs[2:]))


@pytest.mark.parametrize("op", ["hash", "gather", "gather backward", "gate", "gate backward"])
def test_opcheck(real_memory, inputs, device, op):
    from abyssal.kernels.engram import triton

    (ids, where, table, *_), check = inputs, torch.library.opcheck
    *leaves, _ = gating().values()
    gate = [(x if x.ndim == 2 else x.flatten(0, 1)).to(device) for x in leaves]
    if op == "hash":
        check(triton._hash, (ids, *where.values(), 2, None, None))
        check(triton._hash, (ids, *where.values(), 2, torch.zeros_like(ids), torch.zeros_like(ids[:, :2])))
    elif op == "gather":
        check(triton._gather, (table, ids.flatten()))
    elif op == "gather backward":
        check(triton._sum_lookups, (torch.randn(12, 5, device=device), ids.flatten(), 60))
    elif op == "gate":
        check(triton._gated, (*(x.requires_grad_() for x in gate), 1e-6))
    else:
        out, *kept = triton._gated(*gate, 1e-6)
        check(triton._gate_gradients, (out, *gate, *kept))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, inputs, dynamic):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f("triton", *inputs), inputs[2:]) for f in (layer, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


# at V4.1's widths on a CUDA device -----------------------------------------------------------------------------------

T, N, D, W = 1500, 4, 5120, 256


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_gate(real_memory, dtype):
    limits = {f"d{x}": LEARNED[dtype] for x in gating()} | {"out": ROUNDED.get(dtype, 5e-6)}
    inputs = gating(1, T, N, D, eps=1e-20)
    hold(engram_gate, inputs, "triton", dtype, kept=WEIGHTS, limits=limits, device="cuda")
    *leaves, _ = inputs.values()
    leaves = [x.cuda() if x.ndim == 2 else x.to("cuda", dtype) for x in leaves]
    grad = torch.randn(1, T, N, D, device="cuda", dtype=dtype)
    first, again, part = (gated(leaves, "triton", slice(t), grad) for t in (T, T, 37))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(a[:, :37], b) for a, b in zip(first[:4], part))


@pytest.mark.gpu
def test_gpu_hash(real_memory):
    start = (torch.arange(4000) // 77 * 77).expand(3, -1)
    given = {"ids": whole(0, 99_092, 3, 4000), **addresses(16_000_000, 8), "pad": 2, "start": start}
    hold(engram_hash, given, "triton", torch.float32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gather_past_two_to_the_31(real_memory, dtype):
    """A table of 2^31 values and more, and one row that half of all look-ups share."""
    r = 2**31 // W + 100
    table = torch.zeros(r, W, device="cuda", dtype=dtype)
    table[-100:] = torch.randn(100, W, device="cuda").to(dtype)
    rows = torch.randint(r - 100, r, (1, 3000, 24), device="cuda")
    rows[:, ::2] = r - 1
    assert torch.equal(engram_gather(table, rows), engram_gather(table, rows, backend="reference"))
    small, at = table[-100:].clone().requires_grad_(), rows - (r - 100)
    grad = torch.randn(1, 3000, 24 * W, device="cuda", dtype=dtype)
    once, twice = (torch.autograd.grad(engram_gather(small, at), small, grad)[0] for _ in range(2))
    assert torch.equal(once, twice)
    want = torch.zeros(100, W, device="cuda", dtype=torch.float64)
    want.index_add_(0, at.flatten(), grad.double().view(-1, W))
    assert_same("dtable", once, want, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
def test_gpu_graph_replays_and_nothing_waits(real_memory):
    where = addresses(16_000_000, 8, device="cuda")
    table = torch.randn(400_000_000 // 256, 256, device="cuda").requires_grad_()
    ids, wkv = torch.randint(0, 99_092, (1, 200), device="cuda"), torch.randn(24 * 256, 5 * D, device="cuda") * 0.01
    streams, _, _, *weights, _ = (torch.as_tensor(x).cuda() for x in gating(1, 200, N, D).values())
    leaves = [x.requires_grad_() for x in (streams, *weights, table)]

    def step():
        rows = engram_hash(ids, **where, pad=2) % len(table)
        keys = (engram_gather(table, rows) @ wkv).unflatten(-1, (5, D))
        out = engram_gate(leaves[0], keys[:, :, :4], keys[:, :, 4], *leaves[1:3], eps=1e-20)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    for _ in range(2):
        ids.copy_(torch.randint_like(ids, 99_092))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(kept, step()))


@pytest.mark.gpu
def test_gpu_memory_kept_for_the_backward_pass(real_memory):
    *inputs, _ = gating(1, T, N, D).values()
    leaves = [x.to("cuda", torch.bfloat16 if x.ndim > 2 else x.dtype).requires_grad_() for x in inputs]
    before = torch.cuda.memory_allocated()
    out = engram_gate(*leaves, eps=1e-20)
    assert torch.cuda.memory_allocated() - before - out.nbytes <= 3 * 4 * T * N + 10_000


# tokenizer compression -----------------------------------------------------------------------------------------------


def test_compression_joins_case_accents_and_spacing():
    texts = [
        "The",
        " the",
        "THE",
        "thé",
        "ﬁ",
        "fi",
        " ",
        "\n\t ",
        "\u00a0",
        "",
        "a b",
        "a \n b",
        "Σ",
        "σ",
        "ΌΔΌΣ",
        "οδοσ",
    ]
    lookup, classes = compress_vocabulary(texts)
    assert lookup.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6, 6]
    assert classes == 7 and lookup.dtype == torch.int64


def test_compression_keeps_pieces_of_characters_apart():
    texts, tokens = ["\ufffd", "\ufffd", "ok", " \ufffd", "\ufffd"], ["Ã", "Â", "ok", "ĠÂ", "Ã"]
    lookup, classes = compress_vocabulary(texts, tokens)
    assert lookup.tolist() == [0, 1, 2, 3, 0] and classes == 4
    assert compress_vocabulary(texts)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="tokens has 2 entries: expected 5"):
        compress_vocabulary(texts, tokens[:2])
    assert compress_vocabulary([])[1] == 0


def test_an_empty_normal_form_stands_for_itself():
    """Accents or controls alone normalise to nothing: each text is then its own key."""
    lookup, classes = compress_vocabulary(["\u0301", "\u0300", "\u000b", "\u0301", "\u2028"])
    assert lookup.tolist() == [0, 1, 2, 0, 3] and classes == 4


def test_normal_form_agrees_with_the_tokenizers_library():
    tokenizers = pytest.importorskip("tokenizers")
    n = tokenizers.normalizers
    steps = [n.NFKC(), n.NFD(), n.StripAccents(), n.Lowercase(), n.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " ")]
    steps += [n.Replace(tokenizers.Regex(r"^ $"), "\ue000"), n.Strip(), n.Replace("\ue000", " ")]
    theirs = n.Sequence(steps)
    old = [chr(c) for c in range(0x3400) if unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]  # in every Unicode table
    texts = [*old, *(f"A{c}b" for c in old), *(f" {c} " for c in old), *(c + "\u0301\n" for c in old)]
    texts += ["  Hello\t World\r\n", "ÅÉÎ", "İstanbul", "ﬃ", "½", "\ue000", " \ue000", "ΣΑΣ", "\x1c", "\x85x\u3000"]
    different = [t for t in texts if normalise(t) != theirs.normalize_str(t)]
    assert not different, different[:5]
