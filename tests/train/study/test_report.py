"""The page, the tables and the picture from made-up records; verdicts against those of the claims' numbers."""

import json

import numpy as np
import pytest

from abyssal.train.evaluate.verdict import holm
from abyssal.train.reason.exam import Score
from abyssal.train.study.draw import draw
from abyssal.train.study.record import right, stored
from abyssal.train.study.report import answers, compare, difference, markdown, shares, spread, table, verdicts

TASKS = ("countdown-3", "sorting-6")


def made_run(arm, seed, thinking, chat, **looks):
    """Of 20 questions, those right whose number is below a share of them."""
    scores = {
        mode: {task: stored(Score([n < share * 20 for n in range(20)], 1.0, 9.0)) for task in TASKS}
        for mode, share in (("thinking", thinking), ("chat", chat))
    }
    return {
        **{"arm": arm, "recipe": f"reason-{arm}", "seed": seed, "tasks": list(TASKS), "modes": ["thinking", "chat"]},
        **{"steps": 12, "tokens": 1_500_000, "minutes": 4.0 + seed, "parameters": 1234, "looks": looks},
        "machine": {"name": "a machine"},
        "source": {"commit": "abcdef0123", "uncommitted_changes": False},
        "scores": {"1.0": scores, "0.0": {m: {t: stored(Score([True] * 20, 1.0, 9.0)) for t in TASKS} for m in scores}},
        "curves": {"reward_thinking": [0.1, 0.2], "reward_chat": [0.3, 0.3]} if arm == "grpo" else {},
    }


@pytest.fixture
def found():
    runs = [made_run("sft", seed, 0.3 + 0.05 * seed, 0.2) for seed in range(4)]
    runs += [made_run("grpo", seed, 0.6 + 0.05 * seed, 0.2, kl_kept=0.01 + 0.001 * seed) for seed in (2, 0, 1, 3, 4)]
    runs += [made_run("free", seed, 0.1, 0.1, kl_kept=0.02) for seed in range(4)]
    claims = [
        ("thinking", "grpo thinking", "sft thinking"),
        ("sorting", "sft thinking sorting-6", "grpo thinking sorting-6"),
        ("at once", "grpo chat", "sft chat"),
        ("nearer", "free kl_kept", "grpo kl_kept"),
        ("nobody", "none chat", "sft chat"),
    ]
    study = {
        "name": "control",
        "title": "A title",
        "question": "What?",
        "caveat": "Much.",
        "arms": ["sft", "grpo", "free"],
    }
    study["claims"] = [{"text": text, "one": one, "other": other} for text, one, other in claims]
    arms = {
        name: {"label": f"the {name}", "recipe": f"reason-{name}", "set": ["a.b=1"], "after": ""}
        for name in study["arms"]
    }
    return {"problems": 20, "studies": [study], "arms": arms, "runs": runs}


def test_bits_come_back():
    draws = np.random.default_rng(0).random(37) < 0.4
    assert np.array_equal(right(json.loads(json.dumps(stored(Score(list(draws), 1.0, 2.0))))), draws)


def test_differences_pair_seeds_by_number(found):
    got = difference(found, "grpo thinking", "sft thinking")
    one, other = (
        [r for s in range(4) for r in found["runs"] if (r["arm"], r["seed"]) == (a, s)] for a in ("grpo", "sft")
    )
    assert got == compare(*([answers(runs, "thinking", task) for task in TASKS] for runs in (one, other)))
    assert got.difference == pytest.approx(0.3) and shares(one, "thinking") == pytest.approx([0.6, 0.65, 0.7, 0.75])
    nearer = difference(found, "free kl_kept", "grpo kl_kept")
    peer = compare([np.full((4, 1), 0.02)], [np.array([[0.01, 0.011, 0.012, 0.013]]).T])
    numbers = nearer.difference, nearer.p, *nearer.interval
    assert numbers == pytest.approx((0.0085, peer.p, *peer.interval))
    assert difference(found, "none chat", "sft chat") is None


def test_verdicts_take_the_whole_page_into_account(found):
    judged = {claim: verdict for _, claim, verdict in verdicts(found)}
    assert {claim: verdict.get("word", "not enough runs") for claim, verdict in judged.items()} == {
        "thinking": "holds", "sorting": "does not hold", "at once": "undecided", "nearer": "holds",
        "nobody": "not enough runs",
    }  # fmt: skip
    claims = found["studies"][0]["claims"][:4]
    alone = holm([difference(found, claim["one"], claim["other"]).to_dict() for claim in claims], ["higher"] * 4)
    assert [*judged.values()] == [*alone, {}]


def test_the_page_says_what_the_numbers_say(found):
    page, p = markdown(found), verdicts(found)[0][2]["p"]
    assert "| [control](#control) | thinking | +0.3 |" in page and f"| {p:.3f} | **holds** |" in page
    assert "| sorting-6 | think | drawn | 0.38 (0.30 to 0.45) | 0.70 (0.60 to 0.80) | 0.10 (0.10 to 0.10) |" in page
    assert "| sorting-6 | at once | greedy | 1.00 (1.00 to 1.00) |" in page
    assert "| countdown-3 | blindly drawn expressions | - | 0.0" in page and "sorting-6 | blindly" not in page
    assert "| the grpo | 0.012 | - | - | - |" in page and "| the sft | -" not in page
    assert "| grpo | `reason-grpo` `a.b=1` | 5 | 1,234 | 12 | 6.0 (4.0 to 8.0) | 1.50 (1.50 to 1.50) |" in page
    for run in found["runs"]:
        if run["arm"] in ("grpo", "sft"):
            run["scores"] = found["runs"][0]["scores"]
    assert "| [control](#control) | thinking | +0 | - | 1.000 | **undecided** |" in markdown(found)
    assert page.endswith("On a machine, one thread a run; commit abcdef0.\n")
    found["runs"][0]["source"]["uncommitted_changes"] = True
    assert markdown(found).endswith("commit abcdef0, with uncommitted changes.\n")
    assert "not enough runs" in markdown({**found, "runs": []})


def test_the_table_of_any_runs(found):
    lines = table([run for run in found["runs"] if run["arm"] != "free"], 1.0).splitlines()
    assert len(lines) == 2 + 2 * 2 and lines[1].split("  ")[0] == "task"
    assert "0.38 (0.30 to 0.45)  0.20 (0.20 to 0.20)  +0.175" in lines[2]
    (found["runs"][0])["modes"] = ["chat"]
    assert "  -  " in table(found["runs"][:1], 1.0)


def test_spread_is_mean_and_range():
    assert spread([0.25, 0.75, 0.2]) == "0.40 (0.20 to 0.75)"
    assert spread([0.125], 3) == "0.125" and spread([]) == "-"


def test_the_picture_comes_from_the_json_alone(found, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "reasoning.json"
    path.write_text(json.dumps(found), "utf-8")
    assert draw(path) == tmp_path / "reasoning.png" and (tmp_path / "reasoning.png").read_bytes()[:4] == b"\x89PNG"
    path.write_text(json.dumps({**found, "runs": found["runs"][:4]}), "utf-8")  # without any rewards
    assert draw(path, tmp_path / "other.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError):
        draw(tmp_path / "none.json")
