"""Layers worked out again in the backward pass: the same bits, side effects once, less memory."""

import pytest
import torch
from live_bytes import LiveBytes
from lively import draw_ids, lively
from torch import nn

from abyssal.model import Transformer
from abyssal.train.recipe import load_recipe
from abyssal.train.run.loop import Run
from abyssal.train.start import open_source


def whole(recompute: int, documents: torch.Tensor | None = None) -> tuple[Transformer, list[torch.Tensor]]:
    """A model after a training pass, and all that the pass gave: losses, metrics, router counts, gradients."""
    model = lively().train()
    model.recompute = recompute
    out = model(draw_ids(2, 70), targets=draw_ids(2, 70, seed=1), documents=documents)
    found = [out.loss, *out.losses.values(), *out.metrics.values()]
    out.loss.backward()
    counts = [block.ffn.gate.counts for block in (*model.layers, *model.mtp)]
    missing = torch.zeros(0)
    return model, [*found, *counts, *(missing if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [1, 2, 9])
def test_the_same_bits_with_and_without(recompute, documents):
    table = torch.tensor([[-1] * 3 + [0] * 30 + [1] * 37, [4] * 20 + [7] * 45 + [-1] * 5]) if documents else None
    (_, want), (_, got) = (whole(x, table) for x in (0, recompute))
    assert len(want) > 100 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_router_counts_each_token_once():
    model, _ = whole(2)
    c = model.config
    for block in (*model.layers, *model.mtp):
        tokens = block.ffn.gate.counts.sum().item() / c.num_experts_per_tok
        assert tokens == (2 * 69 if block is model.mtp[0] else 2 * 70)
    model.update_router_bias()
    assert all(block.ffn.gate.counts is None for block in model.layers)


def test_half_precision_by_autocast_too():
    results = []
    for recompute in (0, 2):
        model = lively().train()
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(draw_ids(1, 40), targets=draw_ids(1, 40, seed=1)).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_random_numbers_are_drawn_again_the_same(monkeypatch):
    forward = Transformer.forward
    grads = []
    for recompute in (0, 1):
        model = lively(num_nextn_predict_layers=0).train()
        model.recompute = recompute
        for block in model.layers:
            block.ffn_norm = nn.Sequential(block.ffn_norm, nn.Dropout(0.5))
        torch.manual_seed(3)
        forward(model, draw_ids(1, 40), targets=draw_ids(1, 40, seed=1)).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def peak(recompute: int) -> int:
    model = lively(num_hidden_layers=9, compress_ratios=[0, *4 * [4, 16]]).train()
    model.recompute = recompute
    with LiveBytes() as live:
        model(draw_ids(1, 160), targets=draw_ids(1, 160, seed=1)).loss.backward()
    return live.peak


@pytest.mark.slow("every allocation of three passes is watched")
def test_memory_falls():
    everything, threes, single = (peak(recompute) for recompute in (0, 3, 1))
    assert single < threes < 0.7 * everything and single < 0.55 * everything, (everything, threes, single)


def test_nothing_is_remembered_where_nothing_is_learned():
    model = lively()
    model.recompute = 2
    with torch.no_grad():
        got = model(draw_ids(1, 40)).logits
    model.recompute = 0
    assert torch.equal(got, model(draw_ids(1, 40)).logits)


def test_the_recipe_has_a_key_for_it(tmp_path):
    recipe = load_recipe("nano", ["train.recompute=2"])
    run = Run(recipe, open_source(recipe), tmp_path / "run", None, shown=False)
    run.close()
    assert run.model.recompute == 2
    with pytest.raises(ValueError, match=r"train\.recompute=-1"):
        load_recipe("nano", ["train.recompute=-1"])
