"""Measurements of a step against what brute force says, and a step that they leave as it is."""

import dataclasses
import math

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.layout import make_layout
from abyssal.train.run.observe import Observer, collision_rate, composite_gain, family, gates, index_recall, residual

IDS = torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0] * 20 + [1] * 50, [0] * 60 + [-1] * 10])


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(ModelConfig.load("nano"), index_topk=4))


@pytest.mark.parametrize("name", ["nano", "toy", "small", "long", "v4-flash", "v4-pro"])
def test_every_parameter_of_every_preset_has_a_family(name):
    with torch.device("meta"):
        found = Observer(Transformer(ModelConfig.load(name))).families
    assert {"hyper", "attn", "experts", "gate", "embed", "head", "norm"} <= found.keys()
    assert all(found.values())


def test_families_by_name():
    for name, expected in {
        "layers.3.attn.indexer.compressor.wkv.weight": "indexer",
        "layers.3.attn.compressor.wkv.weight": "compressor",
        "layers.1.engram.h_norm": "engram",
        "layers.0.attn.q_norm.weight": "attn",
        "layers.0.ffn_norm.weight": "norm",
        "layers.0.hc_attn.fn": "hyper",
        "hc_head.base": "hyper",
        "mtp.0.block.ffn.experts.w2": "mtp",
        "layers.0.ffn.shared_experts.w2.weight": "shared_experts",
    }.items():
        assert family(name) == expected
    with pytest.raises(ValueError, match="'thing'"):
        family("thing")


def test_a_step_is_left_as_it_is(model):
    plain = model(IDS, targets=IDS, documents=DOCUMENTS)
    observer = Observer(model)
    with observer.watching():
        watched = model(IDS, targets=IDS, documents=DOCUMENTS)
    assert torch.equal(plain.loss, watched.loss)
    assert not any(module._forward_hooks for module in model.modules())
    assert {"recall", "gate", "collisions", "sinkhorn", "gain"} == observer.record.keys()
    assert len(observer.record["sinkhorn"]) == 2 * model.config.num_hidden_layers


def test_norms_by_family_are_those_of_its_tensors(model):
    observer = Observer(model)
    model(IDS, targets=IDS).loss.backward()
    observer.gradients()
    total = math.sqrt(sum(value**2 for value in observer.record["grad_by"].values()))
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().norm()
    assert total == pytest.approx(float(expected), rel=1e-5)
    with torch.no_grad(), observer.updating():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.25 if family(name) == "experts" else 1.0)
    assert observer.record["update_by"]["experts"] == pytest.approx(0.25, rel=1e-5)
    assert observer.record["update_by"]["attn"] == 0


def test_residual_and_gain_of_matrices_by_hand():
    permutation = torch.eye(4)[[2, 0, 3, 1]].expand(5, 4, 4)
    assert residual(permutation) == 0
    assert composite_gain([permutation, permutation]) == [1, 1]
    lopsided = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # both streams flow into the first
    assert residual(lopsided) == 1
    assert composite_gain([lopsided]) == [2, 1]  # it collects 2; each hands out 1
    assert composite_gain([lopsided.mT]) == [1, 2]
    assert composite_gain([lopsided.mT, lopsided]) == [2, 2]  # [[2, 0], [0, 0]]


def test_gates_are_those_of_the_equation(model):
    engram = model.layers[1].engram
    streams = torch.randn(2, 70, model.config.hc_mult, model.config.hidden_size)
    layout = make_layout(IDS, DOCUMENTS)
    n, d = streams.shape[2:]
    k = engram.wkv(engram.table(engram.rows(IDS, layout))).unflatten(-1, (n + 1, d))[:, :, :n].double()

    def norm(x):
        return x * (x.square().mean(-1, keepdim=True) + engram.eps).rsqrt()

    s = (norm(streams.double()) * norm(k)).sum(-1) / math.sqrt(d)
    expected = torch.sigmoid(s.sign() * s.abs().clamp_min(1e-6).sqrt())
    torch.testing.assert_close(gates(engram, streams, IDS, layout).double(), expected.flatten(0, 1), atol=1e-5, rtol=0)


