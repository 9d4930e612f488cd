"""Suites: runs that are made once, arms of equal time, pictures and page from the JSON alone."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import patience
import pytest
from patience import wait_for

import abyssal
from abyssal.train.ablate import clock, measures, probes, summary, sweep
from abyssal.train.ablate import run as runner
from abyssal.train.ablate.draw import draw
from abyssal.train.ablate.measures import curves, flatten, measure
from abyssal.train.ablate.probes import acceptance
from abyssal.train.ablate.report import table, write_page
from abyssal.train.ablate.run import RESULT, RUNS, run_suite
from abyssal.train.ablate.suite import Arm, Claim, Measure, Panel, Suite, jobs, recipe_of
from abyssal.train.ablate.suites import SUITES, chosen
from abyssal.train.ablate.suites.sweeps import FOUND, SWEEPS
from abyssal.train.ablate.summary import reach
from abyssal.train.cli import main
from abyssal.train.evaluate.verdict import by_row, judge
from abyssal.train.recipe import Recipe, apply, load_recipe
from abyssal.train.run import metrics
from abyssal.train.start import open_source

RESULTS = Path(__file__).parents[3] / "train" / "results"

# measures


def test_measures_are_means_over_the_last_tenth_and_over_layers():
    records = [{"step": i + 1, "lm": float(i), "load_cv": [i, None, i + 2], "loss": 0.0} for i in range(20)]
    records[5]["gain"], records[15]["gain"] = [9, 9], [1.5, 2.5]
    found = measure(records, {"held_out": 3.0, "by": {"64": 0.5, "128": 1}, "note": "text"})
    assert found["train.lm"] == 18.5 and found["load_cv"] == 19.5 and "spread" not in found
    assert (found["gain_forward"], found["gain_backward"]) == (1.5, 2.5)
    assert (found["held_out"], found["by.64"], found["by.128"]) == (3.0, 0.5, 1.0) and "note" not in found
    assert flatten({"a": {"b": {"c": 2}}}) == {"a.b.c": 2.0}


def test_curves_have_every_evaluation_and_at_most_sixty_stretches_of_the_loss():
    records = [{"step": i + 1, "lm": float(i)} for i in range(130)]
    records[64]["held_out"], records[129]["held_out"] = 2.0, 1.0
    found = curves(records, ["held_out"])
    assert found["held_out"] == [[65, 2.0], [130, 1.0]]
    assert len(found["train.lm"]) <= 60 and found["train.lm"][0] == [3, 1.0] and found["train.lm"][-1][0] == 130


def test_reach_is_linear_between_evaluations():
    curve = [[10, 3.0], [20, 2.0], [40, 1.0]]
    assert reach(curve, 1.0) == 1.0 and reach(curve, 1.5) == 0.75 and reach(curve, 2.25) == pytest.approx(17.5 / 40)
    assert reach(curve, 3.5) == 0.25 and reach(curve, 0.9) is None


# suites that say what they cannot mean


def test_a_suite_refuses_unknown_arms_measures_and_variants():
    with pytest.raises(ValueError, match="arm 'b'"):
        suite(claims=(Claim("x", "accuracy", "few", "b"),))
    with pytest.raises(ValueError, match=r"no direction for 'train\.lm'"):
        suite(claims=(Claim("x", "train.lm", "few", "many"),))
    with pytest.raises(ValueError, match="variant='plane residual'"):
        Arm("a", "a", variant="plane residual")
    with pytest.raises(ValueError, match="not in the recipe"):
        jobs(suite(without=("model.engram",)), [0])
    with pytest.raises(ValueError, match="size='huge'"):
        jobs(suite(), [0], "huge")
    with pytest.raises(ValueError, match="allowed are indexer"):
        chosen(["indexers"])
    assert chosen(["all"]) == chosen([]) == list(SUITES.values()) and chosen(["mtp"]) == [SUITES["mtp"]]


# runs

TINY = (
    *("model.hidden_size=16", "model.num_attention_heads=2", "model.head_dim=8", "model.qk_rope_head_dim=4"),
    *("model.q_lora_rank=8", "model.o_lora_rank=8", "model.index_head_dim=8", "model.moe_intermediate_size=16"),
    *("planted.keys=8", "planted.nearest=4", "planted.eval_nearest=0"),
    *("data.held_out_rows=2", "data.batch_size=2"),
    *("data.sequence_length=64", "train.steps=4", "train.eval_every=2", "train.checkpoint_every=2", "train.device=cpu"),
)


def suite(**changes) -> Suite:
    """Two arms on rows of 64 tokens, a moment each."""
    values = {
        "name": "small",
        "title": "Few picks against many",
        "question": "Does it matter?",
        "caveat": "Nothing is learned in four steps.",
        "recipe": "indexer",
        "without": ("stages",),
        "set": tuple(TINY),
        "arms": (Arm("few", "few picks"), Arm("many", "many picks", set=("model.index_topk=32",))),
        "measures": (Measure("accuracy", "answers right", "higher", percent=True), Measure("train.lm", "loss")),
        "claims": (Claim("few are better", "accuracy", "few", "many"),),
        "panels": (
            Panel("distance", "By distance", ("accuracy_at",)),
            Panel("bars", "Answers", ("accuracy",), "share"),
            Panel("curve", "Nats", ("answer_nats",), "nats"),
        ),
    }
    return Suite(**(values | {k: v if k != "without" else (*values["without"], *v) for k, v in changes.items()}))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablate")
    return out, run_suite(suite(), out, seeds=(0, 1), workers=1, shown=False)


def test_a_suite_ends_in_means_spreads_and_verdicts_of_its_runs(done):
    out, found = done
    assert found == json.loads((out / "small.json").read_text("utf-8"))
    for name, arm in found["arms"].items():
        runs = [json.loads((out / RUNS / run["key"] / RESULT).read_text("utf-8")) for run in arm["runs"]]
        assert [run["seed"] for run in runs] == [0, 1] and {run["recipe"]["model"]["index_topk"] for run in runs} == {
            16 if name == "few" else 32
        }
        last = [metrics.read(out / RUNS / run["key"])[-1]["accuracy"] for run in arm["runs"]]
        assert arm["summary"]["accuracy"]["mean"] == pytest.approx(sum(last) / 2)
        assert [run["curves"]["answer_nats"][-1][0] for run in arm["runs"]] == [4, 4]
    values = [[run["measures"]["accuracy"] for run in arm["runs"]] for arm in found["arms"].values()]
    assert found["claims"][0]["verdict"] == judge(*values, "higher").to_dict()
    assert found["scale"]["seeds"] == 2 and found["scale"]["runs"] == 4 and found["scale"]["steps"] == 4


def test_finished_runs_are_not_run_again_and_a_new_seed_is(done, monkeypatch):
    out, found = done
    trained = []
    monkeypatch.setattr(runner, "train", lambda recipe, *_, **__: trained.append(recipe.train.seed) or 1 / 0)
    again = run_suite(suite(), out, seeds=(0, 1), workers=1, shown=False)
    assert again["arms"] == found["arms"] and not trained
    with pytest.raises(ZeroDivisionError):
        run_suite(suite(), out, seeds=(0, 1, 2), workers=1, shown=False)
    assert trained == [2]


def test_a_run_that_was_cut_off_goes_on_to_the_same_result(done, tmp_path):
    out, _ = done
    job = jobs(suite(), [0])[0]
    whole = json.loads((out / RUNS / job.key / RESULT).read_text("utf-8"))
    folder = tmp_path / RUNS / job.key
    runner.train(job.recipe, folder, stop_at=2, shown=False)
    resumed = runner.run_job(job, tmp_path / RUNS)
    clock = {"tokens_per_second", "peak_memory_gib", "seconds"}
    assert resumed["measures"] == whole["measures"] and resumed["curves"] == whole["curves"]
    lines = [
        [{k: v for k, v in r.items() if k not in clock} for r in metrics.read(f)]
        for f in (folder, out / RUNS / job.key)
    ]
    assert lines[0] == lines[1] and len(json.loads((folder / "run.json").read_text("utf-8"))["starts"]) == 2


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    job = jobs(suite(set=(*TINY, "train.steps=1", "train.eval_every=0")), [0])[0]
    folder = tmp_path / job.key
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "lm": 99.0}\n', "utf-8")
    assert runner.run_job(job, tmp_path)["measures"]["train.lm"] < 9


def test_the_key_is_the_recipe_and_the_variant_and_nothing_else():
    a, b = jobs(suite(), [0, 1]), jobs(suite(name="other", title="other"), [0, 1])
    assert [job.key for job in a] == [job.key for job in b] and len({job.key for job in a}) == 4
    assert replace(a[0], variant="static mHC").key != a[0].key
    assert replace(a[0], probes=("acceptance",)).key == a[0].key


def test_runs_are_read_from_the_json_where_their_folders_are_gone(done, tmp_path, monkeypatch):
    out, found = done
    shutil.copy(out / "small.json", tmp_path / "small.json")
    monkeypatch.setattr(runner, "train", lambda recipe, *_, **__: 1 / 0)
    assert run_suite(suite(), tmp_path, seeds=(0, 1), workers=1, shown=False)["arms"] == found["arms"]
    other = run_suite(suite(name="other"), tmp_path, seeds=(1, 0), workers=1, shown=False)
    assert other["arms"]["few"]["runs"] == found["arms"]["few"]["runs"][::-1]
    with pytest.raises(ZeroDivisionError):
        run_suite(suite(probes=("acceptance",)), tmp_path, seeds=(0, 1), workers=1, shown=False)


def test_a_setting_that_is_new_leaves_the_runs_before_it(done, tmp_path, monkeypatch):
    written = done[1] | {"arms": json.loads(json.dumps(done[1]["arms"]))}
    for arm in written["arms"].values():
        assert arm["recipe"]["optim"].pop("muon_on") == "all", "as if that setting had come later"
        for run in arm["runs"]:
            run["key"] = "of another day"
    (tmp_path / "small.json").write_text(json.dumps(written), "utf-8")
    monkeypatch.setattr(runner, "train", lambda recipe, *_, **__: 1 / 0)
    assert run_suite(suite(), tmp_path, seeds=(0, 1), workers=1, shown=False)["arms"] == done[1]["arms"]
    written["arms"]["few"]["recipe"]["optim"]["muon_on"] = "experts"
    (tmp_path / "small.json").write_text(json.dumps(written), "utf-8")
    with pytest.raises(ZeroDivisionError):
        run_suite(suite(), tmp_path, seeds=(0, 1), workers=1, shown=False)


def test_what_all_arms_have_done_is_written_before_the_next_seed_is(done, tmp_path, monkeypatch):
    shutil.copytree(done[0] / RUNS, tmp_path / RUNS)
    monkeypatch.setattr(runner, "train", lambda recipe, *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_suite(suite(), tmp_path, seeds=(0, 1, 2), workers=1, shown=False)
    found = json.loads((tmp_path / "small.json").read_text("utf-8"))
    assert found["arms"] == done[1]["arms"] and found["scale"]["seeds"] == 2


def test_seeds_of_a_file_are_kept_until_as_many_are_done(done, tmp_path, monkeypatch):
    """One arm is another now, and the suite is stopped after its first seed: the other arm's second run stays known."""
    shutil.copy(done[0] / "small.json", tmp_path / "small.json")
    few, many = suite().arms
    changed = suite(arms=(few, replace(many, set=(*many.set, "optim.lr=1e-4"))))
    with monkeypatch.context() as patched:
        once = [runner.train]
        patched.setattr(runner, "train", lambda *given, **more: once.pop()(*given, **more))
        with pytest.raises(IndexError):
            run_suite(changed, tmp_path, seeds=(0, 1), workers=1, shown=False)
    assert json.loads((tmp_path / "small.json").read_text("utf-8")) == json.loads(json.dumps(done[1]))
    found = run_suite(changed, tmp_path, seeds=(0, 1), workers=1, shown=False)
    assert found["arms"]["few"]["runs"] == done[1]["arms"]["few"]["runs"] and found["scale"]["seeds"] == 2


