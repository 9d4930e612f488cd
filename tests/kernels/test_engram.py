"""Engram: published numbers of the hash, look-back rules, the gate against autograd, tokenizer compression."""

import math
import unicodedata

import numpy as np
import pytest
import torch

from abyssal.kernels.engram import (
    compress_vocabulary,
    eager,
    engram_gate,
    engram_hash,
    engram_layout,
    engram_multipliers,
    engram_primes,
)
from abyssal.kernels.engram.layout import _is_prime
from abyssal.kernels.engram.vocabulary import normalise

V41 = {"classes": 99_092, "vocab_size": 16_000_000, "max_ngram": 4, "heads": 8}


def relative_rms(name, got, want, limit=2e-6):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error < limit, f"{name}: relative RMS error {error:.2e}"


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


def tables(layer=1, **changes):
    layout = engram_layout([1, 14], **{**V41, **changes})[layer]
    return torch.tensor(layout.multipliers), torch.tensor(layout.moduli), torch.tensor(layout.offsets)


GOLDEN = [
    [5412672, 2319102, 15493752, 7788297, 350501, 4420638],
    [4465417, 3956365, 1504235, 12469394, 13483205, 11535276],
    [379248, 2191136, 13970635, 4327030, 928962, 12736872],
    [11738160, 7620608, 7598184, 14316456, 7353253, 9277014],
    [7905795, 14439908, 503619, 7298820, 8577528, 68808],
]


def test_hash_of_the_release():
    multipliers, moduli, offsets = tables()
    rows = engram_hash(torch.tensor([[5, 17, 99091, 0, 42]]), multipliers, moduli, offsets, pad=2)
    columns = [0, 1, 8, 9, 16, 17]
    assert (rows - offsets)[0][:, columns].tolist() == GOLDEN
    assert rows.dtype == torch.int64 and rows.shape == (1, 5, 24)
    assert (rows >= offsets).all() and (rows < offsets + moduli.flatten()).all()


def hash_oracle(sequence, multipliers, moduli, offsets, pad, first=0):
    """Rows of the last token of a list, in Python integers; only `sequence[first:]` is its document."""
    multipliers, moduli, offsets = multipliers.tolist(), moduli.tolist(), offsets.tolist()
    t, mix, rows = len(sequence) - 1, 0, []
    for back, multiplier in enumerate(multipliers):
        mix ^= (sequence[t - back] if t - back >= max(first, 0) or not back else pad) * multiplier
        if back:
            rows += [mix % p for p in moduli[back - 1]]
    return [r + o for r, o in zip(rows, offsets)]


@pytest.mark.parametrize("max_ngram", [2, 3, 4])
def test_hash_matches_the_definition(max_ngram):
    torch.manual_seed(max_ngram)
    args = tables(max_ngram=max_ngram, heads=3, vocab_size=1000)
    ids = torch.randint(0, 99_092, (2, 9))
    rows = engram_hash(ids, *args, pad=7)
    for b in range(2):
        for t in range(9):
            assert rows[b, t].tolist() == hash_oracle(ids[b, : t + 1].tolist(), *args, pad=7)


def test_look_back_stops_at_the_document():
    torch.manual_seed(0)
    args = tables(heads=2, vocab_size=1000)
    ids = torch.randint(0, 99_092, (2, 12))
    start = torch.tensor([[0] * 5 + [5] * 1 + [6] * 6, [0] * 12])
    rows = engram_hash(ids, *args, pad=3, start=start)
    for b in range(2):
        for t in range(12):
            assert rows[b, t].tolist() == hash_oracle(ids[b, : t + 1].tolist(), *args, pad=3, first=start[b, t])
    for a, z in ((0, 5), (5, 6), (6, 12)):
        assert torch.equal(rows[:1, a:z], engram_hash(ids[:1, a:z], *args, pad=3)), "a document alone"
    assert torch.equal(engram_hash(ids, *args, pad=3, start=start[1:]), engram_hash(ids, *args, pad=3)), (
        "broadcast start"
    )


def test_changing_a_token_leaves_the_past_alone():
    args = tables(heads=2, vocab_size=1000)
    ids = torch.randint(0, 99_092, (1, 10), generator=torch.Generator().manual_seed(0))
    rows = engram_hash(ids, *args, pad=0)
    ids[0, 4] += 1
    changed = (engram_hash(ids, *args, pad=0) != rows).any(-1)[0].tolist()
    assert changed == [t in (4, 5, 6, 7) for t in range(10)]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 11])
def test_decoding_in_pieces_equals_the_whole(piece):
    torch.manual_seed(0)
    args, pad = tables(heads=2, vocab_size=1000), 9
    ids = torch.randint(0, 99_092, (2, 11))
    start = torch.tensor([[0] * 4 + [4] * 7, [0] * 11])
    for documents in (None, start):
        whole = engram_hash(ids, *args, pad=pad, start=documents)
        history, got = torch.full((2, 3), pad), []
        for a in range(0, 11, piece):
            part = ids[:, a : a + piece]
            begins = None if documents is None else documents[:, a : a + piece] - a
            got.append(engram_hash(part, *args, pad=pad, start=begins, history=history))
            history = torch.cat([history, part], 1)[:, -3:]
        assert torch.equal(torch.cat(got, 1), whole)


