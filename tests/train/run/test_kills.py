"""Killed at random moments, a run ends in the bits of the run in one go; by hand, at moments that kills seldom hit."""

import json
import subprocess
import sys

import kills
import pytest

from abyssal.train.cli import main
from abyssal.train.recipe import Recipe
from abyssal.train.run import checkpoint, loop, metrics, provenance
from abyssal.train.start import train


def run_kills(arguments, tmp_path) -> dict[str, dict]:
    """The script in a process of its own, which forks: this one may have threads."""
    command = [sys.executable, kills.__file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    return {found["kind"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow("two runs are killed twice each, and go on each time")
def test_every_resumption_ends_in_the_same_bits(tmp_path):
    for found in run_kills(["4", "7", "--only", "training", "tables"], tmp_path).values():
        assert found["kills"] == sum(found["hits"].values()) == 2 and not found["lost"] and not found["litter"]
        assert [spike["step"] for spike in found["went_back"]] == [11] and len(found["anticipatory"]) >= 3


@pytest.mark.slow("eight processes are killed")
def test_whoever_writes_files_may_be_killed(tmp_path):
    kinds = ["tokenising", "mapped", "save_pretrained", "convert"]
    found = run_kills(["8", "7", "--only", *kinds], tmp_path)
    assert [found[kind]["kills"] for kind in kinds] == [2, 2, 2, 2]
    assert not any(one[what] for one in found.values() for what in ("lost", "torn", "litter"))


@pytest.fixture(scope="module")
def recipe(tiny):
    return tiny("train.steps=3", "train.eval_every=0", "train.checkpoint_every=2", "train.sample_tokens=0")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("whole") / "run", shown=False)


def stop_in(monkeypatch, target, name: str, call: int) -> None:
    """Call number `call` of target.name, from 1, ends like a kill."""
    plain, calls = getattr(target, name), []

    def stops(*arguments, **options):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(target, name, stops)


@pytest.mark.parametrize(
    ("target", "name", "call"),
    [
        (provenance, "write", 1),
        (metrics.MetricsFile, "write", 2),
        (checkpoint, "write_tensors", 5),
        (checkpoint.os, "rename", 1),
    ],
)
def test_stopped_here_it_goes_on_to_the_same_bits(recipe, whole, tmp_path, monkeypatch, target, name, call):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in(patch, target, name, call)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out, shown=False)
    resumed = train(recipe, out, resume=out if (out / provenance.FILE).is_file() else None, shown=False)
    assert kills.records(out) == kills.records(whole.out)
    for file in ("model", "optimizer", "random"):
        a, b = (kills.load_file(run.checkpoint / f"{file}.safetensors") for run in (whole, resumed))
        assert a.keys() == b.keys() and all(kills.torch.equal(a[key], b[key]) for key in a)


def test_a_removed_checkpoint_is_gone_at_once(recipe, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(recipe, out, stop_at=1, shown=False)
    newest = train(recipe, out, resume=out, stop_at=2, shown=False).checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", half_done)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove(newest)
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-000001"]
    assert train(recipe, out, resume=out, shown=False).progress.step == 3
    assert not list((out / checkpoint.FOLDER).glob(".*")), "what was left is swept up"
    assert kills.records(out) == kills.records(whole.out)


def test_what_was_to_be_removed_is_removed_by_the_resumed_run(tiny, tmp_path, monkeypatch):
    recipe, out = (
        tiny("train.steps=2", "train.checkpoint_every=1", "train.keep=1", "train.sample_tokens=0"),
        tmp_path / "run",
    )
    with monkeypatch.context() as patch:
        stop_in(patch, checkpoint, "remove", 1)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out, shown=False)
    assert len(checkpoint.checkpoints(out)) == 2
    train(recipe, out, resume=out, shown=False)
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-000002"]


def half_done(path, ignore_errors: bool = False) -> None:
    """`shutil.rmtree`, killed after its first file."""
    if not ignore_errors:
        (path / checkpoint.STATE).unlink()
        raise KeyboardInterrupt


def test_the_command_starts_a_run_over_that_has_no_checkpoint(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in(patch, loop.Run, "save", 1)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out, shown=False)
    assert [record["step"] for record in metrics.read(out)] == [1, 2]
    assert main(["train", "--resume", str(out), "--set", "train.steps=1"]) == 0
    assert [record["step"] for record in metrics.read(out)] == [1]
    assert main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


def no_state(folder):
    for path in folder.glob("*/checkpoint.json"):
        path.unlink()


def dangling(folder):
    folder.rename(folder.with_name("aside"))
    folder.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("lose", "metrics_too"),
    [
        (lambda folder: folder.rename(folder.with_name("aside")), False),
        (lambda folder: folder.rename(folder.with_name("aside")), True),
        (lambda folder: [path.rename(path.parent.with_name(path.name)) for path in folder.iterdir()], False),
        (dangling, False),
        (dangling, True),
        (no_state, False),
        (no_state, True),
    ],
)
def test_a_run_whose_checkpoints_are_out_of_reach_does_not_start_over(lose, metrics_too, whole, tmp_path, capsys):
    out = tmp_path / "run"
    kills.shutil.copytree(whole.out, out)
    if metrics_too:
        (out / metrics.FILE).unlink()
    lose(out / checkpoint.FOLDER)
    before = kills.contents(out)
    assert main(["train", "--resume", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"'{out}/checkpoints': its checkpoints are out of reach" in said
    assert kills.contents(out) == before
    with pytest.raises(FileNotFoundError, match="out of reach"):
        train(whole_recipe(out), out, resume=out, shown=False)
    assert kills.contents(out) == before


def whole_recipe(out):
    return Recipe.from_dict(provenance.recipe(out))


def test_kills_are_seen_by_their_files(tmp_path):
    """The script's own eyes."""
    assert kills.state(tmp_path) == "before the first line"
    (tmp_path / metrics.FILE).write_text('{"step": 3}\n', "utf-8")
    assert kills.state(tmp_path) == "before the first checkpoint"
    (tmp_path / checkpoint.FOLDER / ".writing-000001").mkdir(parents=True)
    assert kills.state(tmp_path) == "writing a checkpoint"
