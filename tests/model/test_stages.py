"""The stages of attention: dense reads all visible entries, warm-up teaches the indexer on all, sparse picks."""

import dataclasses

import pytest
import torch

from abyssal.model import ModelConfig, Transformer

IDS = torch.arange(2 * 90).reshape(2, 90) * 7 % 250


def build(topk: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(ModelConfig.load("nano"), index_topk=topk))


def indexer_gradients(model: Transformer) -> list:
    return [p.grad for name, p in model.named_parameters() if ".indexer." in name]


@pytest.mark.parametrize("stage", ["dense", "warmup"])
def test_dense_attention_is_sparse_attention_that_picks_everything(stage):
    everything, few = build(1000), build(2)
    expected = everything(IDS).logits
    assert (few(IDS).logits - expected).abs().max() > 1e-4
    few.attention_stage = stage
    torch.testing.assert_close(few(IDS).logits, expected)


def test_dense_trains_no_indexer_and_has_no_index_loss():
    model = build(2)
    model.attention_stage = "dense"
    out = model(IDS, targets=IDS)
    out.loss.backward()
    assert "index" not in out.losses
    assert all(grad is None for grad in indexer_gradients(model))


def test_warmup_teaches_the_indexer_over_all_visible_entries():
    model, everything = build(2), build(1000)
    model.attention_stage = "warmup"
    out, expected = model(IDS, targets=IDS), everything(IDS, targets=IDS)
    torch.testing.assert_close(out.losses["index"], expected.losses["index"])
    out.loss.backward()
    assert all(grad is not None and grad.any() for grad in indexer_gradients(model))
    sparse = build(2)(IDS, targets=IDS)
    assert (sparse.losses["index"] - out.losses["index"]).abs() > 1e-4


@pytest.mark.parametrize("stage", ["dense", "warmup"])
def test_a_cache_gives_the_same_logits_in_any_stage(stage):
    model = build(2).eval()
    model.attention_stage = stage
    whole, cache = model(IDS[:1]).logits, model.new_cache(1, 90)
    parts = [model(IDS[:1, a:b], cache=cache).logits for a, b in ((0, 50), (50, 51), (51, 83), (83, 84), (84, 90))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(ValueError, match="attention_stage='thick': allowed are dense, warmup, sparse"):
        build(2).attention_stage = "thick"
