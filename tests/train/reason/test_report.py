"""The table, the page and the picture of an evaluation, from made-up results; verdicts against arithmetic by hand."""

import json

import pytest

from abyssal.train.reason.report import changes, markdown, recipes, spread, table, verdict


def score(right):
    return {"right": right, "well_formed": 1.0, "length": 9.0}


def made_run(recipe, seed, thinking, chat, rewarded=False):
    modes = {"thinking": thinking, "chat": chat}
    by_mode = {
        mode: {"addition-3": score(right), "sorting-6": score(right / 2)}
        for mode, right in modes.items()
        if right is not None
    }
    steps = 12
    curves = {"step": list(range(1, steps + 1)), "exams": []}
    if rewarded:
        names = ("reward_thinking", "reward_chat", "kl", "entropy", "length_thinking", "length_chat")
        curves |= {name: [0.1 * seed + step / 20 for step in range(steps)] for name in names}
        curves["exams"] = [{"step": s, "accuracy_thinking": 0.5, "accuracy_chat": 0.25} for s in (6, 12)]
    return {
        "folder": f"{recipe}-{seed}",
        "recipe": recipe,
        "rewarded": rewarded,
        "seed": seed,
        "tasks": ["addition-3", "sorting-6"],
        "modes": list(by_mode),
        "steps": steps,
        "tokens": 1_500_000,
        "minutes": 4.0 + seed,
        "parameters": 1234,
        "machine": {"name": "a machine"},
        "scores": {"1.0": by_mode, "0.0": {m: {t: score(1.0) for t in tasks} for m, tasks in by_mode.items()}},
        "curves": curves,
    }


@pytest.fixture
def found():
    runs = [made_run("sft", seed, 0.5 + 0.1 * seed, 0.1) for seed in range(3)]
    runs += [made_run("sft, chat only", 0, None, 0.2)]
    runs += [made_run("grpo", seed, 0.9, 0.1 * seed, rewarded=True) for seed in range(3)]
    return {"problems": 100, "runs": runs}


@pytest.mark.parametrize(
    ("thinking", "chat", "said"),
    [
        ([0.5, 0.6, 0.7], [0.1, 0.1, 0.1], "+0.50, helps"),
        ([0.1, 0.1, 0.1], [0.5, 0.6, 0.7], "-0.50, hurts"),
        ([0.5, 0.5, 0.2], [0.4, 0.4, 0.3], "+0.03, no clear difference"),  # signs differ
        ([0.9, 0.2, 0.2], [0.1, 0.19, 0.19], "+0.27, no clear difference"),  # one sign, 0.27 below twice 0.26
        ([0.9, 0.8], [0.1, 0.1], "+0.75, too few seeds"),
        ([], [0.1], "-"),
        ([0.1], [], "-"),
        ([0.92, 0.93, 0.94], [0.9, 0.91, 0.92], "+0.02, no clear difference"),  # 0.02 below twice 0.023, of the answers
        ([0.97, 0.98, 0.99], [0.9, 0.91, 0.92], "+0.07, helps"),
        ([0.100, 0.101, 0.1], [0.1, 0.104, 0.1], "+0.00, no clear difference"),
    ],
)
def test_verdicts(thinking, chat, said):
    assert verdict(thinking, chat, 100) == said


def test_spread_is_mean_and_range():
    assert spread([0.25, 0.75, 0.2]) == "0.40 (0.20 to 0.75)"
    assert spread([0.125], 3) == "0.125" and spread([]) == "-"


def test_the_table_has_a_row_for_each_task_and_recipe(found):
    assert recipes(found) == ["sft", "sft, chat only", "grpo"]
    text = table(found, 1.0).splitlines()
    assert text[0] == "share of 100 held-out problems answered right, temperature 1; mean (range) of 3 seeds"
    assert len(text) == 3 + 2 * 3
    assert text[3].split("  ")[0] == "addition-3" and "0.10 (0.10 to 0.10)" in text[3]
    assert "0.60 (0.50 to 0.70)" in text[3] and text[3].endswith("+0.50, helps")
    assert "0.20" in text[4] and text[4].endswith("-")
    assert "0.10 (0.00 to 0.20)" in text[5] and "0.90 (0.90 to 0.90)" in text[5]
    assert "0.30 (0.25 to 0.35)" in text[6] and "greedy" in table(found, 0.0)