def test_an_arm_of_equal_time_takes_the_steps_that_fit(tmp_path, monkeypatch):
    clocked = []

    def seconds(jobs):
        clocked.append([job.arm for job in jobs])
        return [0.2 if job.arm == "few" else 0.1 for job in jobs]

    monkeypatch.setattr(runner, "seconds_per_step", seconds)
    many = suite().arms[1]
    timed = suite(arms=(*suite().arms, many.in_equal_time()))
    found = run_suite(timed, tmp_path, seeds=(0,), workers=1, shown=False)
    assert {name: arm["steps"] for name, arm in found["arms"].items()} == {"few": 4, "many": 4, "many-time": 8}
    run_suite(timed, tmp_path, seeds=(1,), workers=1, shown=False)
    assert clocked == [["few", "many-time"]], "measured once, then read from clock.json"
    monkeypatch.setattr(runner, "seconds_per_step", lambda jobs: [0.1, 0.1])
    fewer = Arm("fewer", "fewer picks", set=("model.index_topk=8",)).in_equal_time()
    both = suite(arms=(*timed.arms, fewer))
    found = run_suite(both, tmp_path, seeds=(0,), workers=1, shown=False)
    steps = {name: arm["steps"] for name, arm in found["arms"].items()}
    assert steps == {"few": 4, "many": 4, "many-time": 8, "fewer-time": 4}, (
        "in turn with a baseline that is measured again"
    )


