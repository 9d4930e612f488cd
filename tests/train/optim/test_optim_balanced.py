"""V4.1's balanced rule against its algorithm written out with plain loops in float64, dense and by touched rows."""

import math

import pytest
import torch
from torch import Tensor, nn

from abyssal.model import ModelConfig, Transformer
from abyssal.model.tables import RowTable, row_tables
from abyssal.train.optim import UpdateMeter, build_optimizer, set_learning_rate
from abyssal.train.optim.balanced import Balanced, RowBalanced, balance
from abyssal.train.settings import OptimConfig

BETA, GAMMA = 0.8, 0.25


def balanced(x: Tensor) -> Tensor:
    """Algorithm 1 of V4.1, round by round on the whole matrix."""
    size = x.square().sum(1).sqrt()
    u = x.clone()
    for i in range(len(x)):
        if size[i] <= 1e-3 * size.mean():
            u[i] = 0
    for k in range(1, 12):
        for line in u if k % 2 else u.T:
            line /= line.square().sum().sqrt() + 1e-20
    return math.sqrt(x.shape[1]) * u


def gradients(step: int, rows: int = 9, width: int = 4) -> Tensor:
    g = torch.randn(rows, width, generator=torch.Generator().manual_seed(step))
    g *= 10.0 ** torch.linspace(-2, 1, rows)[:, None]
    g[3] = 0
    if step % 2:
        g[0] *= 1e-6
    return g


@pytest.mark.parametrize("shape", [(9, 4), (3, 8), (1, 5), (200, 6)])
def test_the_balance_is_that_of_eleven_rounds(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-2, 2, shape[1])
    if shape[0] > 2:
        x[1], x[2] = 0, 1e-9
    u = balance(x)
    torch.testing.assert_close(u.double(), balanced(x.double()), rtol=1e-4, atol=1e-5)
    live = [i for i in range(shape[0]) if i not in (1, 2) or shape[0] <= 2]
    torch.testing.assert_close(u.square().mean(1)[live], torch.ones(len(live)), rtol=1e-5, atol=0)
    assert shape[0] <= 2 or not u[1:3].any()


def test_zero_rows_and_columns_stay_zero_and_a_nan_is_seen():
    assert not balance(torch.zeros(3, 4)).any()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    u = balance(x)
    assert not u[:, 2].any() and u.isfinite().all()
    x[4, 1] = math.nan
    assert balance(x).isnan().any(1).all()


def test_four_dense_steps_by_hand():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(9, 4))
    optimizer = Balanced([parameter], lr=0.1, momentum=BETA, scale=GAMMA)
    w, m = parameter.detach().double(), torch.zeros(9, 4).double()
    for step in range(4):
        g = gradients(step)
        parameter.grad = g.clone()
        optimizer.step()
        m = BETA * m + (1 - BETA) * g.double()
        w = w - 0.1 * GAMMA * balanced(BETA * m + (1 - BETA) * g.double())
        torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-4, atol=1e-5, msg=f"step {step}")
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)
    before, parameter.grad = parameter.detach().clone(), None
    optimizer.step()
    assert torch.equal(parameter, before)


def test_only_matrices():
    with pytest.raises(ValueError, match=r"a parameter \(3,\): the balanced rule takes \[rows, width\]"):
        Balanced([nn.Parameter(torch.ones(3))], lr=1.0)


def test_touched_rows_are_balanced_among_themselves_and_others_stand_still():
    torch.manual_seed(0)
    table = RowTable(7, 3)
    optimizer = RowBalanced([table], lr=1.0, momentum=BETA, scale=GAMMA, lr_scale=3.0)
    weight, m = table.weight.clone().double(), torch.zeros(7, 3).double()
    touched = [[0, 2, 2, 5], [5, 1], [0, 1, 2, 3], [4], [2, 5]]
    for step, rows in enumerate(touched):
        ids = torch.tensor(rows)[None, :, None]
        table.prefetch(lambda ids=ids: ids)
        table.begin()
        grad = torch.randn(1, len(rows), 3, generator=torch.Generator().manual_seed(step))
        table(ids).backward(grad)
        set_learning_rate(optimizer, 0.1)
        seen = []
        optimizer.step(observe=lambda rows, update, seen=seen: seen.append(update))
        optimizer.zero_grad()
        table.end()
        held = sorted(set(rows))
        g = torch.stack([sum(grad[0, at] for at, row in enumerate(rows) if row == i) for i in held]).double()
        m[held] = BETA * m[held] + (1 - BETA) * g
        update = GAMMA * balanced(BETA * m[held] + (1 - BETA) * g)
        weight[held] -= 0.3 * update
        torch.testing.assert_close(table.weight.double(), weight, rtol=1e-4, atol=1e-5, msg=f"step {step}")
        torch.testing.assert_close(table.store["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(seen[0].double(), update, rtol=1e-4, atol=1e-5)
    assert table.store.keys() == {"weight", "exp_avg"} and not m[6].any()


BALANCED = OptimConfig(lr=0.1, engram_rule="balanced", embedding_rule="balanced", momentum=BETA, update_scale=GAMMA)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_model_s_tables_embedding_and_head_in_one_step(rule):
    model = Transformer(ModelConfig.load("nano"))
    config = OptimConfig(rule=rule, **{k: getattr(BALANCED, k) for k in ("engram_rule", "embedding_rule", "momentum")})
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    names = ("embed.weight", "head.weight", "layers.1.engram.table.weight")
    before = {name: model.get_parameter(name).detach().double() for name in names}
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    optimizer.step()
    for name, rate in zip(names, (0.1, 0.1, 0.5)):
        parameter = model.get_parameter(name)
        rows = torch.arange(0, len(parameter), max(1, len(parameter) // 200))
        x = (1 - BETA**2) * parameter.grad.double()
        u = balance(x)
        want = before[name] - rate * 0.18 * u
        torch.testing.assert_close(parameter.detach().double()[rows], want[rows], rtol=1e-4, atol=1e-5, msg=name)
        assert optimizer.state[parameter].keys() == {"exp_avg"}
    assert {len(states) for states in optimizer.state.values()} == ({1, 3})


def test_the_meter_names_the_rows_that_a_step_holds():
    for rule, rms in (("balanced", GAMMA), ("adam", 1.0)):
        with row_tables():
            model = Transformer(ModelConfig.load("nano"))
        config = OptimConfig(engram_rule=rule, update_scale=GAMMA, momentum=BETA)
        optimizer = build_optimizer(model, config)
        set_learning_rate(optimizer, 0.1)
        group = optimizer.param_groups[-1]
        assert group["lr"] == 0.5 and group.get("momentum", BETA) == BETA
        table = model.layers[1].engram.table
        table.prefetch(lambda: torch.tensor([1, 5, 9]))
        table.begin()
        table.rows.grad = torch.randn(3, table.size[1])
        meter = UpdateMeter(model, config)
        optimizer.step(observe=meter)
        table.end()
        assert meter.rms() == {"layers.1.engram.table.weight": pytest.approx(rms, rel=1e-4)}
