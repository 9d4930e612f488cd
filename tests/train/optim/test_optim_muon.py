"""Muon against plain loops over single matrices in float64, by their singular values; and against torch's own Muon."""

import math

import pytest
import torch
from torch import Tensor, nn

from abyssal.kernels.newton_schulz import HYBRID
from abyssal.model import ModelConfig, Transformer
from abyssal.train.optim import Muon, UpdateMeter, build_optimizer, set_learning_rate
from abyssal.train.optim import muon as muon_module
from abyssal.train.optim.observe import orthogonality
from abyssal.train.settings import OptimConfig

MU, GAMMA, DECAY, LR = 0.9, 0.25, 0.2, 0.05


def orthogonalised(m: Tensor) -> Tensor:
    """Each singular value s of M / |M| taken through the ten cubic-and-quintic steps one by one."""
    if not m.any():
        return m
    u, s, v = torch.linalg.svd(m / m.square().sum().sqrt(), full_matrices=False)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def updated(w: Tensor, m: Tensor, g: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weight and momentum after a step, matrix by matrix; w [r, c] or [e, r, c]."""
    if w.ndim == 3:
        both = [updated(*parts, rows) for parts in zip(w, m, g)]
        return torch.stack([a for a, _ in both]), torch.stack([b for _, b in both])
    m, pieces, at = MU * m + g, [], 0
    for count in rows:
        part = slice(at, at + count)
        factor = GAMMA * math.sqrt(max(count, w.shape[1]))
        pieces.append(w[part] * (1 - LR * DECAY) - LR * factor * orthogonalised(MU * m[part] + g[part]))
        at += count
    return torch.cat(pieces), m


SHAPES = [
    ((6, 4), (6,)),  # tall
    ((4, 9), (4,)),
    ((5, 8, 4), (4, 4)),  # five experts of W1 above W3
    ((5, 4, 8), (4,)),
    ((24, 12), (4, 4, 16)),  # three maps of unequal size
    ((9, 4), (3, 3, 3)),
    ((1, 7), (1,)),
]


def gradient(shape: tuple[int, ...], step: int, seed: int) -> Tensor:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(31 * step + seed)) * (1e-3, 1.0, 0.5, 20.0)[step]
    if len(shape) == 3:
        g[2] = 0  # an expert without tokens, from the beginning
        if step > 1:
            g[1] = 0  # and one that has had some
    return g


def muon(parameters: list[Tensor], rows: list[tuple[int, ...]], **more) -> Muon:
    return Muon(parameters, rows, lr=LR, momentum=MU, scale=GAMMA, weight_decay=DECAY, **more)


@pytest.mark.parametrize("scratch", [muon_module.SCRATCH, 100])
def test_four_steps_equal_a_loop_over_single_matrices(monkeypatch, scratch):
    monkeypatch.setattr(muon_module, "SCRATCH", scratch)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape, _ in SHAPES]
    optimizer = muon(parameters, [rows for _, rows in SHAPES])
    weights = [p.detach().double() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        for i, (shape, rows) in enumerate(SHAPES):
            parameters[i].grad = gradient(shape, step, i)
            if step == 2 and i == 0:
                parameters[i].grad = torch.zeros(shape)
            if step == 2 and i == 1:
                parameters[i].grad = None  # neither update nor decay, and its momentum waits
                continue
            weights[i], momenta[i] = updated(weights[i], momenta[i], parameters[i].grad.double(), rows)
        optimizer.step()
        for i, (parameter, weight, momentum) in enumerate(zip(parameters, weights, momenta)):
            said = f"step {step}, {SHAPES[i]}"
            torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=2e-4, msg=said)
            torch.testing.assert_close(optimizer.state[parameter]["momentum"].double(), momentum, rtol=1e-5, atol=1e-6)


def test_a_matrix_without_gradient_goes_on_at_full_length_and_one_that_never_had_any_only_decays():
    parameter = nn.Parameter(torch.ones(2, 4, 4))
    optimizer = Muon([parameter], [(4,)], lr=1.0, weight_decay=0.25)
    parameter.grad = torch.zeros(2, 4, 4)
    parameter.grad[0] = 1e-6 * torch.eye(4)
    optimizer.step()
    parameter.grad.zero_()
    for _ in range(5):
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter[1], 0.75 * before[1])
        torch.testing.assert_close(parameter[0], 0.75 * before[0] - 0.18 * 2 * torch.eye(4), rtol=1e-3, atol=1e-3)
    assert float(optimizer.state[parameter]["momentum"][0, 0, 0]) == pytest.approx(1e-6 * 0.95**5)


def test_a_nan_shows_in_its_own_matrix_alone():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 8, 4))
    optimizer = muon([parameter], [(4, 4)])
    parameter.grad = torch.randn(3, 8, 4)
    parameter.grad[1, 5, 2] = math.nan
    optimizer.step()
    bad = parameter.isnan()
    assert bad[1, 4:].all() and bad.sum() == 16


def test_the_size_of_the_gradient_does_not_matter_and_the_update_has_the_asked_rms():
    torch.manual_seed(0)
    gradients = torch.randn(32, 96)
    found = []
    for scale in (1e-12, 1.0, 1e12):
        parameter = nn.Parameter(torch.zeros(32, 96))
        parameter.grad = gradients * scale
        Muon([parameter], [(32,)], lr=1.0, weight_decay=0.0).step()
        found.append(parameter.detach())
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.18, rel=1e-3)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[1])


def test_torch_s_muon_makes_the_same_steps_where_it_can():
    """Its momentum is an average, (1 - μ) times our sum, and the length is lost in the iteration; its rms is 0.2, it
    takes one triple of coefficients, works in bfloat16 and adds 1e-7 to the norm.
    """
    torch.manual_seed(0)
    start = [torch.randn(12, 20), torch.randn(30, 8)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    triple, steps = (3.4445, -4.7750, 2.0315), 5
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3}
    mine = Muon(
        ours, [(12,), (30,)], scale=0.2, coefficients=[triple] * steps, compute_dtype=torch.bfloat16, **settings
    )
    torchs = torch.optim.Muon(
        theirs, ns_coefficients=triple, ns_steps=steps, adjust_lr_fn="match_rms_adamw", **settings
    )
    for step in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step)) * 3.0**step
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b, x in zip(ours, theirs, start):
        moved = float((b.detach() - x).square().mean().sqrt())
        assert moved > 0.02, "it must move, or this shows nothing"
        assert float((a - b).detach().square().mean().sqrt()) < 0.01 * moved


def test_rows_must_add_up():
    with pytest.raises(ValueError, match=r"rows=\(4, 4\) of a parameter \(6, 4\): must add up to its axis -2"):
        Muon([nn.Parameter(torch.ones(6, 4))], [(4, 4)], lr=1.0)
    with pytest.raises(ValueError, match="axis -2"):
        Muon([nn.Parameter(torch.ones(6))], [(6,)], lr=1.0)
    with pytest.raises(ValueError, match="shorter"):
        Muon([nn.Parameter(torch.ones(6, 4))], [], lr=1.0)


CONFIG = OptimConfig(rule="muon", lr=0.1, momentum=MU, update_scale=GAMMA, weight_decay=DECAY, engram_lr_scale=3.0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.load("nano"))


def test_a_model_s_muon_has_the_recipe_s_settings_and_its_experts_matrices(model):
    optimizer = build_optimizer(model, CONFIG)
    set_learning_rate(optimizer, LR)
    names = {p: n for n, p in model.named_parameters()}
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, rows in (
        ("layers.1.ffn.experts.w13", (64, 64)),
        ("layers.1.ffn.experts.w2", (64,)),
        ("layers.0.hc_attn.fn", (4, 4, 16)),
        ("layers.1.engram.wkv.weight", (64,) * 5),
    ):
        parameter = model.get_parameter(name)
        want, _ = updated(before[name], torch.zeros_like(before[name]), parameter.grad.double(), rows)
        torch.testing.assert_close(parameter.detach().double(), want, rtol=0, atol=2e-3, msg=name)
    groups = {names[p]: (g["lr"], g.get("weight_decay")) for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == before.keys()
    assert groups["layers.0.attn.wq_a.weight"] == (LR, DECAY) and groups["head.weight"] == (LR, DECAY)
    assert groups["embed.weight"] == groups["norm.weight"] == groups["layers.0.hc_attn.base"] == (LR, 0.0)
    assert groups["layers.1.engram.table.weight"] == (pytest.approx(3 * LR), 0.0)


def test_a_step_inside_autocast_is_float32_all_through(model):
    twin = Transformer(model.config)
    optimizer = build_optimizer(twin, CONFIG)
    set_learning_rate(optimizer, LR)
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    before = {n: p.detach().double() for n, p in twin.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        twin(ids, targets=ids).loss.backward()
        optimizer.step()
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert {x.dtype for states in optimizer.state.values() for x in states.values()} == {torch.float32}
    name = "layers.2.attn.wq_a.weight"
    gradient = twin.get_parameter(name).grad.double()
    want, _ = updated(before[name], torch.zeros_like(gradient), gradient, (32,))
    torch.testing.assert_close(twin.get_parameter(name).detach().double(), want, rtol=0, atol=1e-4)


def test_the_meter_tells_each_update_per_unit_of_learning_rate(model):
    twin = Transformer(model.config)
    config = OptimConfig(rule="muon", lr=0.5, weight_decay=0.0, engram_lr_scale=1.0, engram_rule="balanced")
    optimizer = build_optimizer(twin, config)
    set_learning_rate(optimizer, 0.5)
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in twin.named_parameters()}
        for p in twin.parameters():
            p.grad = torch.randn_like(p)
        meter = UpdateMeter(twin, config, spectra=True)
        optimizer.step(observe=meter)
    rms = meter.rms()
    assert rms.keys() == before.keys()
    for name, p in twin.named_parameters():
        assert rms[name] == pytest.approx(2 * float((p.detach() - before[name]).square().mean().sqrt()), rel=1e-4), name
    assert rms["layers.0.ffn.experts.w13"] == pytest.approx(0.18, rel=1e-3)
    found = meter.orthogonality()
    assert found.rms < 0.02 and 0 < found.worst < 1, "a random square matrix may have a singular value of almost zero"
    assert found.matrices == sum(
        stack * len(rule.rows)
        for name, rule in meter._rules.items()
        if rule.name == "muon"
        for stack in [before[name].shape[:-2].numel()]
    )


def test_a_meter_on_a_parameter_without_gradient_says_nothing():
    layer = nn.Linear(3, 2)
    for config in (OptimConfig(), OptimConfig(rule="muon")):
        meter = UpdateMeter(layer, config, spectra=True)
        layer.weight.grad, layer.bias.grad = None, torch.ones(2)
        build_optimizer(layer, config).step(observe=meter)
        assert meter.rms() == {"bias": pytest.approx(1.0)} and meter.orthogonality() == (0.0, 0.0, 0)


def test_orthogonality_counts_every_singular_value():
    u = torch.eye(4)[:2]
    assert orthogonality({"a": 0.5 * 2.0 * u}, {"a": (2,)}, 0.5) == (0.0, 0.0, 1)
    off = torch.diag(torch.tensor([1.0, 1.5])) @ u
    worst, rms, matrices = orthogonality({"a": torch.stack([2.0 * u, 2.0 * off])}, {"a": (2,)}, 1.0)
    assert (worst, rms, matrices) == (pytest.approx(0.5), pytest.approx(0.25), 2)
    missing = torch.diag(torch.tensor([1.0, 0.0])) @ u
    assert orthogonality({"a": 2.0 * missing}, {"a": (2,)}, 1.0).worst == 1.0
    assert orthogonality({"a": torch.cat([2.0 * u, 2.0 * off])}, {"a": (2, 2)}, 1.0)[1:] == (pytest.approx(0.25), 2)


def test_the_schedule_of_coefficients_is_eight_and_two():
    parameter = nn.Parameter(torch.zeros(8, 8))
    assert Muon([parameter], [(8,)], lr=1.0).iteration["coefficients"] == HYBRID and len(HYBRID) == 10
