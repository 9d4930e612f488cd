"""reasoning.png, from reasoning.json alone: what each study's arms answer right, and how rewards and replay went.

Bars are means over tasks and seeds at temperature 1, with the 95 % interval over seeds; dots are seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ...model.folders import read_json
from ..evaluate.verdict import half_width
from ..plots.style import BLUE, GREY, ORANGE, canvas, save, smooth
from .record import Record
from .report import shares

FILE = "reasoning.png"
COLOUR = {"thinking": BLUE, "chat": ORANGE}
SAID = {"thinking": "visible working", "chat": "answer at once"}
STEPS = 10  # of a running mean


def draw(results: Path | str, path: Path | str | None = None) -> Path:
    """Draws a reasoning.json to `path` (default: beside it).

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.patches import Patch

    found = read_json(Path(results))
    arms = {name: [run for run in found["runs"] if run["arm"] == name] for name in found["arms"]}
    rewarded = [name for name, runs in arms.items() if runs and "reward_thinking" in runs[0]["curves"]]
    figure = canvas(4.6 * max(len(found["studies"]), len(rewarded), 2), 7.6)
    above, below = figure.subfigures(2, 1)
    for axis, study in zip(above.subplots(1, len(found["studies"]), squeeze=False)[0], found["studies"]):
        _bars(axis, found, {name: arms[name] for name in study["arms"] if arms[name]})
        axis.set_title(study["title"], fontsize=10)
    for axis, name in zip(below.subplots(1, max(len(rewarded), 1), squeeze=False)[0], rewarded):
        _curves(axis, arms[name])
        axis.set_title(f"in training: {found['arms'][name]['label']}", fontsize=10)
    for axis in figure.axes:
        axis.grid(axis="y", alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(ylim=(0, 1), ylabel="share answered right")
    handles = [Patch(color=colour, alpha=0.75, label=SAID[mode]) for mode, colour in COLOUR.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return save(figure, Path(path) if path else Path(results).with_name(FILE), dpi=100)


def _bars(axis: Any, found: dict[str, Any], arms: dict[str, list[Record]]) -> None:
    for place, runs in enumerate(arms.values()):
        for j, mode in enumerate(COLOUR):
            values, x = shares(runs, mode), place + 0.4 * j - 0.2
            half = half_width(values) or 0.0
            axis.bar(x, fmean(values), 0.36, color=COLOUR[mode], alpha=0.75)
            axis.errorbar(x, fmean(values), half, color="black", capsize=3, linewidth=1)
            axis.scatter([x + 0.1] * len(values), values, s=9, color=GREY, zorder=3)
    axis.set_xticks(range(len(arms)), [found["arms"][name]["label"].replace(" ", "\n") for name in arms], fontsize=8)


def _curves(axis: Any, runs: Sequence[Record]) -> None:
    """Of every seed, faint, and their mean."""
    for mode, colour in COLOUR.items():
        lines = [run["curves"][f"reward_{mode}"] for run in runs if f"reward_{mode}" in run["curves"]]
        for values in lines:
            axis.plot(range(1, len(values) + 1), smooth(values, STEPS), color=colour, alpha=0.3, linewidth=0.8)
        mean = smooth([fmean(values) for values in zip(*lines)], STEPS)
        axis.plot(range(1, len(mean) + 1), mean, color=colour)
    axis.set_xlabel("step")
