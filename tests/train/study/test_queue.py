"""A study of seconds: its chain of runs, its page and picture, and that it goes on where it was stopped."""

import json

import pytest
from reasoning import TINY

from abyssal.train.cli import main
from abyssal.train.run import metrics
from abyssal.train.start import train
from abyssal.train.study import queue
from abyssal.train.study.plan import ARMS, STUDIES, jobs
from abyssal.train.study.queue import FILE, PAGE, RUNS, execute, recipe_of, record_of, run_job, run_studies

SETTINGS = {"problems": 3, "workers": 1, "overrides": TINY, "shown": False}


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    run_studies(["control"], out, seeds=[0, 1], **SETTINGS)
    return out


def test_a_study_leaves_records_of_all_its_runs_and_a_page(studied):
    found, page = json.loads((studied / FILE).read_text("utf-8")), (studied / PAGE).read_text("utf-8")
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [
        (arm, seed) for seed in (0, 1) for arm in ("sft", "more", "grpo")
    ]
    for run in found["runs"]:
        assert run["steps"] == 4 and run["tasks"] == ["addition-1", "sorting-2"] and "commit" in run["source"]
        assert set(run["scores"]) == {"1.0", "0.0"} and set(run["scores"]["0.0"]) == {"thinking", "chat"}
        assert run["scores"]["1.0"]["chat"]["sorting-2"]["questions"] == 3
        assert (len(run["curves"].get("reward_chat", [])) == 4) == (run["arm"] == "grpo")
    assert page.startswith("# Reasoning") and page.count("| [control](#control) |") == 7


def test_arms_start_from_the_run_of_their_seed_and_read_other_data(studied):
    planned = {(job.arm.name, job.seed): job for job in jobs(["control", "distil"], [0, 1], TINY)}
    sft, more = planned["sft", 1], planned["more", 1]
    assert recipe_of(more, studied / RUNS).train.init == str(studied / RUNS / sft.key)
    assert (sft.recipe.train.seed, more.recipe.train.seed, planned["grpo", 0].recipe.train.seed) == (1, 1001, 1000)
    distil = recipe_of(planned["distil", 1], studied / RUNS)
    assert distil.distil.teacher == str(studied / RUNS / planned["teacher", 1].key)
    assert len({job.key for job in planned.values()}) == len(planned) == 10


def test_a_run_is_another_where_what_it_starts_from_is_another():
    before = {job.arm.name: job.key for job in jobs(["distil"], [0], TINY)}
    after = {job.arm.name: job.key for job in jobs(["distil"], [0], [*TINY, "optim.lr=1e-4"])}
    assert not set(before.values()) & set(after.values())
    teacher = ARMS["teacher"]
    ARMS["teacher"] = type(teacher)(**{**vars(teacher), "set": (*teacher.set, "optim.lr=1e-4")})
    try:
        changed = {job.arm.name for job in jobs(["distil"], [0], TINY) if job.key != before[job.arm.name]}
    finally:
        ARMS["teacher"] = teacher
    assert changed == {"teacher", "distil"}


def test_seeds_come_first_so_that_whole_comparisons_are_done_early():
    order = [(job.seed, job.arm.name) for job in jobs(["control", "replay"], [0, 1], TINY)]
    assert order == [(seed, arm) for seed in (0, 1) for arm in ("sft", "more", "grpo", "routing", "free")]


def test_what_is_finished_is_not_run_again_and_what_was_stopped_goes_on(studied, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        queue, "train", lambda *arguments, **more: (ran.append(arguments[2]), train(*arguments, **more))
    )
    run_studies(["control"], studied, seeds=[0, 1], **SETTINGS)
    assert not ran
    (grpo,) = (job for job in jobs(["control"], [1], TINY) if job.arm.name == "grpo")
    folder = studied / RUNS / grpo.key
    before, lines = json.loads((folder / "record-3.json").read_text("utf-8")), metrics.read(folder)
    for path in folder.iterdir():
        path.rename(tmp_path / path.name)
    train(recipe_of(grpo, studied / RUNS), folder, stop_at=2, shown=False)
    run_studies(["control"], studied, seeds=[0, 1], **SETTINGS)
    assert ran == [folder]
    again = json.loads((folder / "record-3.json").read_text("utf-8"))
    assert again["scores"] == before["scores"] and [r["kl"] for r in metrics.read(folder)] == [r["kl"] for r in lines]


def test_two_workers_wait_for_what_a_run_needs(tmp_path):
    planned = jobs(["control"], [0], [*TINY, "train.steps=1"])
    done = [job.arm.name for job in execute(planned, tmp_path, 1, 2)]
    assert done[0] == "sft" and sorted(done) == ["grpo", "more", "sft"]
    assert all(record_of(job, tmp_path, 1).is_file() for job in planned)


def test_an_error_of_a_worker_ends_the_study(tmp_path):
    planned = jobs(["control"], [0], [*TINY, "train.init=/nowhere"])
    with pytest.raises(FileNotFoundError):
        list(execute(planned, tmp_path, 1, 2))


def test_arms_and_claims_are_of_one_another():
    for study in STUDIES.values():
        sides = [side.split() for claim in study.claims for side in (claim.one, claim.other)]
        assert {arm for arm, *_ in sides} <= set(study.arms) <= ARMS.keys()
        assert all(
            ARMS[arm].after in ("", *study.arms) and ARMS[arm].teacher in ("", *study.arms) for arm in study.arms
        )
    with pytest.raises(ValueError, match="study 'zer': allowed are control, zero, distil, replay did you mean 'zero'"):
        jobs(["zer"], [0])
    with pytest.raises(ValueError, match="seeds is empty"):
        jobs(["zero"], [])


def test_commands(studied, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sets = [word for override in TINY for word in ("--set", override)]
    words = ["study", "control", "--seeds", "2", "--workers", "1", "--problems", "3", "--out", str(studied), *sets]
    assert main(words) == 0 and str(studied / FILE) in capsys.readouterr().out
    assert (studied / "reasoning.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["study", "--list"]) == 0 and "grpo thinking > more thinking" in capsys.readouterr().out
    runs = [str(studied / RUNS / job.key) for job in jobs(["control"], [0, 1], TINY)]
    assert main(["eval", "reasoning", *runs, "--problems", "2"]) == 0
    shown = capsys.readouterr().out
    assert "temperature 1" in shown and "greedy" in shown and shown.count("sorting-2") == 4
    other = tmp_path / "other"
    (sft,) = (job for job in jobs(["control"], [0], [*TINY, "reason.tasks=['addition-1']"]) if job.arm.name == "sft")
    run_job(sft, other, 1)
    assert main(["eval", "reasoning", runs[0], str(other / sft.key), "--problems", "1"]) == 2
    assert "allowed are those of the first run" in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / FILE).write_bytes((studied / FILE).read_bytes())
    assert main(["study", "--draw", "--out", str(alone)]) == 0 and (alone / "reasoning.png").is_file()
    assert (alone / PAGE).read_text("utf-8") == (studied / PAGE).read_text("utf-8")
    assert main(["study", "--draw", "--out", str(other)]) == 2 and FILE in capsys.readouterr().err
    assert main(["study", "zero", "--seeds", "0"]) == 2 and "--seeds 0" in capsys.readouterr().err
