"""A step in passes is the step: counts by brute force, losses and every gradient in float64, whatever the split."""

import copy
import dataclasses

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.losses import loss_counts, loss_shares
from abyssal.train.data.rows import Batch
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import load_recipe
from abyssal.train.run.accumulate import mean_metrics, micro_batches, passes, summed
from abyssal.train.run.schedule import Schedule
from abyssal.train.run.step import Stepper, only_indexers

CONFIG = dataclasses.replace(ModelConfig.load("nano"), balance_loss_weight=0.1, index_loss_weight=0.5)
LENGTH = 40


def uneven_batch() -> Batch:
    """Five rows: whole, packed, padded on either side, short, and one of padding alone; some targets are ignored."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (5, LENGTH + 1), generator=random)
    documents = torch.zeros(5, LENGTH, dtype=torch.int64)
    documents[1, 13:] = 1
    documents[1, 30:] = 2
    documents[2, :5] = documents[2, 20:] = -1
    documents[3, 3:] = -1
    documents[4] = -1
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=random) < 0.2] = -100
    return Batch(ids[:, :-1].contiguous(), targets, documents)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).double()


def gradients(model: Transformer, batch: Batch, rows: int, stage: str = "sparse") -> tuple[dict, dict]:
    """Losses and gradients of a step in passes of `rows` rows."""
    model.zero_grad()
    model.attention_stage = stage
    found = []
    for part, shares in passes(CONFIG, batch, rows):
        out = model(part.ids, targets=part.targets, documents=part.documents, shares=shares)
        out.loss.backward()
        found.append({"loss": out.loss, **out.losses})
    return summed(found), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("rows", "recompute", "stage"), [(1, 0, "sparse"), (2, 2, "sparse"), (3, 0, "warmup"), (4, 0, "dense")]
)
def test_passes_add_up_to_the_step(model, rows, recompute, stage):
    batch = uneven_batch()
    model.recompute = 0
    plain = model(batch.ids, targets=batch.targets, documents=batch.documents)
    model.attention_stage = stage
    losses, expected = gradients(model, batch, 0, stage)
    if stage == "sparse":
        assert losses["loss"] == pytest.approx(plain.loss.item(), rel=1e-12), "shares of a whole batch are 1"
    model.recompute = recompute
    found, actual = gradients(model, batch, rows, stage)
    torch.testing.assert_close(found, losses, rtol=1e-10, atol=0)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() == 0 or (actual[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
    assert sum(gradient.any().item() for gradient in expected.values()) > 0.9 * len(expected)


def test_equal_shares_would_not_add_up(model):
    """The oracle of the test above notices the usual mistake, the mean of the passes' means."""
    batch, model.recompute = uneven_batch(), 0
    losses, _ = gradients(model, batch, 0)
    parts = [model(p.ids, targets=p.targets, documents=p.documents) for p in micro_batches(batch, 2)]
    assert abs(sum(part.loss.item() for part in parts) / len(parts) / losses["loss"] - 1) > 1e-2


def test_counts_by_hand():
    batch = uneven_batch()
    lm = mtp = rows = mtp_rows = 0
    ratios = [CONFIG.compress_ratio(i) for i, kind in enumerate(CONFIG.layer_types) if kind.startswith("compressed_sp")]
    queries = [0] * len(ratios)
    for targets, documents in zip(batch.targets.tolist(), batch.documents.tolist()):
        real = [t for t in range(LENGTH) if documents[t] >= 0]
        following = [t for t in real if t + 1 < LENGTH and documents[t + 1] == documents[t]]
        lm += sum(targets[t] != -100 for t in real)
        mtp += sum(targets[t + 1] != -100 for t in following)
        rows, mtp_rows = rows + bool(real), mtp_rows + bool(following)
        for i, ratio in enumerate(ratios):
            queries[i] += sum(t - documents.index(documents[t]) + 1 >= ratio for t in real)
    counts = loss_counts(CONFIG, batch.ids, batch.targets, batch.documents)
    assert counts.tolist() == [lm, mtp, rows, mtp_rows, *queries]
    parts = [loss_counts(CONFIG, p.ids, p.targets, p.documents) for p in micro_batches(batch, 2)]
    assert torch.equal(sum(parts), counts)
    plain = loss_counts(CONFIG, batch.ids, batch.targets, None)
    assert plain[2:4].tolist() == [5, 5] and plain[1] == (batch.targets[:, 1:] != -100).sum()


def test_nothing_of_nothing_is_nothing():
    shares = loss_shares(torch.tensor([0, 0, 0, 0, 0]), torch.tensor([0, 3, 0, 1, 0]))
    assert shares == (0.0, 0.0, 0.0, 0.0, (0.0,))


