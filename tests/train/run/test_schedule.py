"""Stages, ramp, learning rate and loss weights by hand; and that a stage trains what it says and nothing else."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from abyssal.train.cli import main
from abyssal.train.recipe import Recipe, load_recipe
from abyssal.train.run import checkpoint, metrics
from abyssal.train.run.load import load_trained
from abyssal.train.run.schedule import Schedule, plan
from abyssal.train.settings import StageConfig
from abyssal.train.start import train

STAGES = [
    {"steps": 4, "sequence_length": 32, "batch_size": 6, "attention": "dense"},
    {"steps": 3, "attention": "warmup", "lr": 0.01},
    {"steps": 13, "sequence_length": 96, "batch_size": 3},
]


def staged(stages=STAGES, **tables) -> Recipe:
    values = load_recipe("nano", ["optim.lr=1.0", "optim.warmup_steps=2", "optim.decay_share=0.5"]).to_dict()
    del values["train"]
    return Recipe.from_dict({**values, "stages": stages, **tables})


@pytest.mark.parametrize("name", ["nano", "toy", "small", "long"])
def test_without_stages_every_step_is_as_it_always_was(name):
    recipe = load_recipe(name)
    schedule, b = Schedule(recipe), recipe.data.batch_size
    for step in (0, 1, recipe.train.steps // 2, recipe.train.steps - 1):
        phase = schedule.phase(step)
        assert phase.rows == range(step * b, (step + 1) * b)
        assert (phase.stage, phase.length, phase.attention) == (0, recipe.data.sequence_length, "sparse")
        model = recipe.model
        assert phase.weights == {
            "lm": 1.0,
            "mtp": model.mtp_loss_weight,
            "balance": model.balance_loss_weight,
            "index": model.index_loss_weight,
        }
        assert phase.bias_speed == model.router_bias_update_speed and not phase.indexer_only


def test_stages_follow_one_another_and_number_their_rows_from_0():
    recipe = staged()
    schedule, expected = Schedule(recipe), []
    for number, stage in enumerate(STAGES):
        first, size = 0, stage.get("batch_size", recipe.data.batch_size)
        for _ in range(stage["steps"]):
            expected.append((number, range(first, first + size), stage.get("sequence_length", 128)))
            first += size
    assert recipe.train.steps == len(expected) == 20
    assert [(p.stage, p.rows, p.length) for p in map(schedule.phase, range(20))] == expected
    assert schedule.phase(21).rows == range(14 * 3, 15 * 3), "past its end the last stage goes on"
    assert [schedule.phase(step).attention for step in (0, 3, 4, 6, 7)] == ["dense", "dense", *2 * ["warmup"], "sparse"]
    assert [schedule.tokens(stage) for stage in range(3)] == [4 * 6 * 32, 3 * 8 * 128, 13 * 3 * 96]
    assert schedule.last(0) == schedule.phase(0) and schedule.last(5) == schedule.phase(4)


@pytest.mark.parametrize(("start", "ramp"), [(1, 4), (2, 7), (3, 12), (1, 1), (3, 100)])
def test_the_batch_grows_in_multiples_of_its_start(start, ramp):
    schedule = Schedule(staged(schedule={"batch_start": start, "batch_ramp_steps": ramp}))
    seen = [0, 0, 0]
    for step in range(20):
        phase = schedule.phase(step)
        full = (6, 8, 3)[phase.stage]
        exact = start + (full - start) * step / ramp
        count = full if step >= ramp else start * math.floor(exact / start + 1e-9)
        assert phase.rows == range(seen[phase.stage], seen[phase.stage] + count), step
        seen[phase.stage] += count
    assert [schedule.tokens(stage) for stage in range(3)] == [n * t for n, t in zip(seen, (32, 128, 96))]


def test_a_stage_scales_the_learning_rate_of_the_whole_run():
    schedule = Schedule(staged())
    lr = [schedule.phase(step).lr for step in range(20)]
    assert lr[:4] == [0.5, 1, 1, 1] and lr[4:7] == [0.01] * 3 and lr[7:10] == [1.0] * 3
    for step in range(10, 20):
        p = (step - 9) / 10
        assert lr[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2)


def test_weights_change_with_the_tail_and_in_the_warmup():
    recipe = staged(schedule={"mtp_final_share": 1 / 3, "bias_rest_share": 0.2})
    phases, model = [Schedule(recipe).phase(step) for step in range(20)], recipe.model
    assert [p.weights.get("mtp") for p in phases] == [*4 * [0.3], *3 * [None], *3 * [0.3], *10 * [pytest.approx(0.1)]]
    assert phases[5].weights == {"index": model.index_loss_weight} and phases[5].indexer_only
    speed = model.router_bias_update_speed
    assert [p.bias_speed for p in phases] == [*4 * [speed], 0, 0, 0, *9 * [speed], 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"steps": 7}}, r"train.steps=7: allowed is 20, the sum of the stages"),
        ({"schedule": {"batch_start": 7, "batch_ramp_steps": 5}}, r"batch_start=7: allowed are 1 to 6"),
        ({"stages": []}, r"stages=\[\]: allowed are one or more"),
        ({"stages": {"steps": 3}}, r"allowed are one or more tables \[\[stages\]\]"),
        ({"stages": [{"attention": "thick"}]}, "stages.attention='thick': allowed is sparse, dense or warmup"),
        ({"stages": [{"stepps": 3}]}, "unknown key 'stages.stepps': the nearest known key is 'stages.steps'"),
        ({"schedule": {"mtp_final_share": 2.0}}, "mtp_final_share=2.0"),
        ({"grpo": {}, "reason": {}}, r"\[stages\] beside \[grpo\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        staged(**change)


def test_a_warmup_needs_an_indexer():
    model = load_recipe("nano", ["model.compress_ratios=[0,16,16,16,16]"]).model
    with pytest.raises(ValueError, match=r"stages.1.attention='warmup': allowed where the model has a CSA layer"):
        dataclasses.replace(staged(), model=model)


def test_stages_are_part_of_the_recipe(tmp_path):
    recipe = staged()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    (tmp_path / "mine.toml").write_text(
        (open_text("nano").partition("[data]")[0]) + "\n[[stages]]\nsteps = 3\n\n[[stages]]\nattention = 'dense'\n",
        "utf-8",
    )
    mine = load_recipe(tmp_path / "mine.toml", ["stages.1.steps=5", "stages.0.lr=0.5"])
    assert mine.stages == (StageConfig(steps=3, lr=0.5), StageConfig(steps=5, attention="dense"))
    assert mine.train.steps == 8
    for override, message in (("stages.2.steps=1", "allowed are 0 to 1"), ("stages.steps=1", "stages.0.key=value")):
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "mine.toml", [override])


def open_text(name: str) -> str:
    from importlib import resources

    return (resources.files("abyssal.configs") / f"{name}.toml").read_text("utf-8")


def test_the_plan_is_printed(capsys):
    text = plan(staged(schedule={"batch_start": 2, "batch_ramp_steps": 3, "mtp_final_share": 0.5}))
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["0", "1", "to", "4", "2", "to", "6", "32", "dense", "5.00e-01", "to", "1.00e+00", "448"]
    assert lines[2][:7] == ["1", "5", "to", "7", "8", "128", "warmup"]
    assert lines[4] == ["all", "20", f"{448 + 3 * 8 * 128 + 13 * 3 * 96:,}"]
    assert "MTP weight: 0.3, from step 11 on 0.15" in text and "biases" not in text
    assert main(["info", "toy", "--schedule"]) == 0
    assert f"1 to {load_recipe('toy').train.steps}" in capsys.readouterr().out


def test_the_shipped_example_shows_every_stage():
    recipe = load_recipe("stages", ["stages.4.steps=31"])
    phases = [Schedule(recipe).phase(step) for step in range(recipe.train.steps)]
    assert list(dict.fromkeys(phase.attention for phase in phases)) == ["dense", "warmup", "sparse"]
    lengths = [phase.length for phase in phases]
    assert lengths == sorted(lengths) and len(set(lengths)) == 4
    assert [len(phases[step].rows) for step in (0, 20, 30)] == [4, 12, 16]
    assert sum(len(phase.rows) * phase.length for phase in phases) == sum(map(Schedule(recipe).tokens, range(5)))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Two steps of each stage, a checkpoint after each."""
    values = tiny("train.checkpoint_every=2", "train.keep=9", "train.eval_every=2", "optim.weight_decay=0.5").to_dict()
    stages = [{"steps": 2, "attention": kind, "sequence_length": n} for kind, n in zip(("dense", "warmup"), (32, 48))]
    recipe = Recipe.from_dict({**values, "stages": [*stages, {"steps": 2, "sequence_length": 64, "batch_size": 3}]})
    return train(recipe, tmp_path_factory.mktemp("staged") / "run", shown=False)