def test_learning_rates_alone_are_timed_once(tmp_path, monkeypatch):
    clocked = []

    def seconds(jobs):
        clocked.append([job.arm for job in jobs])
        return [0.2, *(0.1 / len(clocked) for _ in jobs[1:])]

    monkeypatch.setattr(runner, "seconds_per_step", seconds)
    slower, faster = (Arm(f"{lr}", f"{lr}", set=(f"optim.lr={lr}", "model.index_topk=8")) for lr in (1e-4, 1e-3))
    for arm in (slower, faster):
        pair = suite(arms=(suite().arms[0], arm.in_equal_time()), claims=())
        assert runner._equal_steps(pair, tmp_path, (0,), "quick", ()) == {f"{arm.name}-time": 8}
    assert len(clocked) == 1, "or else the noise of two measurements is a difference in steps"


def test_the_clock_takes_the_fastest_round_and_refuses_stages(monkeypatch):
    times = iter([3.0, 1.0, 2.0, 5.0, 4.0, 1.5])
    monkeypatch.setattr(clock, "_time", lambda job: next(times))
    few, many = jobs(suite(), [0])
    assert clock.seconds_per_step([few, many]) == [2.0, 1.0] and clock.equal_steps(160, 2.0, 0.5) == 640
    staged = jobs(SUITES["indexer"], [0])[0]
    with pytest.raises(ValueError, match="arm 'trained': equal time is not there for recipes with"):
        clock.seconds_per_step([staged])


