"""Training end to end on the nano model: resume to the bit, honest numbers, clear ends."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import wait_for
from safetensors.torch import load_file
from torch.nn import functional as F

import abyssal
from abyssal.train.data.bits import target_bits
from abyssal.train.data.corpus import load_corpus
from abyssal.train.data.rows import held_out
from abyssal.train.distributed import world
from abyssal.train.run import checkpoint, loop, metrics
from abyssal.train.run.load import load_trained
from abyssal.train.run.loop import TrainingDiverged
from abyssal.train.start import train

SMALL = {"index", "grad_norm"}  # numbers that rounding moves more than others
CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib"}


def without_clock(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(folder)]


def assert_same_bits(a: Path, b: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        old, new = load_file(a / file), load_file(b / file)
        assert old.keys() == new.keys(), file
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]), f"{file}: {name}"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Six steps in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(tiny(), out, shown=False)


def test_same_seed_same_bits_other_seed_other_bits(whole, tiny, tmp_path):
    again = train(tiny(), tmp_path / "again", shown=False)
    assert without_clock(again.out) == without_clock(whole.out)
    assert_same_bits(whole.checkpoint, again.checkpoint)
    assert again.sample == whole.sample
    other = train(tiny("train.seed=1", "train.steps=1"), tmp_path / "other", shown=False)
    assert metrics.read(other.out)[0]["lm"] != metrics.read(whole.out)[0]["lm"]


def test_three_steps_and_three_resumed_equal_six(whole, tiny, tmp_path):
    out = tmp_path / "run"
    train(tiny(), out, stop_at=3, shown=False)
    torch.rand(17)  # whatever else happens in between
    with open(out / metrics.FILE, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')
    resumed = train(tiny(), out, resume=out, shown=False)
    assert without_clock(out) == without_clock(whole.out)
    assert_same_bits(whole.checkpoint, resumed.checkpoint)
    assert resumed.scores["held_out"] == whole.scores["held_out"]
    starts = json.loads((out / "run.json").read_text("utf-8"))["starts"]
    assert [start["step"] for start in starts] == [0, 3]


def test_resuming_into_another_folder_leaves_the_first_alone(whole, tiny, tmp_path):
    first = tmp_path / "first"
    train(tiny(), first, stop_at=3, shown=False)
    before = {path: path.read_bytes() for path in sorted(first.rglob("*")) if path.is_file()}
    branch = train(tiny(), tmp_path / "branch", resume=first, shown=False)
    assert before == {path: path.read_bytes() for path in sorted(first.rglob("*")) if path.is_file()}
    assert_same_bits(whole.checkpoint, branch.checkpoint)
    assert without_clock(branch.out) == without_clock(whole.out)


@pytest.mark.slow("a process trains until it is killed, then a run goes on")
def test_killed_without_warning_resumes_to_the_same_bits(whole, tiny, texts, tmp_path):
    recipe = tiny("train.checkpoint_every=1", "train.keep=100")
    values = recipe.to_dict()
    settings = [
        f"{table}.{k}={json.dumps(v)}" for table in ("data", "optim", "train") for k, v in values[table].items()
    ]
    command = [sys.executable, "-m", "abyssal.train", "train", "nano", "--out", str(tmp_path / "run")]
    root = str(Path(abyssal.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *(part for text in settings for part in ("--set", text))],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: checkpoint.checkpoints(tmp_path / "run"), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = checkpoint.checkpoints(tmp_path / "run")
    assert found, "no checkpoint was written before the kill"
    resumed = train(recipe, tmp_path / "run", resume=tmp_path / "run", shown=False)
    assert_same_bits(whole.checkpoint, resumed.checkpoint)
    assert without_clock(resumed.out) == without_clock(whole.out)


def test_one_complete_line_per_step(whole, tiny):
    records = metrics.read(whole.out)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    config = tiny().model
    weights = {"lm": 1.0, "mtp": config.mtp_loss_weight, "balance": config.balance_loss_weight}
    weights["index"] = config.index_loss_weight
    for record in records:
        assert record["loss"] == pytest.approx(sum(w * record[part] for part, w in weights.items()), rel=1e-5)
        assert record["grad_norm"] > 0 and record["tokens_per_second"] > 0 and record["peak_memory_gib"] > 0
        assert len(record["load_max"]) == len(record["load_cv"]) == config.num_hidden_layers + 1
        assert all(1 <= load <= config.n_routed_experts for load in record["load_max"])
        assert len(record["spread"]) == config.num_hidden_layers
        assert len(record["captured"]) == sum(kind.startswith("compressed") for kind in config.layer_types)
        assert ("held_out" in record) == (record["step"] % 2 == 0) == ("trigram" in record)
    assert [r["tokens"] for r in records] == sorted({r["tokens"] for r in records})
    assert abs(records[0]["lm"] - math.log(config.vocab_size)) < 0.5
    assert records[-1]["held_out"] == whole.scores["held_out"]


@pytest.mark.slow("thirty steps")
def test_learns(tiny, tmp_path):
    recipe = tiny("train.steps=30", "train.eval_every=0", "data.batch_size=4")
    summary = train(recipe, tmp_path / "run", shown=False)
    records = metrics.read(summary.out)
    assert records[-1]["lm"] < records[0]["lm"] - 1
    assert summary.scores["held_out"] < 6


def test_held_out_bits_are_the_mean_over_bytes(whole, tiny):
    model, recipe = load_trained(whole.out, device="cpu")
    corpus = load_corpus(recipe.data.source, recipe.data.held_out_fraction)
    rows = held_out(corpus, recipe.data.sequence_length, recipe.data.held_out_rows)
    nats, count = 0.0, 0
    for batch in rows.batches(1):
        logits = model(batch.ids, documents=batch.documents).logits.double()
        for t, target in enumerate(batch.targets[0].tolist()):
            if target >= 0:
                nats -= F.log_softmax(logits[0, t], -1)[target].item()
                count += 1
    assert whole.scores["held_out"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)
    model.train()
    assert target_bits(model, rows.batches(2)).mean() == pytest.approx(whole.scores["held_out"], rel=1e-5)
    assert model.training


def test_bfloat16_trains_with_float32_weights(tiny, tmp_path):
    summary = train(tiny("train.dtype='bfloat16'", "train.steps=2"), tmp_path / "run", shown=False)
    assert all(math.isfinite(record["loss"]) for record in metrics.read(summary.out))
    tensors = load_file(summary.checkpoint / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}


def test_router_bias_moves_and_is_saved(whole, tiny):
    speed, steps = tiny().model.router_bias_update_speed, 6
    tensors = load_file(whole.checkpoint / "model.safetensors")
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("ffn.gate.bias")}
    assert biases
    for name, bias in biases.items():
        assert bias.any(), name
        assert bias.abs().max() <= speed * steps * 1.001, name


def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(tiny, tmp_path, monkeypatch):
    class Broken(loop.Transformer):
        passes = 0

        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            Broken.passes += self.training
            if self.training and Broken.passes == 3:
                out.losses["mtp"] = out.losses["mtp"] * math.nan
                out.loss = out.loss + out.losses["mtp"]
            return out

    monkeypatch.setattr(loop, "Transformer", Broken)
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"step 3: .*mtp=nan.*step-000002"):
        train(tiny("train.checkpoint_every=2"), out, shown=False)
    assert [record["step"] for record in metrics.read(out)] == [1, 2]
    assert all(t.isfinite().all() for t in load_file(checkpoint.find(out) / "model.safetensors").values())


def test_the_clock_cuts_aloud_and_a_longer_clock_goes_on(whole, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    cut = train(tiny("train.minutes=1e-6"), out, shown=False)
    assert cut.cut and cut.progress.step == 1
    assert "stopped by train.minutes=1e-06 after step 1 of 6" in capsys.readouterr().out
    assert metrics.read(out)[-1]["held_out"] == cut.scores["held_out"]
    rest = train(tiny(), out, resume=out, shown=False)
    assert not rest.cut
    assert_same_bits(whole.checkpoint, rest.checkpoint)


def test_a_folder_takes_one_run(whole, tiny, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tiny(), whole.out, shown=False)
    other = tmp_path / "other"
    train(tiny(), other, stop_at=1, shown=False)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tiny(), other, resume=whole.out, shown=False)


def test_an_older_checkpoint_does_not_overwrite_a_newer_one(tiny, tmp_path):
    out = tmp_path / "run"
    train(tiny("train.checkpoint_every=2", "train.keep=5"), out, stop_at=4, shown=False)
    older = out / checkpoint.FOLDER / "step-000002"
    with pytest.raises(ValueError, match=r"holds a later checkpoint \(step-000004\)"):
        train(tiny(), out, resume=older, shown=False)
    branch = train(tiny(), tmp_path / "branch", resume=older, stop_at=3, shown=False)
    assert [record["step"] for record in metrics.read(branch.out)] == [1, 2, 3]


def test_another_model_cannot_resume(whole, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"another model: model\.hc_mult: 4 -> 2"):
        train(tiny("model.hc_mult=2"), tmp_path / "run", resume=whole.out, shown=False)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "fast"])
def test_a_device_that_is_not_here_is_named(device):
    with pytest.raises(ValueError, match=rf"train\.device='{device}'"):
        world.choose_device(device)


def test_run_json_says_what_made_the_run(whole, tiny):
    start = json.loads((whole.out / "run.json").read_text("utf-8"))["starts"][0]
    assert start["recipe"] == tiny().to_dict()
    assert len(start["source"]["digest"]) == len(start["data"]["digest"]) == 64
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in start["versions"]["torch"]
    assert start["machine"]["threads"] >= 1
    assert start["parameters"] == sum(p.numel() for p in loop.Transformer(tiny().model).parameters())


# on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, rule, dtype, off",
    [
        ("cpu", "muon", "bfloat16", 0.02),
        pytest.param("cuda", "muon", "bfloat16", 0.02, marks=pytest.mark.gpu),
        pytest.param("cuda", "muon", "float32", 1e-3, marks=pytest.mark.gpu),
        pytest.param("cuda", "adamw", "float32", 1e-3, marks=pytest.mark.gpu),
    ],
)
def test_training_on_a_device_is_that_on_a_cpu(device, rule, dtype, off, tiny, tmp_path):
    """Six steps, and three with three resumed: losses, held-out text, weights."""
    common = [f"optim.rule='{rule}'", "train.sample_tokens=6"]
    there = [*common, f"train.device='{device}'", f"train.dtype='{dtype}'"]
    want = train(tiny(*common), tmp_path / "cpu", shown=False)
    got = train(tiny(*there), tmp_path / "whole", shown=False)
    out = tmp_path / "parts"
    train(tiny(*there), out, stop_at=3, shown=False)
    resumed = train(tiny(*there), out, resume=out, shown=False)
    for name in ("lm", "mtp", "balance", "index", "grad_norm"):
        losses = [[record[name] for record in metrics.read(folder)] for folder in (want.out, got.out, out)]
        assert losses[1] == pytest.approx(losses[0], rel=10 * off if name in SMALL else off), name
        assert losses[2] == pytest.approx(losses[1], rel=off / 10), name
    assert got.scores["held_out"] == pytest.approx(want.scores["held_out"], rel=off)
    assert resumed.scores["held_out"] == pytest.approx(got.scores["held_out"], rel=off / 10)
    model = load_trained(got.checkpoint)[0]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
