"""reasoning.png: accuracy by task and mode, and how GRPO went; drawn from reasoning.json alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reason.report import Results, recipes, scores
from .style import BLUE, GREEN, GREY, ORANGE, canvas, save, smooth

FILE = "reasoning.png"
MODES = {"chat": (ORANGE, "answer at once"), "thinking": (BLUE, "visible working")}
MARKERS = "os^Dv"


def plot(results: Path | str, path: Path | str | None = None) -> Path:
    """Draws a reasoning.json to `path` (default: beside it).

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: matplotlib is not installed.
    """
    results = Path(results)
    found = json.loads(results.read_text("utf-8"))
    figure = canvas(13, 7.6)
    axes = figure.subplot_mosaic("AAB;CDE")
    _accuracy(axes["A"], found)
    _curve(axes["B"], found, {"reward_thinking": MODES["thinking"], "reward_chat": MODES["chat"]})
    axes["B"].set(title="GRPO: reward of the rollouts", ylabel="share answered right", ylim=(0, 1))
    _exams(axes["C"], found)
    _curve(axes["D"], found, {"kl": (BLUE, "KL to the start"), "entropy": (GREEN, "entropy")})
    axes["D"].set(title="GRPO: distance and entropy", ylabel="nats per token", ylim=(0, None))
    _curve(axes["E"], found, {"length_thinking": MODES["thinking"], "length_chat": MODES["chat"]})
    axes["E"].set(title="GRPO: length of completions", ylabel="tokens", ylim=(0, None))
    for axis in axes.values():
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    seeds = len({run["seed"] for run in found["runs"]})
    title = f"{found['runs'][0]['parameters']:,} parameters   ·   seeds (faint): {seeds}   ·   strong: their mean"
    return save(figure, Path(path) if path else results.with_name(FILE), title, dpi=100)


def _accuracy(axis: Any, found: Results) -> None:
    """A point for each seed, a bar for their mean, at temperature 1."""
    tasks, names = found["runs"][0]["tasks"], recipes(found)
    width = 0.8 / (2 * len(names))
    for place, task in enumerate(tasks):
        for i, name in enumerate(names):
            for j, (mode, (colour, label)) in enumerate(MODES.items()):
                values = scores(found, name, mode, task, 1.0)
                if values:
                    x = place - 0.4 + (2 * i + j + 0.5) * width
                    mean = sum(values) / len(values)
                    named = f"{name}: {label}" if place == 0 else None
                    axis.bar(x, mean, 0.9 * width, color=colour, alpha=0.35 + 0.45 * i / len(names), label=named)
                    axis.scatter([x] * len(values), values, s=9, color=GREY, zorder=3)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set(title="Held-out accuracy at temperature 1 (dots: seeds)", ylim=(0, 1.35), ylabel="share answered right")
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.legend(ncols=2, frameon=False, fontsize=8, loc="upper right")


def _exams(axis: Any, found: Results) -> None:
    """Held-out accuracy, mean over tasks, on the way through GRPO."""
    for mode, (colour, label) in MODES.items():
        lines = []
        for run in _rewarded(found):
            points = [(exam["step"], exam[f"accuracy_{mode}"]) for exam in run["curves"]["exams"]]
            axis.plot(*zip(*points), color=colour, alpha=0.3, linewidth=0.9)
            lines.append([y for _, y in points])
        if lines:
            steps = [x for x, _ in points]
            axis.plot(steps, _mean(lines), color=colour, marker="o", markersize=3, label=label)
    axis.set(title="GRPO: held-out accuracy, mean of tasks", xlabel="step", ylabel="share answered right", ylim=(0, 1))


def _curve(axis: Any, found: Results, curves: dict[str, tuple[str, str]]) -> None:
    for name, (colour, label) in curves.items():
        lines = [run["curves"][name] for run in _rewarded(found)]
        for values in lines:
            axis.plot(range(1, len(values) + 1), smooth(values, 10), color=colour, alpha=0.3, linewidth=0.9)
        if lines:
            mean = smooth(_mean(lines), 10)
            axis.plot(range(1, len(mean) + 1), mean, color=colour, label=f"{label}: {mean[-1]:.3g} at the end")
    axis.set_xlabel("step")


def _rewarded(found: Results) -> list[dict[str, Any]]:
    return [run for run in found["runs"] if run["rewarded"]]


def _mean(lines: Sequence[Sequence[float]]) -> list[float]:
    """Step by step, as far as all lines go."""
    return [sum(values) / len(values) for values in zip(*lines)]