def test_history_before_the_document_is_not_read():
    args = tables(heads=2, vocab_size=1000)
    ids, start = torch.tensor([[4, 5]]), torch.zeros(1, 2, dtype=torch.int64)
    alone = engram_hash(ids, *args, pad=1)
    assert torch.equal(engram_hash(ids, *args, pad=1, start=start, history=torch.tensor([[7, 8, 9]])), alone)
    assert not torch.equal(engram_hash(ids, *args, pad=1, history=torch.tensor([[7, 8, 9]])), alone)
    partly = engram_hash(ids, *args, pad=1, start=start - 1, history=torch.tensor([[7, 8, 9]]))
    assert torch.equal(partly, engram_hash(ids, *args, pad=1, history=torch.tensor([[1, 1, 9]])))


def test_hash_of_no_tokens_and_refusals():
    args = tables(heads=2, vocab_size=1000)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    assert engram_hash(ids, *args, pad=0).shape == (2, 0, 6)
    for message, call in {
        r"ids is torch\.int32": lambda: engram_hash(ids.int(), *args, pad=0),
        r"ids has shape \(0,\)": lambda: engram_hash(ids[0], *args, pad=0),
        r"moduli has shape": lambda: engram_hash(ids, args[0], args[1][:2], args[2], pad=0),
        r"offsets has shape": lambda: engram_hash(ids, args[0], args[1], args[2][:2], pad=0),
        r"multipliers has shape": lambda: engram_hash(ids, args[0][:1], args[1], args[2], pad=0),
        r"start has shape": lambda: engram_hash(ids, *args, pad=0, start=torch.zeros(3, 0)),
        r"history has shape": lambda: engram_hash(ids, *args, pad=0, history=torch.zeros(2, 2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


GATE_NAMES = ("dstreams", "dkey", "dvalue", "dweight_h", "dweight_k")


def gate_case(b=2, t=7, n=4, d=12, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors = torch.randn(b, t, n, d) * 3, torch.randn(b, t, n, d) * 2, torch.randn(b, t, d)
    weights = torch.randn(n, d), torch.rand(n, d) + 0.5
    return [t.to(dtype).requires_grad_() for t in tensors] + [w.requires_grad_() for w in weights]


def gate_oracle(streams, key, value, weight_h, weight_k, eps):
    """As the definition reads, with plain autograd in float64."""
    copies = [t.detach().double().requires_grad_() for t in (streams, key, value, weight_h, weight_k)]
    h, k, v, wh, wk = copies
    h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * wh
    k = k / (k.square().mean(-1, keepdim=True) + eps).sqrt() * wk
    s = (h * k).sum(-1) / math.sqrt(h.shape[-1])
    root = s.abs().clamp(min=1e-6).sqrt()
    gate = torch.sigmoid(torch.where(s >= 0, root, -root))
    return gate[..., None] * v[:, :, None], copies


def difference(x, y):
    """1 - 2 <x, y> / (<x, x> + <y, y>)."""
    x, y = x.double(), y.double()
    return float((x - y).square().sum() / (x.square().sum() + y.square().sum()))


@pytest.mark.parametrize(("t", "n", "d"), [(7, 4, 12), (1, 4, 8), (129, 1, 33), (30, 2, 256)])
@pytest.mark.parametrize("eps", [1e-20, 1e-2])
def test_gate_and_gradients(t, n, d, eps, monkeypatch):
    monkeypatch.setattr(eager, "VALUES", 100)  # several blocks
    inputs = gate_case(t=t, n=n, d=d)
    got, (want, copies) = engram_gate(*inputs, eps=eps), gate_oracle(*inputs, eps)
    grad = torch.randn(want.shape, dtype=torch.float64)
    got.backward(grad.float()), want.backward(grad)
    relative_rms("gated", got.detach(), want.detach())
    assert difference(got.detach(), want.detach()) < 2e-10
    for name, a, b in zip(GATE_NAMES, inputs, copies):
        relative_rms(name, a.grad, b.grad, 1e-5)
        assert difference(a.grad, b.grad) < 1e-8, name


def test_gate_gradcheck():
    inputs = gate_case(b=1, t=3, n=2, d=4, dtype=torch.float64)
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *a: engram_gate(*a, eps=1e-6), inputs)


def test_gate_at_and_below_the_clamp():
    """Orthogonal vectors: the gate is sigmoid(+-1e-3) by the sign bit, and nothing flows back to streams or key."""
    streams, key = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    streams[..., 0], key[..., 1] = 1.0, 1.0
    key[0, 1, 0, 0], key[0, 2, 0, 0] = 1e-7, -1e-7
    inputs = [streams.requires_grad_(), key.requires_grad_(), torch.ones(1, 3, 4, requires_grad=True)]
    inputs += [torch.ones(1, 4, requires_grad=True), torch.ones(1, 4, requires_grad=True)]
    out = engram_gate(*inputs, eps=1e-20)
    out.sum().backward()
    up, down = (1 / (1 + math.exp(-v)) for v in (1e-3, -1e-3))
    assert out[0, :, 0, 0].tolist() == pytest.approx([up, up, down], abs=1e-7)
    assert not inputs[0].grad.any() and not inputs[1].grad.any() and not inputs[3].grad.any()
    assert inputs[2].grad[0, :, 0].tolist() == pytest.approx([up, up, down], abs=1e-7)
    zero = engram_gate(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 4), *inputs[3:], eps=1e-20)
    assert zero.isfinite().all()


def test_gate_signed_root_is_monotone():
    d = 4
    streams = torch.ones(1, 5, 1, d)
    key = torch.tensor([-4.0, -1.0, 0.01, 1.0, 4.0])[None, :, None, None] * torch.tensor([1.0, 0.1, 0.1, 0.1])
    gates = engram_gate(streams, key, torch.ones(1, 5, d), torch.ones(1, d), torch.ones(1, d), eps=0.5)[0, :, 0, 0]
    assert (gates.diff() > 0).all() and (gates[:2] < 0.5).all() and (gates[2:] > 0.5).all()


@pytest.mark.parametrize("streams_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_mixed_dtypes_and_autocast(streams_dtype):
    streams, key, value, *weights = gate_case(d=64)
    inputs = [
        t.detach().to(dtype).requires_grad_()
        for t, dtype in ((streams, streams_dtype), (key, torch.bfloat16), (value, torch.bfloat16))
    ]
    inputs += weights
    with torch.autocast("cpu", torch.bfloat16):
        got = engram_gate(*inputs, eps=1e-6)
    want, copies = gate_oracle(*inputs, 1e-6)
    got.sum().backward(), want.sum().backward()
    assert got.dtype == streams_dtype
    relative_rms("gated", got.detach(), want.detach(), 2e-6 if streams_dtype == torch.float32 else 5e-3)
    for name, a, b in zip(GATE_NAMES, inputs, copies):
        assert a.grad.dtype == a.dtype
        relative_rms(name, a.grad, b.grad, 1e-5 if a.dtype == torch.float32 else 5e-3)


def test_gate_takes_slices_of_one_projection():
    streams, _, _, *weights = gate_case(b=2, t=5, n=4, d=12)
    both = torch.randn(2, 5, 5, 12, requires_grad=True)
    engram_gate(streams, both[:, :, :4], both[:, :, 4], *weights, eps=1e-6).square().sum().backward()
    key, value = (t.detach().clone().requires_grad_() for t in (both[:, :, :4], both[:, :, 4]))
    engram_gate(streams, key, value, *weights, eps=1e-6).square().sum().backward()
    assert torch.equal(both.grad, torch.cat([key.grad, value.grad[:, :, None]], 2))


def test_gate_keeps_three_scalars_per_token_and_stream():
    inputs, kept = gate_case(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        engram_gate(*inputs, eps=1e-6)
    assert sum(kept) == sum(t.numel() for t in inputs) + 3 * 2 * 7 * 4


def test_gate_of_no_tokens_a_nan_token_and_repeated_runs():
    empty = gate_case(t=0)
    engram_gate(*empty, eps=1e-6).sum().backward()
    assert empty[0].grad.shape == (2, 0, 4, 12) and not empty[3].grad.any()
    inputs = gate_case()
    clean = engram_gate(*inputs, eps=1e-6)
    assert torch.equal(clean, engram_gate(*inputs, eps=1e-6))
    with torch.no_grad():
        inputs[0][1, 3, 2] = math.nan
    dirty = engram_gate(*inputs, eps=1e-6)
    assert dirty[1, 3, 2].isnan().all()
    assert torch.equal(dirty.detach().nan_to_num(0)[clean == dirty], clean.detach()[clean == dirty])
    assert int((clean != dirty).sum()) == 12


def test_gate_refusals_name_the_argument():
    streams, key, value, weight_h, weight_k = gate_case()
    for message, call in {
        "expected the same": lambda: engram_gate(streams, key[:, :, :2], value, weight_h, weight_k, eps=1e-6),
        "value has shape": lambda: engram_gate(streams, key, key, weight_h, weight_k, eps=1e-6),
        "weight_h has shape": lambda: engram_gate(streams, key, value, weight_h[0], weight_k, eps=1e-6),
        "weight_k has shape": lambda: engram_gate(streams, key, value, weight_h, weight_k[:1], eps=1e-6),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


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
