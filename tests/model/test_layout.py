"""Packed documents equal each document alone; padding on either side changes nothing."""

import functools
import random

import pytest
import torch
from oracle import assert_same

from abyssal.model import ModelConfig, Transformer
from abyssal.model.layout import make_layout


@pytest.fixture(scope="module")
def model():
    """nano has every mechanism: window 16, CSA ratio 4, HCA ratio 16, hash and score routers, Engram with its
    convolution, MTP.
    """
    torch.manual_seed(0)
    model = Transformer(ModelConfig.load("nano")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "conv" in name or "ape" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def draw(*shape, seed=0):
    return torch.randint(0, 260, shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [(1, 2, 3, 5), (64, 33), (17, 130, 1, 16), (15, 16, 17, 31, 32, 33)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_packed_equals_alone(model, lengths, gap):
    pieces = [draw(1, n, seed=i) for i, n in enumerate(lengths)]
    packed, documents, spans, at = [], [], [], 0
    for i, piece in enumerate(pieces):
        packed += [draw(1, gap, seed=99), piece]
        documents += [torch.full((1, gap), -1), torch.full_like(piece, 7 - i)]
        spans.append(slice(at + gap, at + gap + piece.shape[1]))
        at += gap + piece.shape[1]
    out = model(torch.cat(packed, 1), documents=torch.cat(documents, 1)).logits
    for piece, span in zip(pieces, spans):
        assert (out[:, span] - model(piece).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("left", [0, 1, 4, 16, 37])
def test_padded_rows_equal_unpadded(model, left):
    lengths, width = (50, 3, 71), 110
    ids, documents = draw(3, width, seed=5), torch.full((3, width), -1)
    for row, n in enumerate(lengths):
        documents[row, left : left + n] = 0
    out = model(ids, documents=documents).logits
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, left : left + n]).logits
        assert (out[row : row + 1, left : left + n] - alone).abs().max() <= 1e-5


@functools.cache
def tiny(kind, ratio, window):
    """One layer in float64, with weights large enough for a token more or less to show."""
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_nextn_predict_layers": 0, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 1, "o_lora_rank": 8}
    sizes |= {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 2, "n_routed_experts": 2, "num_hash_layers": 0}
    sizes |= {
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 4,
        "max_position_embeddings": 64,
    }
    config = {**sizes, "layer_types": [kind], "compress_ratios": [ratio], "sliding_window": window}
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict(config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["heavily_compressed_attention", "compressed_sparse_attention"])
@torch.no_grad()
def test_any_row_of_documents_and_padding(kind, ratio):
    """Random rows of documents with and without padding before, between and behind them, as packed rows and, one
    document a row, through a cache that is fed in uneven pieces.
    """
    for case in range(12):
        draws = random.Random(case)
        model, ids = tiny(kind, ratio, draws.choice([1, 2, 5])), draw(2, 24, seed=case)
        documents = torch.full_like(ids, -1)
        for row in range(2):
            at, number = draws.choice([0, 1, 6]), 0
            while at < 24:
                end = at + draws.randint(1, 9)
                documents[row, at:end] = number
                at, number = end + draws.choice([0, 0, 1, 4]), number + 1
        got = model(ids, documents=documents).logits
        for row in range(2):
            for number in range(int(documents[row].max()) + 1):
                own = documents[row] == number
                assert_same("logits", got[row, own], model(ids[row, own][None]).logits[0], 1e-10)
        cache, whole, past = model.new_cache(2, 24), model(ids).logits, [0, 0]
        while min(past) < 24:
            new = [min(draws.randint(0, 5), 24 - p) for p in past]
            columns = torch.zeros(2, max(new) + draws.choice([0, 1, 3]) + 1, dtype=torch.int64)
            for row, (p, n) in enumerate(zip(past, new)):
                columns[row, :n] = ids[row, p : p + n]
            out = model(columns, cache=cache, lengths=new).logits
            for row, (p, n) in enumerate(zip(past, new)):
                assert_same("cached", out[row, :n], whole[row, p : p + n], 1e-10)
            past = [p + n for p, n in zip(past, new)]


def test_losses_and_gradients_of_packed_documents(model):
    """The packed loss is the mean over all targets of the losses alone, MTP included; the gradients follow."""
    lengths = (40, 70)
    ids, targets = draw(1, 110, seed=1), draw(1, 110, seed=2)
    documents = torch.tensor([0] * 40 + [1] * 70)[None]
    out = model(ids, targets=targets, documents=documents)
    alone = [model(i, targets=t) for i, t in zip(ids.split(lengths, 1), targets.split(lengths, 1))]
    lm = sum(n * o.losses["lm"] for n, o in zip(lengths, alone)) / 110
    mtp = sum((n - 1) * o.losses["mtp"] for n, o in zip(lengths, alone)) / 108
    assert_same("lm", out.losses["lm"], lm, 1e-5)
    assert_same("mtp", out.losses["mtp"], mtp, 1e-5)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(out.losses["lm"] + out.losses["mtp"], parameters.values(), allow_unused=True)
    want = torch.autograd.grad(lm + mtp, parameters.values(), allow_unused=True)
    for name, a, b in zip(parameters, got, want):
        if b is not None:
            assert_same(name, a, b, 2e-3 if ".hc_" in name else 2e-4)


def test_padding_counts_nowhere(model):
    ids, targets = draw(1, 60, seed=3), draw(1, 60, seed=4)
    documents = torch.full((1, 60), -1)
    documents[:, 10:50] = 0
    padded = model(ids, targets=targets, documents=documents)
    alone = model(ids[:, 10:50], targets=targets[:, 10:50])
    for name in ("lm", "mtp", "balance", "index"):
        assert_same(name, padded.losses[name], alone.losses[name], 1e-5)
    assert_same("load", padded.metrics["load"], alone.metrics["load"], 1e-6)


def test_layout_of_two_documents():
    layout = make_layout(torch.zeros(1, 12).long(), torch.tensor([[5, 5, 5, 5, 5, -1, 2, 2, 2, 2, -1, -1]]))
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 0]]
    entries = layout.entries(2)
    assert entries.first.tolist() == [[0, 2, 6, 8, -1, -1]]
    assert entries.follows.tolist() == [[False, True, False, True, False, False]]
    assert entries.positions[0, :4].tolist() == [0, 2, 0, 2]
    seen = (entries.end - entries.start).tolist()
    assert seen == [[0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 0, 0]]
    assert entries.start[0, 6:10].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    "documents, message",
    [
        (torch.zeros(1, 3).long(), "shape"),
        (torch.zeros(1, 4), "int64"),
        (torch.tensor([[0, 0, -2, 1]]), "-2"),
        (torch.tensor([[0, 1, 0, 0]]), "more than one piece"),
    ],
)
def test_bad_documents(model, documents, message):
    with pytest.raises(ValueError, match=message):
        model(draw(1, 4), documents=documents)


def test_no_document_is_longer_than_the_positions():
    """A row may be, of documents that are not: each counts from its own start."""
    model = tiny("heavily_compressed_attention", 4, 2)
    ids = draw(1, 100)
    packed = torch.tensor([[0] * 64 + [1] * 36])
    for documents in (None, torch.zeros_like(ids), torch.tensor([[0] * 35 + [1] * 65])):
        for run in (model, model.check_batch):
            with pytest.raises(ValueError, match=r"a document has \d+ tokens: .* max_position_embeddings=64"):
                run(ids, documents=documents)
    assert model(ids, documents=packed).logits.isfinite().all()
    model.check_batch(ids, documents=packed)
