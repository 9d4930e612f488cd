"""opponents.json: what a run has read, resumed or not, and what is said where that is unknown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from abyssal.train.data.opponents import MOST, opponents, training_text
from abyssal.train.data.seen import Rows, seen
from abyssal.train.data.source import TextSource
from abyssal.train.recipe import Recipe
from abyssal.train.run import opponents as module
from abyssal.train.run import provenance
from abyssal.train.run.opponents import compare, table
from abyssal.train.settings import StageConfig
from abyssal.train.start import open_source, train

SCORES = {"held_out": 3.0, "clean": 3.5}


def staged(recipe: Recipe) -> Recipe:
    stages = StageConfig(steps=2, sequence_length=16), StageConfig(steps=4, batch_size=3)
    return replace(recipe, stages=stages)


@pytest.fixture
def source(tiny) -> TextSource:
    found = open_source(tiny())
    assert isinstance(found, TextSource)
    return found


def begun(folder: Path, source: TextSource, *starts) -> Path:
    """A run whose starts were at these steps with these recipes."""
    folder.mkdir()
    listed = [{"step": step, "recipe": recipe.to_dict(), "data": {"digest": source.digest}} for step, recipe in starts]
    (folder / provenance.FILE).write_text(json.dumps({"starts": listed}), "utf-8")
    return folder


def test_what_was_read_are_the_rows_of_the_steps(tiny, tmp_path, source):
    run = begun(tmp_path / "run", source, (0, tiny()))
    found = compare(source, SCORES, 5, run)
    read = seen(source.tokens, source.tokenizer, [Rows(range(10), 48, 0, 0)], MOST)
    assert found["training"] == {
        "corpus": sum(d.size for d in source.corpus.train),
        "all": sum(d.size for d in source.corpus.train),
        "read": int((read < 256).sum()),
    }
    model, *others = found["scores"]
    assert model == {"name": "model", "training": "read", **SCORES}
    for name, text in (("all", training_text(source.corpus.train)), ("read", read)):
        bits = opponents(text, source.scored, source.clean)
        assert [score for score in others if score["training"] == name] == [
            {"name": who, "training": name, **of} for who, of in bits.items()
        ]
    steps = {point["step"]: point["held_out"] for point in found["curve"]}
    assert [*steps] == [1, 2, 3, 5] and steps[5] == module.bits(found, "KN-5", "read")
    assert steps[5] < steps[1]


def test_a_resumed_run_has_read_what_each_start_did(tiny, tmp_path, source):
    other = tiny("train.seed=7", "data.batch_size=4")
    run = begun(tmp_path / "run", source, (0, tiny()), (4, other), (3, staged(tiny())))
    rows = [*module._rows(provenance.starts(run), 6)]
    assert rows == [Rows(range(6), 48, 0, 0), Rows(range(3, 12), 48, 1, 0)], "step 4 on from step 3 was left"
    assert [*module._rows(provenance.starts(run)[:2], 6)] == [Rows(range(8), 48, 0, 0), Rows(range(16, 24), 48, 0, 7)]
    assert [*module._rows(provenance.starts(run)[2:], 6)] == [Rows(range(4), 16, 0, 0), Rows(range(12), 48, 1, 0)]


def test_rows_are_those_that_steps_take(tiny, tmp_path, source):
    recipe = staged(tiny())
    run = begun(tmp_path / "run", source, (0, recipe))
    schedule = module.Schedule(recipe)
    for steps in range(1, 7):
        taken = {(phase.stage, phase.length, row) for phase in map(schedule.phase, range(steps)) for row in phase.rows}
        read = module._rows(provenance.starts(run), steps)
        assert {(rows.stage, rows.length, row) for rows in read for row in rows.rows} == taken


def test_a_run_that_was_cut_reads_the_same(tiny, tmp_path):
    whole = train(tiny(), tmp_path / "whole", shown=False)
    train(tiny(), tmp_path / "cut", stop_at=3, shown=False)
    cut = train(tiny(), tmp_path / "cut", resume=tmp_path / "cut", shown=False)
    one, two = (compare(run.source, run.scores, run.progress.step, run.out) for run in (whole, cut))
    assert one == two and one["scores"][0]["held_out"] == whole.scores["held_out"]


def test_what_was_read_is_unknown_with_other_data(tiny, tmp_path, source):
    run = begun(tmp_path / "run", source, (0, tiny()))
    other = open_source(tiny("data.held_out_fraction=0.3"))
    for found in (compare(other, SCORES, 5, run), compare(source, SCORES, 0, run), compare(source, SCORES, 5, None)):
        assert "read" not in found["training"] and not found["curve"]
        assert {score["training"] for score in found["scores"][1:]} == {"all"}
        assert " read" not in table(found)


def test_the_table_says_what_opponents_had(tiny, tmp_path, source):
    run = begun(tmp_path / "run", source, (0, tiny("train.init=elsewhere")))
    found = compare(source, {"held_out": 3.0}, 5, run)
    lines = table({**found, "bytes": {"held_out": 1234, "clean": 0}}).splitlines()
    assert lines[0].split() == ["bits", "per", "byte", "of", "1,234", "bytes", "0", "clean", "ones"]
    assert lines[1].split() == ["model", "3.0000", "-"]
    assert lines[2].startswith(f"KN-3, all {found['training']['all'] / 1e6:.2f} MB  ")
    assert lines[-1] == "the model began from elsewhere, whose text opponents did not have"
    found["training"]["corpus"] *= 2
    assert "KN-3, first" in table(found)