def test_other_processes_count_too(model):
    """Two processes of two rows each, and one row that nobody else has: their sums are the step."""
    batch, model.recompute = uneven_batch(), 0
    losses, expected = gradients(model, batch, 0)
    parts = micro_batches(batch, 3)
    whole = loss_counts(CONFIG, batch.ids, batch.targets, batch.documents)
    model.zero_grad()
    found = []
    for part in parts:
        for inner, shares in passes(CONFIG, part, 2, lambda mine: whole):
            out = model(inner.ids, targets=inner.targets, documents=inner.documents, shares=shares)
            out.loss.backward()
            found.append({"loss": out.loss, **out.losses})
    torch.testing.assert_close(summed(found), losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(summed(found, lambda sums: 2 * sums)["lm"], 2 * losses["lm"], rtol=1e-10, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-15)


def test_measurements_are_weighted_by_rows():
    parts = [{"load": torch.tensor([1.0, 0.0])}, {"load": torch.tensor([0.0, 1.0])}]
    assert mean_metrics(parts, [3, 1])["load"].tolist() == [0.75, 0.25]


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("nano", ["train.micro_batch=2", "model.balance_loss_weight=0.1"])


def stepper(recipe, seed: int = 0) -> Stepper:
    torch.manual_seed(seed)
    model = Transformer(recipe.model)
    return Stepper(model, build_optimizer(model, recipe.optim), recipe, torch.device("cpu"))


def test_a_step_in_passes_moves_router_biases_as_the_step(recipe):
    batch = uneven_batch()
    whole, parts = stepper(dataclasses.replace(recipe, train=load_recipe("nano").train)), stepper(recipe)
    for one in (whole, parts):
        phase = Schedule(one.recipe).phase(0)
        one.gradients(phase, batch)
        one.update(phase)
    for a, b in zip(whole.model.layers[1:], parts.model.layers[1:]):
        assert a.ffn.gate.bias.any() and torch.equal(a.ffn.gate.bias, b.ffn.gate.bias)


@pytest.mark.parametrize("recompute", [0, 2])
def test_passes_replay_their_own_experts(recipe, recompute):
    """Experts chosen by older weights: the step with them equals a hand-made one, with recomputed layers too."""
    batch, old, new = uneven_batch(), stepper(recipe, seed=1), stepper(recipe)
    new.model.recompute = recompute
    phase = Schedule(recipe).phase(0)
    experts = old.experts(phase, batch)
    assert [len(chosen) for chosen in experts] == [CONFIG.num_hidden_layers + 1] * 3
    assert all(block.ffn.gate.counts is None for block in old.model.layers), "looking ahead counts no load"
    own = new.gradients(phase, batch).losses["lm"]
    new.forget()
    out = new.gradients(phase, batch, experts)
    loads = [block.ffn.gate.counts.clone() for block in new.model.layers]
    twin = copy.deepcopy(new.model)
    twin.zero_grad()
    for part, chosen in zip(passes(recipe.model, batch, 2), experts):
        for layer, block in enumerate((*twin.layers, *twin.mtp)):
            block.ffn.gate.replayed = chosen[layer]
        twin(part.batch.ids, targets=part.batch.targets, documents=part.batch.documents, shares=part.shares)
    assert out.losses["lm"] != own
    real = batch.documents >= 0
    for layer, load in enumerate(loads):
        flat = torch.cat([chosen[layer] for chosen in experts])[real.flatten()]
        assert torch.equal(load, torch.bincount(flat.flatten(), minlength=CONFIG.n_routed_experts).float()), layer
    with pytest.raises(ValueError):
        new.gradients(phase, batch, experts[:-1])


def test_only_indexers_learn_in_a_warmup(model):
    batch, model.recompute = uneven_batch(), 2
    model.zero_grad()
    model.attention_stage = "warmup"
    with only_indexers(model):
        out = model(batch.ids, targets=batch.targets, documents=batch.documents)
        (0.5 * out.losses["index"]).backward()
    _, expected = gradients(copy.deepcopy(model), batch, 0, "warmup")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        if ".indexer." in name:
            torch.testing.assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None, name


def test_a_step_trains_whatever_came_before():
    made = stepper(load_recipe("nano"))
    phase = Schedule(made.recipe).phase(0)
    made.model.eval()
    made.gradients(phase, uneven_batch())
    assert made.model.training and all(block.ffn.gate.counts is not None for block in made.model.layers[1:])
    made.forget()
    assert all(block.ffn.gate.counts is None for block in (*made.model.layers, *made.model.mtp))
    assert all(p.grad is None for p in made.model.parameters())


def test_experts_are_chosen_as_the_phase_attends():
    made = stepper(load_recipe("nano"))
    phase = dataclasses.replace(Schedule(made.recipe).phase(0), attention="dense")
    made.model.attention_stage = "sparse"
    made.experts(phase, uneven_batch())
    assert made.model.attention_stage == "dense" and not made.model.training