def test_collisions_are_counted_by_n_gram(model):
    engram = model.layers[1].engram
    layout, memory = make_layout(IDS, DOCUMENTS), engram.memory
    rows, rates = engram.rows(IDS, layout), []
    for order in range(2, memory.max_ngram + 1):
        grams = {}
        for b in range(2):
            for t in range(70):
                if DOCUMENTS[b, t] < 0:
                    continue
                first = int(layout.start[b, t])
                gram = tuple(int(IDS[b, t - j]) if t - j >= first else memory.pad_token_id for j in range(order))
                grams[gram] = (b, t)
        for head in range(memory.heads):
            column = (order - 2) * memory.heads + head
            taken = {int(rows[b, t, column]) for b, t in grams.values()}
            rates.append(1 - len(taken) / len(grams))
    assert collision_rate(engram, IDS, layout) == pytest.approx(sum(rates) / len(rates))
    assert collision_rate(engram, IDS, layout) > 0


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_recall_against_the_loss_of_brute_force(model, documents):
    """An indexer that scores as the attention reads recalls everything; one that scores the opposite, little."""
    attn = next(block.attn for block in model.layers if block.attn.kind == "compressed_sparse_attention")
    x, layout = torch.randn(2, 70, model.config.hidden_size), make_layout(IDS, documents)
    honest = index_recall(attn, x, layout)
    assert 0 <= honest <= 1

    from abyssal.train.run import observe

    read = {}
    real_read, real_topk = observe._read, observe.index_topk

    def keep(*arguments):
        read["p"] = real_read(*arguments)
        return read["p"]

    def by(sign):
        def pick(q, weights, keys, *, k, start, end):
            slot = torch.arange(keys.shape[1])
            visible = (slot >= start[..., None]) & (slot < end[..., None])
            return (sign * read["p"]).masked_fill(~visible, -torch.inf).topk(k).indices

        return pick

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "_read", keep)
        patch.setattr(observe, "index_topk", by(1))
        assert index_recall(attn, x, layout) == 1
        patch.setattr(observe, "index_topk", by(-1))
        assert index_recall(attn, x, layout) < 0.5
    assert observe.index_topk is real_topk


def test_what_is_read_is_the_joint_softmax(model):
    """The shares of window, entries and sink sum to one for every head: entries get what the window and sink leave."""
    from abyssal.train.run.observe import _read

    attn = next(block.attn for block in model.layers if block.attn.kind == "compressed_sparse_attention")
    h, d, w = model.config.num_attention_heads, model.config.head_dim, model.config.sliding_window
    q, kv, far = torch.randn(1, 2, h, d), torch.randn(1, 40, d), torch.randn(1, 10, d)
    at, layout = torch.tensor([3, 39]), make_layout(torch.zeros(1, 40, dtype=torch.int64), None)
    visible = torch.arange(10) < torch.tensor([1, 9])[:, None]
    p = _read(attn, q, kv, far, visible[None], layout, at)
    for i, t in enumerate(at.tolist()):
        expected = torch.zeros(10)
        for head in range(h):
            keys = torch.cat([kv[0, max(0, t - w + 1) : t + 1], far[0, : int(visible[i].sum())]])
            scores = torch.cat([keys @ q[0, i, head] * d**-0.5, attn.attn_sink[head : head + 1]])
            shares = scores.softmax(0)[-1 - int(visible[i].sum()) : -1]
            expected[: len(shares)] += shares
        torch.testing.assert_close(p[0, i], expected)


def test_indexers_that_have_nothing_to_choose_are_left_out(model):
    attn = next(block.attn for block in model.layers if block.attn.kind == "compressed_sparse_attention")
    ids = IDS[:, :12]
    assert index_recall(attn, torch.randn(2, 12, model.config.hidden_size), make_layout(ids, None)) is None