def changed(run, file: str, before: int, after: int) -> set[str]:
    a, b = (
        load_file(run.out / checkpoint.FOLDER / f"step-{step:06d}" / f"{file}.safetensors") for step in (before, after)
    )
    return {name for name in b if name not in a or not torch.equal(a[name], b[name])}


def test_each_stage_trains_what_it_says(run):
    model = load_file(run.checkpoint / "model.safetensors").keys()
    indexer = {name for name in model if ".indexer." in name}
    moments = load_file(run.out / checkpoint.FOLDER / "step-000002" / "optimizer.safetensors")
    assert indexer and not any(".indexer." in name for name in moments), "dense attention leaves the indexer alone"
    assert changed(run, "model", 2, 4) == indexer
    assert {".indexer." in name for name in changed(run, "optimizer", 2, 4)} == {True}
    learns = {name for name in model if not name.endswith("tid2eid") and "canonical" not in name}
    assert len(changed(run, "model", 4, 6)) > 0.9 * len(learns)


def test_the_metrics_say_which_stage_a_step_was_in(run):
    records = metrics.read(run.out)
    assert [(r["stage"], r["attention"], r["rows"], r["length"]) for r in records] == [
        *2 * [(0, "dense", 2, 32)],
        *2 * [(1, "warmup", 2, 48)],
        *2 * [(2, "sparse", 3, 64)],
    ]
    assert ["index" in r for r in records] == [False] * 2 + [True] * 4
    for record in records[2:4]:
        assert record["loss"] == pytest.approx(0.01 * record["index"], rel=1e-5) and record["grad_norm"] > 0
    assert records[1]["held_out"] == records[3]["held_out"], "the warm-up changes nothing that dense attention reads"
    assert records[5]["held_out"] != records[3]["held_out"]


def test_a_checkpoint_is_read_in_the_attention_it_was_trained_with(run):
    stages = [
        load_trained(run.out / checkpoint.FOLDER / f"step-00000{step}", "cpu")[0].attention_stage for step in (2, 4, 6)
    ]
    assert stages == ["dense", "warmup", "sparse"]


def test_a_staged_run_resumes_to_the_same_bits(run, tmp_path):
    recipe = checkpoint.read_state(run.checkpoint)[0]
    first = train(recipe, tmp_path / "run", stop_at=3, shown=False)
    rest = train(recipe, first.out, resume=first.out, shown=False)
    for file in ("model", "optimizer"):
        a, b = (load_file(one.checkpoint / f"{file}.safetensors") for one in (run, rest))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