def test_the_page_says_what_the_numbers_say(found):
    page = markdown(found)
    assert "- addition-3: thinking +0.50, helps after sft; +0.80, helps after grpo." in page
    assert "| addition-3 | think | 0.60 (0.50 to 0.70) | 0.90 (0.90 to 0.90) | +0.30, helps |" in page
    assert "| sorting-6 | non-think | 0.05 (0.05 to 0.05) | 0.05 (0.00 to 0.10) | +0.00, no clear difference |" in page
    assert "| grpo | 0, 1, 2 | 12 | 5.0 (4.0 to 6.0) | 1.50 (1.50 to 1.50) M |" in page
    assert "1,234 parameters" in page and "up to 0.05 of standard error" in page
    assert page.count("| addition-3 | sft |") == 2
    for run in found["runs"]:
        run["scores"]["1.0"], run["scores"]["0.0"] = run["scores"]["0.0"], run["scores"]["1.0"]
    assert "| 0.60 (0.50 to 0.70) | 0.90 (0.90 to 0.90) |" not in markdown(found)
    found["runs"] = [run for run in found["runs"] if not run["rewarded"]]
    assert "rewards changed" not in markdown(found)


def test_changes_pair_seeds_by_number():
    runs = [made_run("sft", seed, 0.2 + 0.3 * seed, 0.1) for seed in range(3)]
    runs += [made_run("grpo", seed, 0.3 + 0.3 * seed, 0.1, rewarded=True) for seed in (2, 0, 1)]
    found = {"problems": 100, "runs": runs}
    assert changes(found)[1] == ["addition-3", "think", "0.50 (0.20 to 0.80)", "0.60 (0.30 to 0.90)", "+0.10, helps"]
    runs[-1]["seed"] = 9
    assert changes(found)[1][-1] == "other seeds"


def test_the_picture_comes_from_the_json_alone(found, tmp_path):
    pytest.importorskip("matplotlib")
    from abyssal.train.plots.reason import plot

    (tmp_path / "reasoning.json").write_text(json.dumps(found), "utf-8")
    path = plot(tmp_path / "reasoning.json")
    assert path == tmp_path / "reasoning.png" and path.read_bytes()[:4] == b"\x89PNG"
    found["runs"] = found["runs"][:3]
    (tmp_path / "reasoning.json").write_text(json.dumps(found), "utf-8")  # without any GRPO run
    assert plot(tmp_path / "reasoning.json", tmp_path / "other.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError):
        plot(tmp_path / "none.json")


def test_curves_of_a_run_show_what_its_metrics_hold(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from abyssal.train.plots import curves as plots
    from abyssal.train.plots import rewards as curves

    records = [
        {"step": s + 1, "reward": 0.5, "reward_thinking": s / 20, "reward_chat": 0.25, "kl": 0.01 * s, "entropy": 0.5}
        | {"length_thinking": 20.0, "length_chat": 5.0, "clip_fraction": 0.0, "off_policy": 0.125}
        for s in range(20)
    ]
    records[-1] |= {"accuracy": {}, "accuracy_thinking": 0.75, "accuracy_chat": 0.5}
    panels = plots._panels(records, {}, 1)
    assert panels == (curves.reward, curves.distance, curves.entropy, curves.length, curves.limits)
    shown = []
    for panel in panels:
        axis = Figure().subplots()
        panel(axis, records)
        shown.append([text.get_text() for text in axis.get_legend().get_texts()])
    assert shown[0][:2] == ["reward, thinking: 0.725", "reward, answer at once: 0.25"]  # the last ten steps
    assert shown[0][2:] == ["thinking: 0.750 at the end", "answer at once: 0.500 at the end"]
    assert shown[1] == ["KL to the weights at the start: 0.145"] and shown[2] == ["entropy: 0.5"]
    assert shown[3] == ["thinking: 20", "answer at once: 5"]
    assert shown[4] == ["tokens clipped: 0", "completions left out as off-policy: 0.125"]
    tuning = [{"step": 1, "lm": 2.0, "accuracy": {}, "accuracy_chat": 0.5}]
    assert plots._panels(tuning, {}, 1)[0] is curves.accuracy
    assert plots._panels([{"step": 1, "lm": 2.0}], {}, 1)[0].func is plots._bits