def test_a_step_is_timed_on_a_real_run():
    assert 0 < clock._time(jobs(suite(), [0])[0]) < 60


def test_a_probe_that_is_asked_for_later_is_added_to_a_finished_run(done, monkeypatch):
    out, _ = done
    job = replace(jobs(suite(), [0])[0], probes=("size",))
    monkeypatch.setitem(probes.PROBES, "size", lambda model, recipe: {"size": model.embed.weight.abs().sum().item()})
    monkeypatch.setattr(runner, "train", None)
    found = runner.run_job(job, out / RUNS)
    from abyssal.train.run.load import load_trained

    trained = load_trained(out / RUNS / job.key)[0]
    assert found["measures"]["size"] == trained.embed.weight.abs().sum().item() and found["probes"] == ["size"]


def test_opponents_are_those_of_the_same_bytes(tiny):
    from abyssal.train.data.opponents import opponents, training_text

    recipe = tiny("train.steps=3")
    found, source = probes.opponents(None, recipe), open_source(recipe)
    every = opponents(training_text(source.corpus.train), source.scored, source.clean)
    whole = {f"{name}.all.{part}": bits for name, parts in every.items() for part, bits in parts.items()}
    assert whole.items() <= found.items() and {name.replace(".all.", ".read.") for name in whole} <= found.keys()
    assert found["KN-3.read.held_out"] > found["KN-3.all.held_out"], "three steps have read less"
    with pytest.raises(ValueError, match="allowed with the probe opponents is text"):
        probes.opponents(None, jobs(suite(), [0])[0].recipe)


def test_drafts_of_a_model_without_mtp_are_an_untrained_modules(tiny, monkeypatch):
    from abyssal.model import Transformer

    monkeypatch.setattr(probes, "PROMPTS", 2)
    monkeypatch.setattr(probes, "TOKENS", 10)
    recipe = tiny("model.num_nextn_predict_layers=0")
    model = Transformer(recipe.model).eval()
    first, second = acceptance(model, recipe), acceptance(model, recipe)
    assert first == second and 0 <= first["acceptance"] < 0.5 and first["same_tokens"] == 1.0 and not model.mtp


# a whole command, its workers, and its end by Ctrl-C

COMMAND = (
    "import sys; from abyssal.train.ablate import suites; from tests_ablate_suite import suite;"
    "suites.SUITES = {'small': suite()}; from abyssal.train.cli import main; sys.exit(main(sys.argv[1:]))"
)


