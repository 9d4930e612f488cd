"""The table of an evaluation, and the page that says what it shows; both from its JSON alone."""

import math
from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]


def recipes(found: Results) -> list[str]:
    """Names in order of first appearance."""
    return list(dict.fromkeys(run["recipe"] for run in found["runs"]))


def scores(found: Results, recipe: str, mode: str, task: str, temperature: float, what: str = "right") -> list[float]:
    """One number of each seed, seeds in order; empty where the runs do not have the mode."""
    runs = sorted((run for run in found["runs"] if run["recipe"] == recipe), key=lambda run: run["seed"])
    return [run["scores"][str(temperature)][mode][task][what] for run in runs if mode in run["modes"]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean (worst to best)"""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(with_it: Sequence[float], without: Sequence[float], problems: int) -> str:
    """What something did, seed by seed; said where three or more have one sign and a mean above two standard errors.

    The standard error is the larger of two: over seeds, and of shares of `problems` answers each.
    """
    if not with_it or not without:
        return "-"
    differences = [a - b for a, b in zip(with_it, without)]
    n, mean = len(differences), sum(differences) / len(differences)
    text = f"{round(mean, 2) + 0.0:+.2f}"  # + 0.0: no minus before zero
    if n < 3:
        return f"{text}, too few seeds"
    over_seeds = sum((d - mean) ** 2 for d in differences) / (n - 1) / n
    of_answers = sum(p * (1 - p) for p in (sum(with_it) / n, sum(without) / n)) / (problems * n)
    error = math.sqrt(max(over_seeds, of_answers))
    same = min(differences) > 0 or max(differences) < 0
    if not same or abs(mean) <= 2 * error:
        return f"{text}, no clear difference"
    return f"{text}, {'helps' if mean > 0 else 'hurts'}"


def rows(found: Results, temperature: float) -> list[list[str]]:
    """Task, recipe, accuracy in each mode, what thinking did."""
    lines = []
    for task in found["runs"][0]["tasks"]:
        for recipe in recipes(found):
            by_mode = [scores(found, recipe, mode, task, temperature) for mode in ("chat", "thinking")]
            lines.append([task, recipe, *map(spread, by_mode), verdict(by_mode[1], by_mode[0], found["problems"])])
    return lines


HEAD = ["task", "recipe", "non-think", "think", "thinking"]


def table(found: Results, temperature: float) -> str:
    """For the screen."""
    cells = [HEAD, *rows(found, temperature)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    how = f"temperature {temperature:g}" if temperature else "greedy"
    seeds = max(len(scores(found, name, "chat", found["runs"][0]["tasks"][0], 1.0)) for name in recipes(found))
    title = f"share of {found['problems']} held-out problems answered right, {how}; mean (range) of {seeds} seeds"
    return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(found: Results) -> str:
    """The results page: what was trained, the tables, the verdicts, and what a toy cannot tell."""
    tasks = found["runs"][0]["tasks"]
    lines = ["# Reasoning at toy scale", "", _opening(found), "", "![accuracy, reward, KL, length](reasoning.png)", ""]
    for temperature, title in ((1.0, "Answers drawn at temperature 1"), (0.0, "Greedy answers")):
        lines += [f"## {title}", "", *_pipes(HEAD, rows(found, temperature)), ""]
    lines += ["## What held, what did not", "", *_findings(found), ""]
    if changes(found):
        lines += ["## What rewards changed (temperature 1)", "", *_pipes(CHANGES, changes(found)), ""]
    lines += [
        "## The runs",
        "",
        *_pipes(RUNS, _runs(found)),
        "",
    ]
    sampling = math.sqrt(0.25 / found["problems"])
    lines += [
        "## What this cannot tell",
        "",
        f"- Each share is of {found['problems']} questions: up to {sampling:.2f} of standard error from the questions"
        " alone, the same questions for every run.",
        "- `helps` and `hurts` ask for one sign in all seeds and a mean above twice its standard error, over seeds and"
        " of the answers drawn; with three seeds this is a hint, not a proof.",
        "- A model of this size learns the form of the working as a task of its own, next to the answer: where working"
        " is long and the answer easy, it has more places to slip. Nothing here says how that changes with size.",
        "- Both modes have the same examples, not the same tokens: working is most of what the loss counts. Nor is the"
        " gain from rewards held against as much more fine-tuning.",
        f"- {len(tasks)} tasks with one fixed way of working each; the model never chooses how to think, or how long.",
    ]
    return "\n".join(lines) + "\n"


def _opening(found: Results) -> str:
    run = found["runs"][0]
    return (
        f"One model of {run['parameters']:,} parameters learns {', '.join(run['tasks'])} in both modes of V4's prompt"
        " format: with visible working between `<think>` and `</think>`, and with the answer at once. Fine-tuning sees"
        " every problem once in each mode; GRPO then rewards right answers in both, equally often. The numbers and the"
        " picture are drawn from `reasoning.json`.\n\n"
        "    addition   347+586       7+6=13;4+8+1=13;3+5+1=9       933     columns from the units up\n"
        "    sorting    sort dbca     d,bd,bcd,abcd                 abcd    letter after letter put in its place"
    )


def _findings(found: Results) -> list[str]:
    """A line for each task."""
    lines, names = [], recipes(found)
    for task in found["runs"][0]["tasks"]:
        said = []
        for name in names:
            modes = [scores(found, name, mode, task, 1.0) for mode in ("thinking", "chat")]
            if all(modes):
                said.append(f"{verdict(modes[0], modes[1], found['problems'])} after {name}")
        lines.append(f"- {task}: thinking {'; '.join(said)}.")
    return lines


CHANGES = ["task", "mode", "before", "after", "rewards"]


def changes(found: Results) -> list[list[str]]:
    """Task, mode, accuracy in the first recipe without rewards and in the first with, and what rewards did."""
    without = [name for name in recipes(found) if not _rewarded(found, name)]
    rewarded = [name for name in recipes(found) if _rewarded(found, name)]
    lines = []
    for task in found["runs"][0]["tasks"] if without and rewarded else ():
        for mode, label in (("chat", "non-think"), ("thinking", "think")):
            before, after = (scores(found, name, mode, task, 1.0) for name in (without[0], rewarded[0]))
            paired = _seeds(found, without[0]) == _seeds(found, rewarded[0])
            said = verdict(after, before, found["problems"]) if paired else "other seeds"
            lines.append([task, label, spread(before), spread(after), said])
    return lines


def _seeds(found: Results, recipe: str) -> list[int]:
    return sorted(run["seed"] for run in found["runs"] if run["recipe"] == recipe)


def _rewarded(found: Results, recipe: str) -> bool:
    return any(run["rewarded"] for run in found["runs"] if run["recipe"] == recipe)


RUNS = ["recipe", "seeds", "steps", "wall-clock minutes", "tokens learnt from"]


def _runs(found: Results) -> list[list[str]]:
    lines = []
    for name in recipes(found):
        mine = [run for run in found["runs"] if run["recipe"] == name]
        seeds = ", ".join(map(str, _seeds(found, name)))
        minutes, tokens = spread([run["minutes"] for run in mine], 1), spread([run["tokens"] / 1e6 for run in mine])
        lines.append([name, seeds, str(mine[0]["steps"]), minutes, f"{tokens} M"])
    return lines


def _pipes(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
