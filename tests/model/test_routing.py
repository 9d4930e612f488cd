"""Recorded and replayed experts: the same choice gives the same pass, an older one only other indices."""

import copy

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.routing import record_routing, replay_routing

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
