"""Spikes: what counts as one, the way back, experts of earlier weights against two models by hand; and culprits."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from abyssal.model import Transformer
from abyssal.train import start
from abyssal.train.data.rows import Batch
from abyssal.train.run import checkpoint, diagnose, metrics
from abyssal.train.run.checkpoint import Memory
from abyssal.train.run.loop import Run, TrainingDiverged
from abyssal.train.run.stability import Anticipation, Stability, Watch
from abyssal.train.settings import StabilityConfig
from abyssal.train.start import train

CONFIG = StabilityConfig(window=5, deviations=3.0, least=0.1, anticipatory_steps=4, lag=2)
SMALL = ("model.num_hidden_layers=3", "model.compress_ratios=[0,4,16]", "model.hidden_size=32")
CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib", "anticipation_seconds"}
BAD = 7  # the step, from 1, whose batch is poisoned


def watch(*losses: float, stage: int = 0) -> Watch:
    found = Watch(CONFIG)
    for step, loss in enumerate(losses):
        assert not found.sees(step, stage, loss), step
    return found


def test_a_spike_is_far_above_the_median_of_a_full_window():
    losses = [3.0, 2.8, 2.9, 2.5, 2.6]
    middle = np.median(losses)
    limit = middle + 3 * 1.4826 * np.median(np.abs(np.array(losses) - middle))
    assert watch(*losses).limit() == pytest.approx((middle, limit))
    assert watch(*losses).sees(5, 0, limit + 1e-6) and not watch(*losses).sees(5, 0, limit - 1e-6)
    assert not watch(*losses[:4]).sees(4, 0, 99.0), "four losses are no window"
    assert not watch(*losses, limit - 1e-6).sees(6, 0, 2.0), "falling is no spike"


def test_an_even_window_has_a_least_limit():
    assert watch(*[2.0] * 5).limit() == (2.0, 2.1)


def test_the_window_moves_on_and_a_spike_is_not_remembered():
    seen = watch(9.0, 9.0, 2.0, 2.0, 2.0)
    assert not seen.sees(5, 0, 2.0) and seen.losses == [9.0, 2.0, 2.0, 2.0, 2.0]
    assert seen.sees(6, 0, 8.0) and seen.losses == [9.0, 2.0, 2.0, 2.0, 2.0]


def test_a_new_stage_has_losses_of_its_own():
    seen = watch(*[2.0] * 5)
    assert not seen.sees(5, 1, 9.0) and seen.losses == [9.0] and seen.stage == 1


def test_after_going_back_nothing_is_seen_until_routing_is_as_before():
    old, now = watch(3.0, 3.0), watch(*[2.0] * 5)
    back = now.went_back(5, 8.0, 2, old)
    assert back.losses == [3.0, 3.0] and back.until == 6 + CONFIG.anticipatory_steps
    assert back.gone_back_to(2) == [{"step": 6, "loss": 8.0, "median": 2.0, "limit": 2.1, "to": 2}]
    assert back.gone_back_to(3) == []
    for step in range(2, 10):
        assert not back.sees(step, 0, 8.0 if step == 5 else 3.0), "its own batch spikes again, and is passed"
    assert back.sees(10, 0, 8.0)
    again = back.went_back(10, 8.0, 2, old)
    assert [spike["step"] for spike in again.gone_back_to(2)] == [6, 11] and again.until == 15


def test_memory_survives_json_to_the_bit():
    seen = watch(*(math.pi / n for n in range(1, 6))).went_back(5, math.e, 3, watch(1 / 3))
    back = Watch.from_dict(CONFIG, json.loads(json.dumps(seen.to_dict())))
    assert back == seen
    assert Watch.from_dict(CONFIG, {}) == Watch(CONFIG)


@pytest.mark.parametrize("lag", [1, 3])
def test_experts_are_chosen_by_the_weights_of_lag_steps_before(lag):
    ahead, present = Anticipation(lag), 0
    for present in range(5, 12):
        found = ahead.experts(present, 10, lambda step: [{0: torch.tensor([step, present])}])  # noqa: B023
        if present >= 10:
            assert found is None and not ahead.chosen
            continue
        assert found[0][0].tolist() == [present, max(present - lag, 5)]
        assert all(step < 10 for step in ahead.chosen), "none are chosen for the steps behind its end"
        kept = ahead.tensors()
        ahead = Anticipation(lag)
        ahead.load(kept)


def test_several_passes_and_layers_come_back_in_order():
    ahead = Anticipation(2)
    ahead.chosen = {
        11: [{n: torch.tensor([step, n]) for n in (0, 10, 9)} for step in range(12)],
        9: [{0: torch.ones(1)}],
    }
    again = Anticipation(2)
    again.load(ahead.tensors())
    assert again.chosen.keys() == ahead.chosen.keys() and len(again.chosen[11]) == 12
    assert all(torch.equal(again.chosen[11][p][n], ahead.chosen[11][p][n]) for p in range(12) for n in (0, 9, 10))
    stability = Stability(CONFIG)
    stability.load(Memory({}, ahead.tensors()))
    assert stability.memory().tensors.keys() == ahead.tensors().keys()


@pytest.fixture
def poisoned(monkeypatch):
    """Every run reads targets that nothing predicts in the batch of step BAD."""
    whole = start.open_source

    def open_source(recipe):
        source, rows_of = whole(recipe), recipe.data.batch_size
        batch = source.batch

        def poison(rows: range, length: int, stage: int = 0) -> Batch:
            read = batch(rows, length, stage)
            bad = rows.start == (BAD - 1) * rows_of
            return Batch(read.ids, torch.where(read.targets < 0, read.targets, 255), read.documents) if bad else read

        source.batch = poison
        return source

    monkeypatch.setattr(start, "open_source", open_source)


@pytest.fixture
def recipe(tiny):
    keys = ("window=4", "deviations=2", "least=0.2", "anticipatory_steps=2", "lag=2")
    settings = ("train.steps=11", "train.keep=20", "train.eval_every=0", "train.sample_tokens=0", "optim.lr=5e-3")
    return lambda *more: tiny(*SMALL, *settings, *(f"stability.{key}" for key in keys), *more)


def lines(run) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(run.out)]


@pytest.mark.slow("a run of eleven steps, twice")
def test_a_spike_takes_the_run_back_and_it_goes_on(recipe, poisoned, tmp_path, capsys):
    asked = recipe("train.checkpoint_every=2", "train.micro_batch=1")
    run = train(asked, tmp_path / "run", shown=False)
    found = lines(run)
    assert [line["step"] for line in found] == list(range(1, 12)), "one line for each step"
    assert [line["step"] for line in found if "went_back" in line] == [5]
    (spike,) = found[4]["went_back"]
    assert (spike["step"], spike["to"]) == (BAD, 4) and spike["loss"] > spike["limit"] > spike["median"]
    assert [line["step"] for line in found if line.get("anticipatory")] == [5, 6, 7, 8, 9]
    assert f"step {BAD}: loss" in capsys.readouterr().out
    assert {path.name for path in checkpoint.checkpoints(run.out)} == {f"step-{n:06d}" for n in (0, 2, 4, 6, 8, 10, 11)}
    memory = checkpoint.read_memory(run.out / checkpoint.FOLDER / "step-000006")
    assert {key.split(".")[0] for key in memory.tensors} == {"6", "7"} and memory.values["until"] == 9
    assert not checkpoint.read_memory(run.checkpoint).tensors
    first = train(asked, tmp_path / "again", stop_at=6, shown=False)  # stopped while routing is anticipatory
    rest = train(asked, first.out, resume=first.out, shown=False)
    assert lines(rest) == found
    old, new = (load_file(one.checkpoint / "optimizer.safetensors") for one in (run, rest))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_a_steady_run_is_left_alone(recipe, tiny, tmp_path):
    watched = train(recipe("train.steps=6"), tmp_path / "watched", shown=False)
    plain = tiny(*SMALL, "train.steps=6", "train.eval_every=0", "train.sample_tokens=0", "optim.lr=5e-3")
    alone = train(plain, tmp_path / "plain", shown=False)
    assert lines(watched) == lines(alone)


def chosen(model: Transformer, batch: Batch) -> list[torch.Tensor]:
    """The experts of every router, from scores and bias as they stand in its parameters."""
    inputs = []
    hooks = [
        block.ffn.gate.register_forward_hook(lambda gate, given, _: inputs.append((gate, *given)))
        for block in (*model.layers, *model.mtp)
    ]
    with torch.no_grad():
        model.eval()(batch.ids, targets=batch.targets, documents=batch.documents)
    for hook in hooks:
        hook.remove()
    k = model.config.num_experts_per_tok
    found = []
    for gate, x, ids in inputs:
        scores = torch.nn.functional.softplus(x @ gate.weight.T).sqrt()
        found.append(gate.tid2eid[ids] if gate.is_hash else (scores + gate.bias).argsort(-1, descending=True)[:, :k])
    return found


@pytest.mark.parametrize("place", ["resident", "host"])
def test_old_weights_choose_and_new_ones_compute(recipe, poisoned, tmp_path, place):
    """The loss of each anticipatory step from two models of the checkpoints of their steps."""
    host = ("optim.engram_rows=touched", "train.engram_tables=host", "train.micro_batch=1")
    tables = host if place == "host" else ()
    asked = recipe("train.checkpoint_every=1", *tables)
    run = Run(asked, start.open_source(asked), tmp_path / "run", None, shown=False)
    run.loop(asked.train.steps)
    run.close()
    record = {line["step"]: line for line in metrics.read(run.out)}
    assert record[6]["went_back"][0]["to"] == 5, "not to the checkpoint that the spike's own weights are in"

    def model_after(step: int) -> Transformer:
        model = Transformer(asked.model)
        checkpoint.load_model(run.out / checkpoint.FOLDER / f"step-{step:06d}", model)
        return model

    differs = 0
    for step in range(5, 9):  # from 0
        batch, new = run.batch(step), model_after(step)
        experts = chosen(model_after(max(step - 2, 5)), batch)
        differs += any(not torch.equal(a, b) for a, b in zip(experts, chosen(new, batch)))
        for block, given in zip((*new.layers, *new.mtp), experts):
            block.ffn.gate.replayed = given
        loss = new(batch.ids, targets=batch.targets, documents=batch.documents).losses["lm"].item()
        assert record[step + 1]["lm"] == pytest.approx(loss, rel=2e-6), step
    assert "anticipatory" not in record[10] and record[9]["anticipatory"] == 1
    assert differs, "old weights must choose other experts somewhere, or this shows nothing"


def test_where_the_way_back_leads(tiny, tmp_path):
    for step in (2, 4, 6):
        folder = tmp_path / checkpoint.FOLDER / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / checkpoint.STATE).touch()
    assert checkpoint.go_back(tmp_path, 6).name == "step-000004"
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004"]
    assert checkpoint.go_back(tmp_path, 2).name == "step-000002", "there is no other"
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002"]


def test_a_weight_is_named(tiny, tmp_path):
    def plant(model: Transformer) -> None:
        with torch.no_grad():
            model.layers[1].attn.wkv.weight[0, 0] = math.inf

    with pytest.raises(TrainingDiverged, match=r"step 1: .*layers\.1\.attn\.wkv\.weight holds numbers .* not finite"):
        train(tiny(*SMALL), tmp_path / "run", shown=False, prepare=plant)


def run_until(recipe, out, step: int, plant) -> str:
    """What the run says that ends with step `step`, from 1, when `plant(model)` is done before it."""

    def prepare(model: Transformer) -> None:
        def hook(module: Transformer, *_) -> None:
            calls.append(module.training)
            if sum(calls) == step:
                plant(module)

        calls: list[bool] = []
        model.register_forward_pre_hook(hook)

    with pytest.raises(TrainingDiverged) as error:
        train(recipe, out, shown=False, prepare=prepare)
    return str(error.value)


def test_a_gradient_is_named_and_the_last_checkpoint_is_whole(tiny, tmp_path):
    recipe, out = tiny(*SMALL, "train.checkpoint_every=1", "train.eval_every=0"), tmp_path / "run"
    says = run_until(recipe, out, 3, lambda model: model.layers[2].ffn.experts.w2.register_hook(lambda g: g * math.nan))
    assert "step 3: not every number is finite" in says and "grad_norm=nan" in says
    assert "every output is finite; the gradient of layers.2.ffn.experts.w2 is not" in says and "step-000002" in says
    last = load_file(checkpoint.find(out) / "model.safetensors")
    assert checkpoint.find(out).name == "step-000002" and all(x.isfinite().all() for x in last.values())
    assert [line["step"] for line in metrics.read(out)] == [1, 2]
    assert train(recipe, out, resume=out, shown=False).progress.step == 6, "it can be gone on from"


def test_a_module_is_named(tiny, tmp_path):
    def plant(model: Transformer) -> None:
        model.layers[1].attn.wq_b.register_forward_hook(lambda *call: call[2] / 0)

    says = run_until(tiny(*SMALL), tmp_path / "run", 2, plant)
    assert "step 2" in says and "the first output that is not finite is that of layers.1.attn.wq_b" in says
    assert "lm=nan" in says and "The last checkpoint is none" in says


def test_weights_that_are_not_finite_are_never_saved(tiny, tmp_path):
    run = Run(tiny(*SMALL), start.open_source(tiny(*SMALL)), tmp_path / "run", None, shown=False)
    with torch.no_grad():
        run.model.layers[0].ffn.gate.weight[0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"after step 0: layers\.0\.ffn\.gate\.weight holds"):
        run.save()
    run.close()
    assert checkpoint.checkpoints(run.out) == []


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_nothing_is_to_blame_in_a_healthy_model(tiny, stage):
    model, ids = Transformer(tiny(*SMALL).model), torch.arange(48)[None] * 5 % 250
    model.attention_stage = stage
    assert diagnose.culprit(model, lambda: model(ids, targets=ids)) == "every weight, output and gradient is finite"
    assert not any(module._forward_hooks for module in model.modules())
