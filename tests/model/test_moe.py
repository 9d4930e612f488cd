"""The balance of the experts: which picks the balance loss counts, and how the routers' biases move."""

import pytest
import torch
from oracle import assert_same

from abyssal.model import ModelConfig, Transformer
from abyssal.model.moe import even_bias


def draw(*shape, seed=0, top=260):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def routed(**changes):
    """nano without its MTP block, whose router sees a token less, and the gates that choose by score."""
    torch.manual_seed(0)
    changes = {"num_nextn_predict_layers": 0, **changes}
    model = Transformer(ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **changes}))
    return model, [block.ffn.gate for block in model.layers if not block.ffn.gate.is_hash]


def test_balance_loss_counts_the_picks_that_the_configuration_names():
    """Pick by pick: V3's equations 17 to 20 over a padded row, whose counts the bias changes in one reading alone."""
    ids, documents = draw(2, 40), torch.zeros(2, 40, dtype=torch.int64)
    documents[1, 25:] = -1
    real, found = documents >= 0, {}
    for picks in ("biased", "unbiased"):
        model, gates = routed(balance_picks=picks)
        routings = {}
        assert ModelConfig.from_dict(model.config.to_dict()).balance_picks == picks
        for gate in gates:
            gate.bias.copy_(0.3 * noise(len(gate.bias)))
            gate.register_forward_hook(lambda gate, _, routing, kept=routings: kept.update({gate: routing}))
        losses = model(ids, targets=draw(2, 40, seed=1), documents=documents).losses
        want = sum(slow_balance(gate, routings[gate].scores.unflatten(0, (2, 40)), (40, 25), picks) for gate in gates)
        assert_same("balance", losses["balance"], want, 1e-6)
        found[picks] = want.item()
        for gate in gates:
            made = torch.bincount(routings[gate].experts[real.flatten()].flatten(), minlength=len(gate.bias))
            assert torch.equal(gate.counts, made.float()), "the bias moves by the picks that are made"
    assert abs(found["biased"] / found["unbiased"] - 1) > 1e-4


def slow_balance(gate, scores, lengths, picks):
    loss, c = 0.0, gate.config
    for row, length in zip(scores, lengths):
        count, share = [0] * c.n_routed_experts, 0.0
        for s in row[:length]:
            by = (s + gate.bias if picks == "biased" else s).tolist()
            for e in sorted(range(len(by)), key=by.__getitem__)[-c.num_experts_per_tok :]:
                count[e] += 1
            share = share + s / s.sum() / length
        f = torch.tensor(count) * c.n_routed_experts / (c.num_experts_per_tok * length)
        loss = loss + (f * share).sum() / len(lengths)
    return loss


def slow_even_bias(scores, bias, k):
    """Expert by expert from sorted margins, as the page of Quantile Balancing has it."""
    rows = scores.double().tolist()
    cuts = [sorted((s + b for s, b in zip(row, bias.tolist())), reverse=True)[k] for row in rows]
    q = k * len(rows) // len(bias)
    margins = [sorted((row[e] - cut for row, cut in zip(rows, cuts)), reverse=True) for e in range(len(bias))]
    return torch.tensor([-column[q] for column in margins])


@pytest.mark.parametrize(("t", "e", "k"), [(40, 8, 2), (7, 5, 4), (1, 3, 1), (33, 4, 1)])
def test_even_bias_is_the_quantile_of_each_experts_margins(t, e, k):
    scores, bias = noise(t + 5, e).abs(), noise(e, seed=2)
    real = torch.ones(t + 5, dtype=torch.bool).index_fill_(0, torch.arange(5), False)
    want = slow_even_bias(scores[5:], bias, k)
    assert_same("of real tokens", even_bias(scores, bias, k, real), want, 1e-6)
    assert_same("of all", even_bias(scores[5:], bias, k), want, 1e-6)
    cut = (scores[5:] + bias).topk(k + 1).values[:, -1:]
    above = scores[5:] + want - cut  # a token whose cut the expert itself is has no other margin than the bias
    assert ((above > 1e-6).sum(0) <= k * t // e).all() and ((above > -1e-6).sum(0) > k * t // e).all()


def test_even_bias_leaves_experts_that_are_all_chosen():
    bias = noise(4)
    assert torch.equal(even_bias(noise(9, 4).abs(), bias, 4), bias)


def test_quantiles_even_out_a_skewed_load_in_a_few_steps():
    """Where the sign rule at V3's speed has hardly begun."""
    scores, worst = noise(4096, 16).sigmoid() + 0.3 * noise(16, seed=2), {}
    for rule, speed in {"sign": 1e-3, "quantile": 1.0}.items():
        _, (gate, *_) = routed(
            n_routed_experts=16, num_experts_per_tok=2, router_bias_rule=rule, router_bias_update_speed=speed
        )
        for _ in range(10):
            counts = torch.bincount((scores + gate.bias).topk(2).indices.flatten(), minlength=16).float()
            gate.count(counts, scores, None)
            gate.update_bias(speed)
        worst[rule] = (counts.max() / counts.mean()).item()
    assert worst["quantile"] < 1.05 and worst["sign"] > 2


def test_the_quantile_rule_moves_a_share_of_the_way_by_the_tokens_of_its_passes():
    model, gates = routed(router_bias_rule="quantile", router_bias_update_speed=0.25)
    k, e = model.config.num_experts_per_tok, model.config.n_routed_experts
    kept = {gate: [] for gate in gates}
    for gate in gates:
        gate.bias.copy_(0.1 * noise(e))
        gate.register_forward_hook(lambda gate, _, routing: kept[gate].append(routing.scores.detach()))
    before = [gate.bias.clone() for gate in gates]
    for t, seed in ((40, 1), (10, 2)):
        model(draw(2, t, seed=seed), targets=draw(2, t))
    model.update_router_bias()
    for gate, bias in zip(gates, before):
        first, second = (slow_even_bias(scores, bias, k) for scores in kept[gate])
        even = 0.8 * first + 0.2 * second
        assert_same("bias", gate.bias, bias + 0.25 * (even - even.mean() - bias), 1e-5)
        assert not torch.equal(gate.bias, bias) and gate.counts is None


def test_a_pass_without_tokens_counts_nothing_and_one_without_numbers_moves_nothing():
    counts, scores, none = torch.full((8,), 1.5), noise(6, 8), torch.zeros(6, dtype=torch.bool)
    passes = {"real": (counts, scores, None), "padding": (0 * counts, scores, none), "NaN": (counts, scores / 0, None)}
    found = {}
    for names in ("real", "real padding", "padding", "real NaN"):
        _, (gate, *_) = routed(router_bias_rule="quantile", router_bias_update_speed=1.0)
        gate.bias.copy_(noise(8, seed=3))
        for name in names.split():
            gate.count(*passes[name])
        gate.update_bias(1.0)
        found[names] = gate.bias
    assert torch.equal(found["real padding"], found["real"]) and not torch.equal(found["real"], noise(8, seed=3))
    assert torch.equal(found["padding"], noise(8, seed=3)) and torch.equal(found["real NaN"], noise(8, seed=3))
