"""The schedule at its corners, the groups of every parameter, and one AdamW step by hand."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from abyssal.model import ModelConfig, Transformer
from abyssal.model.tables import RowTable, row_tables
from abyssal.train.optim import RowAdam, build_optimizer, parameter_groups, set_learning_rate
from abyssal.train.run.schedule import learning_rate
from abyssal.train.settings import OptimConfig

CONFIG = OptimConfig(lr=1.0, final_lr_share=0.1, warmup_steps=10, decay_share=0.4)


def test_schedule_has_the_shape_of_the_paper():
    lr = [learning_rate(step, 100, CONFIG) for step in range(100)]
    assert lr[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert lr[9:60] == [1.0] * 51
    assert all(a > b for a, b in pairwise(lr[59:]))
    assert lr[99] == pytest.approx(0.1)
    assert lr[79] == pytest.approx(0.55)
    assert lr[69] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_schedule_without_warmup_or_tail_is_constant():
    config = OptimConfig(lr=0.5, warmup_steps=0, decay_share=0.0)
    assert [learning_rate(step, 7, config) for step in range(7)] == [0.5] * 7


def test_schedule_of_a_run_shorter_than_its_warmup_never_exceeds_the_ramp():
    lr = [learning_rate(step, 5, CONFIG) for step in range(5)]
    assert all(value <= (step + 1) / 10 for step, value in enumerate(lr))
    assert all(value > 0 for value in lr)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(ModelConfig.load("nano"))


def test_every_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, OptimConfig())
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_only_matrices_decay(model):
    groups = parameter_groups(model, OptimConfig())
    words = ("norm", "embed", "ape", "base", "scale", "sink", "conv", "table")
    assert not [name for name in groups["matrices"] if any(word in name for word in words)]
    ends = {name.split(".", 2)[-1] for name in groups["matrices"]}
    assert {"attn.wq_a.weight", "ffn.experts.w13", "ffn.experts.w2", "ffn.gate.weight", "hc_attn.fn"} <= ends
    assert "head.weight" in groups["matrices"]
    assert list(groups["tables"]) == ["layers.1.engram.table.weight"]
    ends = {name.split(".")[-1] for name in groups["vectors"]}
    assert {"attn_sink", "ape", "base", "scale", "conv", "h_norm"} <= ends
    assert "embed.weight" in groups["vectors"]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.norm = nn.Parameter(torch.tensor([3.0]))
        self.engram = nn.ModuleDict({"table": nn.Embedding.from_pretrained(torch.tensor([[0.5]]), freeze=False)})


def test_two_steps_equal_adamw_by_hand():
    config = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5, engram_lr_scale=3.0)
    model = Two()
    start = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    gradients = [0.7, -0.2]
    for g in gradients:
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        set_learning_rate(optimizer, 0.05)
        optimizer.step()
    for name, p in model.named_parameters():
        w, m, v = start[name], 0.0, 0.0
        rate = 0.15 if "table" in name else 0.05
        decay = 0.5 if name == "matrix" else 0.0
        for t, g in enumerate(gradients, 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            update = (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
            w = w * (1 - rate * decay) - rate * update
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-6, atol=1e-7, msg=name)


def test_a_parameter_without_gradient_stays_where_it_is():
    model = Two()
    before = model.norm.detach().clone()
    optimizer = build_optimizer(model, OptimConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model.norm, before)
    assert torch.isfinite(model.matrix).all()


def look_ups(steps):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 6, (1, 4, 1), generator=g) for _ in range(steps)]


def test_touched_rows_follow_adam_by_row_and_others_stand_still():
    torch.manual_seed(0)
    table = RowTable(6, 2)
    weight = table.weight.clone().double()
    optimizer = RowAdam([table], lr=1.0, betas=(0.8, 0.9), eps=1e-3, lr_scale=3.0)
    m, v, n = torch.zeros(6, 2).double(), torch.zeros(6, 2).double(), [0] * 6
    for step, rows in enumerate(look_ups(7)):
        table.prefetch(lambda rows=rows: rows)
        table.begin()
        grad = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(step))
        table(rows).backward(grad)
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert table.rows.grad is None
        table.end()
        for i in set(rows.flatten().tolist()):
            g = grad[0][rows.flatten() == i].double().sum(0)
            n[i] += 1
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g * g
            weight[i] -= 0.3 * m[i] / (1 - 0.8 ** n[i]) / ((v[i] / (1 - 0.9 ** n[i])).sqrt() + 1e-3)
        torch.testing.assert_close(table.weight.double(), weight, rtol=1e-5, atol=1e-6)
    assert table.store["updates"].flatten().tolist() == n and len(set(n)) > 2


def test_rows_that_learned_nothing_change_nothing():
    table = RowTable(6, 2)
    before, optimizer = table.weight.clone(), RowAdam([table], lr=1.0, betas=(0.8, 0.9), eps=1e-20)
    table.prefetch(lambda: torch.tensor([1, 2]))
    table.begin()
    optimizer.step()
    table.end()
    assert torch.equal(table.weight, before) and not table.store["updates"].any()


def test_row_tables_have_their_own_optimizer():
    with row_tables():
        model = Transformer(ModelConfig.load("nano"))
    assert not parameter_groups(model, OptimConfig())["tables"]
    optimizer = build_optimizer(model, OptimConfig(lr=0.5))
    set_learning_rate(optimizer, 0.1)
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1, 0.5])
    learning = {p for group in groups for p in group["params"]}
    assert learning == set(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
