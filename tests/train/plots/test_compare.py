"""Several runs side by side: names, scores and differing keys in words, curves in one picture."""

import json

import pytest

from abyssal.train.cli import main
from abyssal.train.plots import compare
from abyssal.train.recipe import load_recipe
from abyssal.train.run import metrics, provenance


def write(folder, name="nano", overrides=(), steps=12, **more):
    folder.mkdir(parents=True)
    start = {"recipe": load_recipe(name, overrides).to_dict(), "parameters": 1_000_000}
    (folder / provenance.FILE).write_text(json.dumps({"starts": [start]}), "utf-8")
    records = [
        {"step": s, "tokens": 1000 * s, "seconds": 6.0 * s, "lm": 1 + 4 / s, "lr": 1e-3, **(more if s % 4 == 0 else {})}
        for s in range(1, steps + 1)
    ]
    (folder / metrics.FILE).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/lr-1", "/a/lr-2-x"], ["1", "2-x"]),
        (["/a/one/run", "/b/two/run"], ["a/one", "b/two"]),
        (["/a/sft", "/a/sft-2"], ["sft", "sft-2"]),
        (["/a/toy", "/a/b/toy"], ["toy", "b/toy"]),
    ],
)
def test_names_say_what_differs(paths, names, tmp_path):
    assert compare._names([type(tmp_path)(path) for path in paths]) == names


def test_the_table_has_scores_and_differing_keys(tmp_path):
    changes = ["optim.lr=0.5", "model.engram=none", "stability.window=9"]
    folders = [
        write(tmp_path / "a", held_out=2.5, trigram=2.75),
        write(tmp_path / "b", "nano", changes, steps=2000, held_out=2.25, trigram=2.75),
    ]
    lines = [line.split() for line in compare.table(compare.read(folders)).splitlines()]
    assert lines[0] == ["steps", "tokens", "minutes", "parameters", "held", "out", "trigram"]
    assert lines[1] == ["a", "12", "12,000", "1.2", "1.00", "M", "2.5000", "2.7500"]
    assert lines[2] == ["b", "2,000", "2,000,000", "200.0", "1.00", "M", "2.2500", "2.7500"]
    found = {line[0]: line[1:] for line in lines[5:]}
    assert found["optim.lr"] == ["0.003", "0.5"] and found["stability"] == ["none", "given"]
    assert found["model.engram"] == ["given", "none"] and len(found) == 4


def test_runs_of_one_recipe_say_so(tmp_path):
    runs = compare.read([write(tmp_path / "a", held_out=2.0), write(tmp_path / "b")])
    assert compare.table(runs).endswith("their recipes are the same") and "-" in compare.table(runs)


def test_a_run_that_was_compared_has_its_5_gram_model_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folders = [write(tmp_path / name, held_out=2.5, clean=2.7, trigram=2.75) for name in "ab"]
    score = {"name": "KN-5", "training": "all", "held_out": 1.875}
    (folders[0] / "opponents.json").write_text(json.dumps({"scores": [score]}), "utf-8")
    runs = compare.read(folders)
    assert [run.opponent for run in runs] == [("5-gram model (KN)", 1.875), ("trigram model", 2.75)]
    assert "held out   clean  trigram" in compare.table(runs)
    figures = []
    monkeypatch.setattr(compare, "save", lambda figure, path: figures.append(figure) or path)
    compare.draw(runs)
    dashed = [line for line in figures[0].axes[1].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed if len(line.get_ydata())] == [1.875, 2.75]
    assert [line.get_label() for line in dashed[2:]] == ["5-gram model (KN)", "trigram model"]


@pytest.mark.parametrize("by", ["step", "tokens", "time"])
def test_the_picture_has_a_panel_for_each_quantity(tmp_path, by, monkeypatch):
    pytest.importorskip("matplotlib")
    text = write(tmp_path / "a", held_out=2.5, trigram=2.7)
    planted = write(tmp_path / "b", "indexer", accuracy=0.5, accuracy_at={"8": 0.5}, answers=1.5)
    rewarded = write(tmp_path / "c", "reason-grpo", reward=0.5, accuracy_thinking=0.2, accuracy_chat=0.3)
    figures = []
    monkeypatch.setattr(compare, "save", lambda figure, path: figures.append(figure) or path)
    compare.draw(compare.read([text, planted, rewarded]), by=by)
    titles = ["Training loss", "Reward of the rollouts", "Held-out text", "Held-out answers"]
    titles.append("Held-out questions answered right")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == [*titles, "Learning rate"]
    assert all(axis.get_xlabel() == compare.UNITS[by] for axis in axes)
    last = {"step": 12, "tokens": 12_000, "time": 1.2}[by]
    assert axes[0].lines[0].get_xdata()[-1] == pytest.approx(last) and axes[2].lines[0].get_ydata()[-1] == 2.5
    compare.draw(compare.read([text, write(tmp_path / "d")]))
    assert figures[1].axes[0].get_ylabel() == "bits per byte"


def test_the_command_draws_and_tells(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    folders = [str(write(tmp_path / f"run-{i}", held_out=2.0 + i)) for i in range(7)]
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *folders, "--by", "tokens"]) == 0
    assert capsys.readouterr().out.endswith("\ncompare.png\n")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_what_is_no_run_is_named(tmp_path, capsys):
    run = str(write(tmp_path / "a"))
    assert main(["plot", run, run]) == 2
    assert "allowed are two or more different folders" in capsys.readouterr().err
    assert main(["plot", run, "--by", "time"]) == 2
    assert "--by time: allowed with two or more runs" in capsys.readouterr().err
    assert main(["plot", run, str(tmp_path / "none")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
