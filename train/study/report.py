"""The page of some studies, and the table of any runs, from their records alone: no number is typed by hand.

A verdict is of a claim that `plan.py` made before the runs: it *holds*, or *does not hold*, where Holm's p of the page
is below 5 % and the difference has the claimed sign, or the other; else it is *undecided*.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..evaluate.verdict import Verdict, holm, judge
from ..reason.arithmetic import luck
from ..reason.exam import questions
from .record import LOOKS, TEMPERATURES, Record, right

Found = dict[str, Any]
MODES = {"thinking": "think", "chat": "at once"}


def answers(runs: Sequence[Record], mode: str, task: str, temperature: float = 1.0) -> np.ndarray:
    """[seeds, questions] 1 where right."""
    return np.stack([right(run["scores"][str(temperature)][mode][task]) for run in runs])


def shares(runs: Sequence[Record], mode: str, temperature: float = 1.0) -> list[float]:
    """Of each run, answered right: mean over tasks."""
    return [fmean(answers([run], mode, task, temperature).mean() for task in run["tasks"]) for run in runs]


def compare(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Verdict:
    """one - other, of each task [seeds, questions]; each task counts the same."""
    first, second = (np.mean([task.mean(1) for task in tasks], 0).tolist() for tasks in (one, other))
    return judge(first, second, "higher", list(zip(one, other)))


def difference(found: Found, one: str, other: str) -> Verdict | None:
    """Between the sides of a claim, at temperature 1, over the seeds that both have; None where there are none."""
    sides = [side.split() for side in (one, other)]
    by_seed = [
        {run["seed"]: run for run in found["runs"] if run["arm"] == arm and (what in MODES or what in run["looks"])}
        for arm, what, *_ in sides
    ]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return None
    pair = [[runs[seed] for seed in seeds] for runs in by_seed]
    return compare(*(_numbers(runs, side) for runs, side in zip(pair, sides)))


def _numbers(runs: Sequence[Record], side: Sequence[str]) -> list[np.ndarray]:
    """Of each task [seeds, questions]; a number of the runs as the one question of one task."""
    _, what, *tasks = side
    if what in MODES:
        return [answers(runs, what, task) for task in tasks or runs[0]["tasks"]]
    return [np.array([[run["looks"][what]] for run in runs])]


def verdicts(found: Found) -> list[tuple[str, str, dict[str, Any]]]:
    """Study, claim and verdict, which Holm corrects for the page; {} where the runs are not there."""
    claims = [(study["name"], claim) for study in found["studies"] for claim in study["claims"]]
    every = [difference(found, claim["one"], claim["other"]) for _, claim in claims]
    told = [each.to_dict() if each else {} for each in every]
    return [
        (name, claim["text"], verdict) for (name, claim), verdict in zip(claims, holm(told, ["higher"] * len(told)))
    ]


def markdown(found: Found) -> str:
    """The page."""
    lines, judged = [HEAD], verdicts(found)
    lines += [
        "| study | claim | difference | 95 % interval | p (Holm) | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| [{study}](#{study}) | {text} | {_difference(verdict)} | {_p(verdict.get('p'))} | **{_word(verdict)}** |"
        for study, text, verdict in judged
    ]
    for study in found["studies"]:
        lines += ["", f"## {study['name']}", "", f"**{study['title']}.** {study['question']}", ""]
        lines += _table(found, study)
        lines += ["", *_looks(found, study), f"*What this cannot tell.* {study['caveat']}"]
    return "\n".join([*lines, "", "## The runs", "", *_runs(found), "", _origin(found)]) + "\n"


HEAD = """# Reasoning at toy scale

Written by `abyssal study` from `reasoning.json`; no number here is typed by hand.

    addition-3         347+586     7+6=13;4+8+1=13;3+5+1=9       933      columns from the units up
    sorting-4          sort dbca   d,bd,bcd,abcd                 abcd     letter after letter put in its place
    countdown-3        3 5 9=24    5-3=2+9=11;5*3=15+9=24        5*3+9    from left to right, as on a pocket calculator
    multiplication-2   47*6        40*6=240;7*6=42;240+42=282    282      no digit is 0

Every model sits the same examination: held-out questions, with visible working (think) and without (at once). A
difference is paired by seed and question; its interval is that of the paired t over seeds, with what other questions
would do added (`train/evaluate/verdict.py`). Claims are about answers drawn at temperature 1, in the mean over a
study's tasks, which may differ: its table has each. They were made before the runs; p is adjusted for all of this
page (Holm), which asks much of few seeds: `abyssal study` runs eight, the table of runs says how many have run here.
Where two arms gave the very same answers, there is no interval.

