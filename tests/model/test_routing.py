"""Recorded and replayed experts and picks: the same choice gives the same pass, another only other indices."""

import copy
from dataclasses import replace

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.routing import record_picks, record_routing, replay_picks, replay_routing

IDS = torch.arange(60).reshape(2, 30) * 7 % 250


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.load("nano"))


def test_a_replayed_pass_is_the_recorded_one(model):
    with record_routing(model) as routes:
        first = model(IDS, targets=IDS)
    layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    assert sorted(routes) == list(range(layers))
    assert all(
        len(passes) == 1 and passes[0].shape == (60, model.config.num_experts_per_tok) for passes in routes.values()
    )
    with replay_routing(model, {layer: passes[0] for layer, passes in routes.items()}):
        again = model(IDS, targets=IDS)
    assert torch.equal(first.loss, again.loss)


def test_old_experts_are_weighted_by_present_scores(model):
    last = model.config.num_hidden_layers - 1
    gate, old = model.layers[last].ffn.gate, copy.deepcopy(model.layers[last].ffn.gate)
    x, ids = torch.randn(60, model.config.hidden_size), IDS.flatten()
    chosen = old(x, ids).experts
    with torch.no_grad():
        gate.weight.add_(torch.randn_like(gate.weight))
    with replay_routing(model, {last: chosen}):
        routing = gate(x, ids)
    scores = torch.nn.functional.softplus(x @ gate.weight.T).sqrt().gather(1, chosen)
    expected = model.config.routed_scaling_factor * scores / scores.sum(1, keepdim=True)
    assert torch.equal(routing.experts, chosen)
    torch.testing.assert_close(routing.weights, expected)
    assert not torch.equal(gate(x, ids).experts, chosen)  # it would choose others by now


def test_an_error_within_leaves_the_gates_free(model):
    with pytest.raises(ValueError, match=r"expected torch\.int64"), replay_routing(model, {0: torch.zeros(3, 2)}):
        model(IDS)
    assert all(block.ffn.gate.replayed is None for block in model.layers)
    with record_routing(model):
        pass
    assert not model.layers[0].ffn.gate._forward_hooks


def test_a_layer_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match="layer 99: allowed are 0, 1"), replay_routing(model, {99: IDS}):
        pass


def test_decoding_replays_too(model):
    """One token of one sequence would take the numpy path, which chooses for itself."""
    model.eval()
    last = model.config.num_hidden_layers - 1
    caches = [model.new_cache(1, 8) for _ in range(3)]
    for cache in caches:
        model(IDS[:1, :5], cache=cache)
    token = IDS[:1, 5:6]
    with record_routing(model) as routes:
        plain = model(token, cache=caches[0]).logits
    other = (routes[last][0] + 1) % model.config.n_routed_experts
    with replay_routing(model, {last: routes[last][0]}):
        same = model(token, cache=caches[1]).logits
    with replay_routing(model, {last: other}):
        changed = model(token, cache=caches[2]).logits
    torch.testing.assert_close(same, plain)
    assert (changed - plain).abs().max() > 1e-4


@pytest.fixture
def choosy() -> Transformer:
    """Its two CSA layers may pick 2 of 7 entries."""
    torch.manual_seed(0)
    model = Transformer(replace(ModelConfig.load("nano"), index_topk=2, sliding_window=4))
    for layer in (1, 3):
        torch.nn.init.normal_(model.layers[layer].attn.indexer.wq_b.weight)
    return model


def test_replayed_picks_are_what_is_read(choosy):
    with record_picks(choosy) as picks:
        first = choosy(IDS, targets=IDS)
    assert sorted(picks) == [1, 3] and all(passes[0].shape == (2, 30, 2) for passes in picks.values())
    chosen = {layer: passes[0] for layer, passes in picks.items()}
    with torch.no_grad():
        choosy.layers[1].attn.indexer.weights_proj.weight.neg_()
    with replay_picks(choosy, chosen), record_picks(choosy) as again:
        replayed = choosy(IDS, targets=IDS)
    assert torch.equal(first.losses["lm"], replayed.losses["lm"]) and torch.equal(again[1][0], chosen[1])
    assert not torch.equal(first.losses["index"], replayed.losses["index"])  # of the indexer's scores as they are
    assert not torch.equal(first.losses["lm"], choosy(IDS, targets=IDS).losses["lm"])
    with replay_picks(choosy, {1: chosen[1]}), record_picks(choosy) as other:
        choosy(IDS)
    assert torch.equal(other[1][0], chosen[1])
    assert all(block.attn.replayed is None and block.attn.recorded is None for block in choosy.layers)


def test_any_number_of_picks_is_replayed_and_minus_one_is_none(choosy):
    wide = torch.full((2, 30, 5), -1)
    wide[:, 8:, 0] = 1
    with replay_picks(choosy, {1: wide}):
        padded = choosy(IDS).logits
    with replay_picks(choosy, {1: wide[..., :1]}):
        torch.testing.assert_close(choosy(IDS).logits, padded)
    with replay_picks(choosy, {1: torch.full((2, 30, 1), -1)}):
        assert not torch.allclose(choosy(IDS).logits[:, 8:], padded[:, 8:])


def test_decoding_notes_and_replays_picks_too(choosy):
    """One token of one sequence would take the numpy path, which neither notes nor takes any."""
    choosy.eval()
    caches = [choosy.new_cache(1, 32) for _ in range(3)]
    for cache in caches:
        choosy(IDS[:1, :29], cache=cache)
    token = IDS[:1, 29:]
    with record_picks(choosy) as picks:
        plain = choosy(token, cache=caches[0]).logits
    with record_picks(choosy) as whole:
        choosy(IDS[:1])
    assert all(torch.equal(picks[layer][0][0, 0], whole[layer][0][0, 29]) for layer in (1, 3))
    with replay_picks(choosy, {layer: passes[0] for layer, passes in picks.items()}):
        torch.testing.assert_close(choosy(token, cache=caches[1]).logits, plain)
    with replay_picks(choosy, {3: torch.full((1, 1, 2), -1)}):
        assert (choosy(token, cache=caches[2]).logits - plain).abs().max() > 1e-4


def test_picks_of_a_layer_that_has_none_or_of_another_shape_are_refused(choosy):
    with pytest.raises(ValueError, match="picks names layer 2: allowed are 1, 3"), replay_picks(choosy, {2: IDS}):
        pass
    with pytest.raises(ValueError, match="index"), replay_picks(choosy, {1: torch.zeros(2, 9, 2, dtype=torch.int64)}):
        choosy(IDS)
    assert choosy.layers[1].attn.replayed is None
