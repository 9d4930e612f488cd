"""Numbers that are looked at later: the same files, no weight that a bad step has moved, and the step that was bad."""

import math

import pytest
import torch
from safetensors.torch import load_file

from abyssal.train import start
from abyssal.train.run import checkpoint, loop, metrics
from abyssal.train.run.line import Line, Lines
from abyssal.train.run.loop import Run, TrainingDiverged
from abyssal.train.start import train

CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib"}
SMALL = ("model.num_hidden_layers=3", "model.compress_ratios=[0,4,16]", "model.hidden_size=32", "optim.rule='muon'")
SMALL += ("optim.embedding_rule='balanced'", "train.eval_every=0", "train.sample_tokens=0")


@pytest.fixture
def late(monkeypatch):
    """As on a GPU: lines are written three steps later."""
    monkeypatch.setattr(loop, "Lines", lambda write, _: Lines(write, 3))


def lines(out) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(out)]


def test_numbers_take_their_places_in_the_record():
    line = Line(
        {"step": 4, "loss": torch.tensor(1 / 3), "lr": 0.1, "load": torch.tensor([1 / 3, math.inf]), "s": lambda: 7}
    )
    assert line.numbers == {"loss": torch.tensor(1 / 3).item()}
    placed = {"step": 4, "loss": line.numbers["loss"], "lr": 0.1, "load": [0.333333, None], "s": 7}
    assert list(line.record.items()) == list(placed.items())
    assert Line({"step": 4, "reward": 0.5}).numbers == {}


def test_lines_are_written_in_their_order_and_when_asked():
    written = []
    late = Lines(written.append, 2)
    for number in range(5):
        late.add(number)
    assert written == [0, 1, 2]
    late.flush()
    assert written == [0, 1, 2, 3, 4]


def test_late_lines_are_the_same_lines(tiny, tmp_path, late):
    recipe = tiny(*SMALL, "train.eval_every=4", "train.checkpoint_every=5")
    written = train(recipe, tmp_path / "late", shown=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Lines", Lines)
        plain = train(recipe, tmp_path / "plain", shown=False)
    assert lines(written.out) == lines(plain.out)
    assert all(torch.equal(a, load_file(written.checkpoint / "model.safetensors")[name]) for name, a in saved(plain))


def saved(run):
    return load_file(run.checkpoint / "model.safetensors").items()


def run_that_breaks(recipe, out, step: int, once: bool):
    """A run whose gradient is not finite in step `step`, from 1, and (unless `once`) in later ones; weights by step."""
    run, weights = Run(recipe, start.open_source(recipe), out, None, shown=False), []
    passes = []

    def plant(module, *_):
        passes.append(0)
        weights.append({name: x.clone() for name, x in module.state_dict().items()})

    def spoil(grad):
        bad = len(passes) == step if once else len(passes) >= step
        return grad * math.nan if bad else grad

    run.model.register_forward_pre_hook(plant)
    run.model.layers[2].ffn.experts.w2.register_hook(spoil)
    return run, weights


@pytest.mark.parametrize("once", [True, False])
def test_a_bad_step_moves_nothing_and_is_named_later(tiny, tmp_path, late, once):
    run, weights = run_that_breaks(tiny(*SMALL, "train.steps=8", "train.checkpoint_every=2"), tmp_path / "run", 3, once)
    why = (
        "the gradient of layers.2.ffn.experts.w2 is not" if not once else "every weight, output and gradient is finite"
    )
    with pytest.raises(TrainingDiverged, match=rf"step 3: .*grad_norm=nan.*{why}.*step-000002"):
        run.loop(8)
    assert [line["step"] for line in metrics.read(run.out)] == [1, 2]
    assert checkpoint.find(run.out).name == "step-000002"
    assert len(weights) >= 4, "the run was ahead"
    for after in (*weights[3:], run.model.state_dict()):
        assert all(torch.equal(x, weights[2][name]) for name, x in after.items())
    assert not torch.equal(weights[2]["embed.weight"], weights[1]["embed.weight"])
    run.close()


def test_an_interrupted_run_keeps_the_lines_of_its_steps(tiny, tmp_path, late, monkeypatch):
    def interrupted(self):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self)

    step = Run.step
    monkeypatch.setattr(Run, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(*SMALL, "train.steps=8"), tmp_path / "run", shown=False)
    assert [line["step"] for line in metrics.read(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_bad_step_is_found_however_the_run_ends(tiny, tmp_path, late):
    run, _ = run_that_breaks(tiny(*SMALL, "train.steps=8"), tmp_path / "run", 3, False)
    for _ in range(5):
        run.lines.waiting.append(run.step())
    with pytest.raises(TrainingDiverged, match="step 3: "):
        run.close()
    assert [line["step"] for line in metrics.read(run.out)] == [1, 2] and run.metrics.file.closed