![accuracy, rewards, replay](reasoning.png)
"""


def _table(found: Found, study: Found) -> list[str]:
    """Task, mode and temperature by arm: the mean over seeds, and the range."""
    arms = {arm: [run for run in found["runs"] if run["arm"] == arm] for arm in study["arms"]}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    labels = [found["arms"][arm]["label"] for arm in arms]
    lines = [f"| task | mode | answers | {' | '.join(labels)} |", f"|{' --- |' * (3 + len(arms))}"]
    for task in next((runs[0]["tasks"] for runs in arms.values()), ()):
        for mode, said in MODES.items():
            for temperature in TEMPERATURES:
                cells = [
                    spread([float(answers([run], mode, task, temperature).mean()) for run in runs])
                    for runs in arms.values()
                ]
                lines.append(f"| {task} | {said} | {'drawn' if temperature else 'greedy'} | {' | '.join(cells)} |")
        if task.startswith("countdown"):
            blind = fmean(luck(each.question) for each in questions(task, found["problems"]))
            lines.append(f"| {task} | blindly drawn expressions | - | {' | '.join([f'{blind:.2f}'] * len(arms))} |")
    return lines


def _looks(found: Found, study: Found) -> list[str]:
    """What claims about numbers of the runs are made of, for all arms of the study that have them."""
    if not any(claim["one"].split()[1] in LOOKS for claim in study["claims"]):
        return []
    lines = [f"| at the last update of a step | {' | '.join(LOOKS)} |", f"|{' --- |' * (1 + len(LOOKS))}"]
    for arm in study["arms"]:
        runs = [run["looks"] for run in found["runs"] if run["arm"] == arm and run["looks"]]
        means = [[run[name] for run in runs if name in run] for name in LOOKS]
        cells = [f"{fmean(values):.3g}" if values else "-" for values in means]
        lines += [f"| {found['arms'][arm]['label']} | {' | '.join(cells)} |"] * bool(runs)
    return [*lines, ""]


def _runs(found: Found) -> list[str]:
    lines = ["| arm | recipe | seeds | parameters | steps | wall-clock minutes | million tokens learnt from |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, arm in found["arms"].items():
        runs = [run for run in found["runs"] if run["arm"] == name]
        if runs:
            minutes, tokens = spread([run["minutes"] for run in runs], 1), spread([run["tokens"] / 1e6 for run in runs])
            changes = "".join(f" `{change}`" for change in arm["set"])
            start = f", from {arm['after']}" if arm["after"] else ""
            cells = [name, f"`{arm['recipe']}`{changes}{start}", len(runs), f"{runs[0]['parameters']:,}"]
            lines.append(f"| {' | '.join(map(str, [*cells, runs[0]['steps'], minutes, tokens]))} |")
    return lines


def _origin(found: Found) -> str:
    commits = sorted({str(run["source"]["commit"])[:7] for run in found["runs"]})
    dirty = ", with uncommitted changes" if any(run["source"]["uncommitted_changes"] for run in found["runs"]) else ""
    machines = sorted({run["machine"]["name"] for run in found["runs"]})
    return f"On {', '.join(machines)}, one thread a run; commit {', '.join(commits)}{dirty}." if found["runs"] else ""


def table(runs: Sequence[Record], temperature: float) -> str:
    """For the screen: of each task and recipe, the share answered right, and what thinking did."""
    lines = [["task", "recipe", *MODES.values(), "think - at once"]]
    for task in runs[0]["tasks"]:
        for name in dict.fromkeys(run["recipe"] for run in runs):
            mine = [run for run in runs if run["recipe"] == name]
            by_mode = {mode: answers(mine, mode, task, temperature) for mode in MODES if mode in mine[0]["modes"]}
            cells = [spread([*map(float, by_mode[mode].mean(1))]) if mode in by_mode else "-" for mode in MODES]
            gap = compare([by_mode["thinking"]], [by_mode["chat"]]) if len(by_mode) == 2 else None
            lines.append([task, name, *cells, _difference(gap.to_dict() if gap else {}, " ")])
    widths = [max(map(len, column)) for column in zip(*lines)]
    how = f"temperature {temperature:g}" if temperature else "greedy"
    title = f"held-out problems answered right, {how}: mean and range over seeds, paired 95 % interval"
    return "\n".join([title, *("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean (least to largest)"""
    if not values:
        return "-"
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _difference(verdict: dict[str, Any], between: str = " | ") -> str:
    """The difference and its interval."""
    if not verdict:
        return f"-{between}-"
    interval = verdict["interval"] if verdict["interval"] != [0.0, 0.0] else None
    told = "{:+.3g} to {:+.3g}".format(*interval) if interval else "-"
    return f"{verdict['difference']:+.3g}{between}{told}"


def _word(verdict: dict[str, Any]) -> str:
    return "not enough runs" if verdict.get("p") is None else verdict["word"]


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