def command(tmp_path: Path, *words: str) -> subprocess.Popen:
    """`abyssal WORDS` in a process group of its own, with the small suite as the only one."""
    (tmp_path / "tests_ablate_suite.py").write_text(Path(__file__).read_text(encoding="utf-8"), "utf-8")
    ours = tmp_path, Path(abyssal.__file__).parents[1], Path(patience.__file__).parent
    paths = os.pathsep.join([*map(str, ours), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip


@pytest.mark.slow("four processes that train, twice")
def test_two_workers_find_what_one_finds_and_an_interrupt_ends_them(done, tmp_path):
    words = ["ablate", "--seeds", "2", "--workers", "2", "--out", str(tmp_path / "out")]
    first = command(tmp_path, *words)
    wait_for(lambda: list((tmp_path / "out" / RUNS).glob("*/metrics.jsonl")), first)
    assert first.poll() is None, first.stderr.read()
    os.kill(first.pid, signal.SIGINT)  # the parent alone: it ends its workers itself
    assert first.wait(patience.SECONDS) == 130
    killed = command(tmp_path, *words)
    wait_for(lambda: len(below(killed.pid)) > 2, killed)  # two workers, and what tracks their resources
    workers = below(killed.pid)
    killed.kill()
    killed.wait()
    wait_for(lambda: not any(map(lives, workers)))
    second = command(tmp_path, *words)
    text, errors = second.communicate(timeout=patience.SECONDS)
    assert second.returncode == 0, errors
    found = json.loads((tmp_path / "out" / "small.json").read_text("utf-8"))
    for name, arm in done[1]["arms"].items():
        assert [run["measures"] for run in found["arms"][name]["runs"]] == [run["measures"] for run in arm["runs"]]
    assert "few are better" in text and (tmp_path / "out" / "small.png").stat().st_size > 10_000


def below(process):
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def lives(process):
    """Whether it computes still; one that nobody waits for has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_runs_that_read_other_contents_are_not_compared(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    path = out / RUNS / jobs(suite(), [1])[0].key / RESULT
    result = json.loads(path.read_text("utf-8"))
    result["provenance"]["data"]["digest"] = "another"
    path.write_text(json.dumps(result), "utf-8")
    with pytest.raises(ValueError, match=r"have read other contents of 'planted:recall': remove the older one"):
        run_suite(suite(), out, seeds=(0, 1), workers=1, shown=False)
    path.write_text("[]", "utf-8")
    with pytest.raises(ValueError, match=r"result\.json: \[\] is no JSON object"):
        run_suite(suite(), out, seeds=(0, 1), workers=1, shown=False)
    path.write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"result\.json' holds no result of a run: remove it to run that again"):
        run_suite(suite(), out, seeds=(0, 1), workers=1, shown=False)
    (out / "small.json").write_text("{}", "utf-8")
    for show in (draw, lambda path: write_page(out, tmp_path / "page.md", ["small"])):
        with pytest.raises(ValueError, match=r"small\.json' holds no results of a suite: 'suite' is missing"):
            show(out / "small.json")


def test_the_command_lists_and_refuses(capsys, tmp_path):
    assert main(["ablate", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SUITES) and "random indexer, frozen" in text
    for words, message in (
        (["indexers"], "suite 'indexers': did you mean 'indexer'? allowed are"),
        (["indexer", "--seeds", "0"], "--seeds 0"),
        (["indexer", "--draw", "--out", str(tmp_path)], "indexer.json"),
        (["indexer", "--set", "optim.lrr=1", "--out", str(tmp_path)], "optim.lr"),
        (["indexer", "--workers", "0", "--out", str(tmp_path)], "workers=0"),
    ):
        assert main(["ablate", *words]) == 2
        assert message in capsys.readouterr().err


# pictures and page


def test_the_picture_is_drawn_from_the_json_alone(done, tmp_path):
    pytest.importorskip("matplotlib")
    out, _ = done
    (tmp_path / "small.json").write_text((out / "small.json").read_text("utf-8"), "utf-8")
    assert draw(tmp_path / "small.json") == tmp_path / "small.png"
    picture = (tmp_path / "small.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    found = json.loads((tmp_path / "small.json").read_text("utf-8"))
    for run in found["arms"]["few"]["runs"]:
        run["measures"]["accuracy"] = 0.9
    (tmp_path / "small.json").write_text(json.dumps(found), "utf-8")
    assert draw(tmp_path / "small.json").read_bytes() != picture


def test_bars_have_intervals_and_every_seed_and_the_window_is_marked(done):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from abyssal.train.ablate import draw as drawing

    found = json.loads(json.dumps(done[1]))
    for arm, values in zip(found["arms"].values(), ([0.1, 0.3], [0.6, 0.8])):
        for run, value in zip(arm["runs"], values):
            run["measures"] = {"accuracy": value, "accuracy_at.32": value, "floor": 0.05, "floor_at.32": 0.04}
        arm["summary"] = {"accuracy_at.32": {}}
    bars, distance = figure.subplots(1, 2)
    drawing._bars(bars, found, found["panels"][1])
    assert [round(patch.get_height(), 6) for patch in bars.patches] == [0.2, 0.7]
    half = 12.7062 * math.sqrt(0.02) / math.sqrt(2)
    for container, mean in zip(bars.containers[1::2], (0.2, 0.7)):
        (low, high) = container.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=1e-4)
    assert [len(c.get_offsets()) for c in bars.collections if len(c.get_offsets()) > 1] == [2, 2]
    drawing._distance(distance, found, found["panels"][0])
    assert [line.get_xdata()[0] for line in distance.lines if line.get_linestyle() == "--"] == [16]
    assert [text.get_text() for text in distance.texts] == ["window 16"]
    for axis, floor in ((bars, 0.05), (distance, 0.04)):
        assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"] == [floor]
    assert bars.get_ylim()[1] == 1.08, "an interval of two seeds goes beyond what a share can be"
    drawing._legend(figure, found)
    assert [text.get_text() for text in figure.legends[0].texts][-1] == "best blind reader"


def test_more_arms_than_colours_are_all_drawn_and_differ(done):
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    from abyssal.train.ablate import draw as drawing

    found = done[1] | {"arms": {str(i): done[1]["arms"]["few"] for i in range(12)}}
    drawing._bars(axis, found, found["panels"][1])
    looks = {look[:2] for look in drawing._looks(found)}
    assert len(axis.patches) + sum(type(c).__name__ == "LineCollection" for c in axis.collections) >= 12 == len(looks)


def committed(found: dict, **changes) -> dict:
    """A copy whose runs come from a clean commit."""
    copied = json.loads(json.dumps(found)) | changes
    copied["provenance"]["uncommitted_changes"] = False
    return copied


def test_the_page_says_what_the_json_says(done, tmp_path):
    changed = committed(done[1])
    for name, values in (("few", [0.91, 0.92]), ("many", [0.11, 0.13])):
        for run, value in zip(changed["arms"][name]["runs"], values):
            run["measures"]["accuracy"] = value
        changed["arms"][name]["summary"]["accuracy"] = {"mean": sum(values) / 2, "deviation": 0.01, "values": values}
    verdict = judge([0.91, 0.92], [0.11, 0.13], "higher")
    changed["claims"][0]["verdict"] = verdict.to_dict()
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "small.json"
    path.write_text(json.dumps(changed), "utf-8")
    page = write_page(tmp_path / "results", tmp_path / "RESULTS.md", ["missing", "small"]).read_text("utf-8")
    assert verdict.p == pytest.approx(0.004, abs=1e-3)
    assert "| [small](#small) | few are better | +79.5% (73.1% to 85.9%) | 0.004 | **holds** |" in page
    assert "(results/small.png)" in page and "91.5% ± 1.0%" in page and "12.0% ± 1.0%" in page
    assert "few are better: **holds** (answers right: +79.5% (73.1% to 85.9%), p 0.004)" in page
    assert "2 seeds of 8 that are registered, 4 runs, each 4 steps" in page and "Nothing is learned in four" in page
    assert "many picks: `model.index_topk=32`" in page and "/tmp" not in page and "shared with" not in page
    assert "few are better" in table(done[1]) and "answers right" in table(done[1])
    with pytest.raises(FileNotFoundError, match="missing"):
        write_page(tmp_path, tmp_path / "R.md", ["missing"])
    path.write_text(json.dumps(done[1] | {"provenance": {"uncommitted_changes": True}}), "utf-8")
    with pytest.raises(ValueError, match="small: runs of uncommitted code"):
        write_page(tmp_path / "results", tmp_path / "RESULTS.md", ["small"])


def test_the_page_corrects_for_all_its_claims_and_names_shared_runs(done, tmp_path):
    for name, ps in (("one", (0.02,)), ("two", (0.03, 0.2))):
        found = committed(done[1], suite=name)
        claim = {"text": "x", "measure": "accuracy", "arm": "few", "than": "many", "better": "higher"}
        verdict = {"word": "holds", "difference": 0.5, "interval": [0.1, 0.9]}
        found["claims"] = [claim | {"verdict": verdict | {"p": p}} for p in ps]
        (tmp_path / f"{name}.json").write_text(json.dumps(found), "utf-8")
    page = write_page(tmp_path, tmp_path / "R.md", ["one", "two"]).read_text("utf-8")
    assert page.count("| 0.060 | **undecided** |") == 2 and page.count("| 0.200 | **undecided** |") == 1
    assert "for all 3 claims" in page and "Runs shared with two (few picks, many picks)." in page


def test_a_claim_may_be_against_a_number_or_another_measure_of_the_same_runs(done):
    measured = suite(
        measures=(Measure("accuracy", "answers right", "higher"), Measure("floor", "blind")),
        claims=(Claim("a", "accuracy", "few", "floor"), Claim("b", "accuracy", "few", 0.25)),
    )
    arms = json.loads(json.dumps(done[1]["arms"]))
    for run, right, floor in zip(arms["few"]["runs"], (0.5, 0.75), (0.25, 0.375)):
        run["measures"] |= {"accuracy": right, "floor": floor}
    found = [summary._claim(measured, claim, arms, {})["verdict"] for claim in measured.claims]
    assert found == [judge([0.5, 0.75], other, "higher").to_dict() for other in ([0.25, 0.375], [0.25, 0.25])]
    with pytest.raises(ValueError, match="arm 'flor'"):
        suite(claims=(Claim("a", "accuracy", "few", "flor"),))


def test_the_page_has_the_floor_of_every_task(done, tmp_path):
    from abyssal.train.ablate import floors
    from abyssal.train.data.planted import TASKS

    found = floors.floors()
    assert list(found) == list(TASKS) and max(found["recall"][reader] for reader in floors.READERS) < 1 / 32 + 0.02
    assert found["mqar"]["at"] < 64 < 512 <= found["recall"]["at"]
    (tmp_path / "small.json").write_text(json.dumps(committed(done[1])), "utf-8")
    page = write_page(tmp_path, tmp_path / "R.md", ["small"]).read_text("utf-8")
    assert f"| recall | {found['recall']['recency']:.1%} |" in page and page.count("\n| ngram_facts |") == 1


def test_answers_make_the_questions_noise_part_of_the_verdict(done):
    few, many = json.loads(json.dumps(done[1]["arms"])).values()
    for arm, texts in ((few, ("1101", "1111")), (many, ("0100", "0101"))):
        for run, text in zip(arm["runs"], texts):
            run["answers"] = measures.answers({"right": {"accuracy_at.32": text[:1], "accuracy_at.64": text[1:]}})
            run["measures"]["accuracy"] = text.count("1") / 4
    first, second = np.array([[[1, 1, 0, 1], [1, 1, 1, 1]], [[0, 1, 0, 0], [0, 1, 0, 1]]])

    def verdict(rows, others):
        of = {"few": {"accuracy": np.array(rows)}, "many": {"accuracy": np.array(others)}}
        return summary._claim(suite(), suite().claims[0], {"few": few, "many": many}, of)["verdict"]

    def wanted(items):
        return judge(first.mean(1).tolist(), second.mean(1).tolist(), "higher", items).to_dict()

    assert verdict([0, 1, 2, 3], [0, 1, 2, 3])["interval"] == pytest.approx(wanted([(first, second)])["interval"])
    both = by_row(first, np.array([0, 0, 1, 1])), by_row(second, np.array([0, 0, 1, 1]))
    assert verdict([0, 0, 1, 1], [0, 0, 1, 1]) == wanted([both])
    assert verdict([0, 0, 1, 1], [0, 0, 0, 1]) == wanted([]), "others were asked"
    single = verdict([5] * 4, [5] * 4)
    assert single["word"] == "undecided" and single["interval"] is single["p"] is None and single["difference"] == 0.5
    assert few["runs"][0]["answers"].keys() == {"accuracy", "accuracy_at.32", "accuracy_at.64"}
    assert measures.unpacked(few["runs"][0]["answers"]["accuracy_at.64"]) == [1, 0, 1] and measures.answers({}) == {}


def test_a_summary_puts_the_questions_of_a_row_together(done):
    planned, draw = jobs(suite(), [0, 1]), np.random.default_rng(0)
    results = [json.loads((done[0] / RUNS / job.key / RESULT).read_text("utf-8")) for job in planned]
    rows = open_source(planned[0].recipe).rows_of_answers()
    octaves = [name for name in rows if name.startswith("accuracy_at.")]
    for result in results:
        right = {name: draw.random(len(rows[name])) < 0.5 for name in octaves}
        result["answers"] = measures.answers({"right": {n: "".join(map(str, r.astype(int))) for n, r in right.items()}})
        result["measures"]["accuracy"] = np.concatenate(list(right.values())).mean()
    found = summary.summarise(suite(), "quick", (), planned, results)
    of_row = np.concatenate([rows[name] for name in octaves])
    both = [np.array([measures.unpacked(r["answers"]["accuracy"]) for r in results[i::2]]) for i in (0, 1)]
    wanted = judge(*(one.mean(1).tolist() for one in both), "higher", [tuple(by_row(one, of_row) for one in both)])
    assert found["claims"][0]["verdict"]["interval"] == pytest.approx(wanted.interval)
    assert len(set(of_row.tolist())) == 2


def test_a_sweep_keeps_the_best_change_of_each_axis_at_equal_time(tmp_path, monkeypatch):
    """Scores are made up by what is set; the steps are those that fit."""
    scores = {"16": 3.0, "8": 2.5, "32": 2.7, "8 0.5": 2.6, "8 2.0": 2.4}

    def run_job(job, runs):
        change = f"{job.recipe.model.index_topk} {job.recipe.model.routed_scaling_factor}".removesuffix(" 1.0")
        found = json.loads((tmp_path / "one.json").read_text("utf-8"))
        return (
            found
            | {"key": job.key, "seed": job.seed, "steps": job.recipe.train.steps}
            | {"measures": found["measures"] | {"clean": scores[change]}}
        )

    job = jobs(suite(), [0])[0]
    (tmp_path / "one.json").write_text(json.dumps(runner.run_job(job, tmp_path / RUNS)), "utf-8")
    monkeypatch.setattr(runner, "run_job", run_job)
    monkeypatch.setattr(runner, "seconds_per_step", lambda jobs: [0.3, *(0.1 for _ in jobs[1:])])
    axes = (
        sweep.Axis("picks", (("model.index_topk=8",), ("model.index_topk=32",))),
        sweep.Axis("scale", (("model.routed_scaling_factor=0.5",), ("model.routed_scaling_factor=2",))),
    )
    arm = Arm("start", "start", without=("stages",))
    found = sweep.run_sweep(sweep.Sweep("t", "indexer", TINY, arm, arm, axes), tmp_path, workers=1, shown=False)
    assert found["best"] == ["model.index_topk=8", "model.routed_scaling_factor=2"]
    assert [(t["steps"], t["score"]) for t in found["trials"]] == [(4, 3.0), (12, 2.5), (12, 2.7), (12, 2.6), (12, 2.4)]
    assert json.loads((tmp_path / "sweep-t.json").read_text("utf-8")) == found
    marked = [line for line in sweep.table(found).splitlines() if line.endswith("*")]
    assert len(marked) == 1 and marked[0].split()[:2] == ["scale", "model.routed_scaling_factor=2"]
    assert main(["ablate", "--sweep", "nothing"]) == 2


def test_what_the_sweeps_chose_is_what_is_shipped():
    """The JSON of each sweep, its constant, and the recipe."""
    for name, found in FOUND.items():
        told = json.loads((RESULTS / f"sweep-{name}.json").read_text("utf-8"))
        scores = [trial["score"] for trial in told["trials"]]
        assert tuple(told["best"]) == found and told["trials"][scores.index(min(scores))]["changes"] == told["best"]
        assert all(trial["commit"] for trial in told["trials"])
    recipe = load_recipe("toy")
    assert Recipe.from_dict(apply(recipe.to_dict(), FOUND["toy"])) == recipe
    tuned, opponent = SWEEPS["dense"].tuned, SUITES["toy"].arms[1]
    found = replace(tuned, set=(*tuned.set, *FOUND["dense"]))
    suites = replace(SUITES["toy"], set=SWEEPS["dense"].set), SUITES["toy"]
    trial, job = (recipe_of(one, arm, 0, "quick", ()) for one, arm in zip(suites, (found, opponent)))
    for name in ("model", "data", "optim"):
        assert getattr(trial, name) == getattr(job, name), "the opponent is what its sweep found, learning rate too"
