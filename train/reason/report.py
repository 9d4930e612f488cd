"""The table of an evaluation, and the page that says what it shows; both from its JSON alone."""

import math
from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]


def recipes(found: Results) -> list[str]:
    """Names in order of first appearance."""
    return list(dict.fromkeys(run["recipe"] for run in found["runs"]))


def scores(found: Results, recipe: str, mode: str, task: str, temperature: float, what: str = "right") -> list[float]:
    """One number of each seed; empty where the runs do not have the mode."""
    runs = [run["scores"][str(temperature)] for run in found["runs"] if run["recipe"] == recipe]
    return [run[mode][task][what] for run in runs if mode in run]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """mean (worst to best)"""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(thinking: Sequence[float], chat: Sequence[float]) -> str:
    """What thinking did: said of differences of one sign in three seeds or more, above twice their standard error."""
    if not thinking or not chat:
        return "-"
    differences = [a - b for a, b in zip(thinking, chat)]
    n, mean = len(differences), sum(differences) / len(differences)
    text = f"{mean:+.2f}"
    if n < 3:
        return f"{text}, too few seeds"
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
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
            lines.append([task, recipe, *map(spread, by_mode), verdict(by_mode[1], by_mode[0])])
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
    runs, tasks = found["runs"], found["runs"][0]["tasks"]
    lines = ["# Reasoning at toy scale", "", _opening(found), "", "![accuracy, reward, KL, length](reasoning.png)", ""]
    for temperature, title in ((1.0, "Answers drawn at temperature 1"), (0.0, "Greedy answers")):
        lines += [f"## {title}", "", *_pipes(HEAD, rows(found, temperature)), ""]
    lines += ["## What held, what did not", "", *_findings(found), ""]
    lines += [
        "## The runs",
        "",
        *_pipes(["recipe", "seeds", "steps", "minutes each", "tokens learnt from"], _runs(found)),
        "",
    ]
    sampling = math.sqrt(0.25 / found["problems"])
    lines += [
        "## What this cannot tell",
        "",
        f"- Each share is of {found['problems']} questions: up to {sampling:.2f} of standard error from the questions"
        " alone, the same questions for every run.",
        "- `helps` and `hurts` ask for one sign in all seeds and a mean above twice its standard error over seeds; with"
        " three seeds this is a hint, not a proof.",
        "- A model of this size learns the form of the working as a task of its own, next to the answer: where working"
        " is long and the answer easy, it has more places to slip. Nothing here says how that changes with size.",
        f"- {len(tasks)} tasks with one fixed way of working each; the model never chooses how to think, or how long.",
    ]
    assert runs
    return "\n".join(lines) + "\n"


def _opening(found: Results) -> str:
    run = found["runs"][0]
    return (
        f"One model of {run['parameters']:,} parameters learns {', '.join(run['tasks'])} in both modes of V4's prompt"
        " format: with visible working between `<think>` and `</think>`, and with the answer at once. Fine-tuning sees"
        " every problem once in each mode; GRPO then rewards right answers in both, equally often. The numbers and the"
        " picture are drawn from `reasoning.json`."
    )


def _findings(found: Results) -> list[str]:
    """A line for each task and recipe, and what rewards changed."""
    lines, names = [], recipes(found)
    for task in found["runs"][0]["tasks"]:
        said = []
        for name in names:
            modes = [scores(found, name, mode, task, 1.0) for mode in ("thinking", "chat")]
            if all(modes):
                said.append(f"{verdict(*modes)} after {name}")
        lines.append(f"- {task}: thinking {'; '.join(said)}.")
    pairs = [(a, b) for a in names for b in names if not _rewarded(found, a) and _rewarded(found, b)]
    for before, after in pairs[:1]:
        for mode, label in (("thinking", "think"), ("chat", "non-think")):
            moved = []
            for task in found["runs"][0]["tasks"]:
                old, new = (_mean(scores(found, name, mode, task, 1.0)) for name in (before, after))
                moved.append(f"{task} {old:.2f} to {new:.2f}")
            lines.append(f"- From {before} to {after}, {label}: {', '.join(moved)}.")
    return lines


def _rewarded(found: Results, recipe: str) -> bool:
    return any(run["rewarded"] for run in found["runs"] if run["recipe"] == recipe)


def _runs(found: Results) -> list[list[str]]:
    lines = []
    for name in recipes(found):
        mine = [run for run in found["runs"] if run["recipe"] == name]
        seeds = ", ".join(str(run["seed"]) for run in mine)
        minutes, tokens = spread([run["minutes"] for run in mine], 1), spread([run["tokens"] / 1e6 for run in mine])
        lines.append([name, seeds, str(mine[0]["steps"]), minutes, f"{tokens} M"])
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pipes(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
