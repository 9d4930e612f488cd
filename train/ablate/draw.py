"""The picture of a suite, from its JSON alone: bars with every seed's point, curves over steps, accuracy by distance.

Error bars and bands are 95 % intervals of the mean over seeds (Student's t); points are single seeds.
"""

import math
from itertools import cycle
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from ..evaluate.verdict import half_width
from ..plots.style import COLOURS, GREY, canvas, save
from .summary import read_summary, values_of

FLOOR: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
MARKERS = "osD^vPX"  # not as many as colours, so that more arms than these still differ


def _looks(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Colour, marker and results of every arm."""
    return list(zip(cycle(COLOURS), cycle(MARKERS), found["arms"].values()))


def draw(path: Path | str, picture: Path | str | None = None) -> Path:
    """Draws the suite in the JSON file `path` to `picture` (default: beside it).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: it is no suite's.
    """
    found = read_summary(Path(path))
    panels = found["panels"]
    ratios = [1.7 if panel["kind"] == "distance" else max(1.0, 0.33 * len(panel["measures"])) for panel in panels]
    figure = canvas(max(10.5, 4.4 * sum(ratios)), 5.0)
    axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    for axis, panel in zip(axes, panels):
        PANELS[panel["kind"]](axis, found, panel)
        axis.set_title(panel["title"], fontsize=11)
        axis.grid(axis="y", alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, found)
    return save(figure, Path(picture) if picture else Path(path).with_suffix(".png"), _title(found))


def _legend(figure: Any, found: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=2, label=arm["label"])
        for colour, marker, arm in _looks(found)
    ]
    if _floors(found):
        handles.append(Line2D([], [], label="best blind reader", **FLOOR))
    characters, line = sum(len(str(handle.get_label())) + 8 for handle in handles), 9 * figure.get_figwidth()
    rows = math.ceil(characters / line)
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / rows), frameon=False)


def _title(found: dict[str, Any]) -> str:
    scale = found["scale"]
    parameters = max(arm["parameters"] for arm in found["arms"].values())
    return "   ·   ".join(
        (
            f"abyssal ablate {found['suite']}",
            f"{scale['seeds']} seeds, 95 % intervals" if scale["seeds"] > 1 else "one seed",
            f"{scale['steps']:,} steps",
            f"up to {parameters / 1e6:.2g} M parameters",
            found["provenance"]["dates"][-1],
        )
    )


def _bars(axis: Any, found: dict[str, Any], panel: dict[str, Any]) -> None:
    """A group for each measure, a bar for each arm; an axis that does not start at 0 shows points instead of bars."""
    arms, measures = found["arms"], panel["measures"]
    labels = {measure["name"]: measure["label"] for measure in found["measures"]}
    every = [value for arm in arms.values() for name in measures for value in values_of(arm, name)]
    from_zero = not every or max(every) - min(every) > 0.25 * max(map(abs, every))
    for i, name in enumerate(measures):
        shown = [(colour, arm) for colour, _, arm in _looks(found) if values_of(arm, name)]
        for place, (colour, arm) in enumerate(shown):
            values = values_of(arm, name)
            x, mean = i + (place - (len(shown) - 1) / 2) * 0.8 / len(shown), fmean(values)
            wide = 0.7 / len(shown)
            if from_zero:
                axis.bar(x, mean, wide, color=colour, alpha=0.75)
            else:
                axis.hlines(mean, x - wide / 2, x + wide / 2, color=colour, linewidth=3)
            axis.errorbar(x, mean, half_width(values) or 0.0, color="black", capsize=4, linewidth=1.2)
            offsets = [wide * 0.25 * (k - (len(values) - 1) / 2) / max(1, len(values) - 1) for k in range(len(values))]
            axis.scatter([x + o for o in offsets], values, s=14, color="white", edgecolors="black", zorder=3)
    if len(measures) > 1:
        axis.set_xticks(
            range(len(measures)), [fill(labels[name], 15 if len(measures) > 2 else 20) for name in measures], fontsize=9
        )
    else:
        axis.set_xticks([])
    floors = _floors(found)
    for i, name in enumerate(measures):
        if (floor := name.replace("accuracy", "floor")) in floors:
            axis.plot([i - 0.5, i + 0.5], [floors[floor]] * 2, **FLOOR)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_ylabel(panel["axis"])
    axis.margins(x=0.15, y=0.12)
    if all(measure["percent"] for measure in found["measures"] if measure["name"] in measures):
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -0.04), min(high, 1.08))


def _curve(axis: Any, found: dict[str, Any], panel: dict[str, Any]) -> None:
    """Mean over seeds, single seeds faint. The first eighth, where all arms fall steeply, may leave the panel."""
    name, ends = panel["measures"][0], []
    for colour, _, arm in _looks(found):
        curves = [run["curves"][name] for run in arm["runs"] if name in run["curves"]]
        for curve in curves:
            axis.plot(*zip(*curve), color=colour, alpha=0.25, linewidth=0.8)
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [fmean(curve[i][1] for curve in curves) for i in range(min(map(len, curves)))]
            axis.plot(steps[: len(means)], means, color=colour, linewidth=1.8)
            ends += [curve[len(curve) // 8][1] for curve in curves] + [min(v for _, v in curve) for curve in curves]
    if ends:
        room = 0.05 * (max(ends) - min(ends))
        axis.set_ylim(min(ends) - room, max(ends) + room)
    axis.set(xlabel="step", ylabel=panel["axis"])


def _distance(axis: Any, found: dict[str, Any], panel: dict[str, Any]) -> None:
    """Measures named PREFIX.N over N, the least distance of a bin of powers of two; the window is marked."""
    prefix = panel["measures"][0]
    for colour, marker, arm in _looks(found):
        least = sorted(int(name.removeprefix(prefix + ".")) for name in arm["summary"] if name.startswith(prefix + "."))
        cells = [values_of(arm, f"{prefix}.{n}") for n in least]
        means = [fmean(values) for values in cells]
        middle = [n * 2**0.5 for n in least]
        errors = [half_width(values) or 0.0 for values in cells]
        axis.errorbar(middle, means, errors, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.6)
    window = found["scale"]["window"]
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.axvline(window, color=GREY, linestyle="--", linewidth=1.2)
    beside = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "center"}
    axis.text(window, 0.5, f"window {window}", color=GREY, **beside)
    at = prefix.replace("accuracy", "floor") + "."
    floors = {int(name.removeprefix(at)): value for name, value in _floors(found).items() if name.startswith(at)}
    if floors:
        least = sorted(floors)
        blind = [floors[n] for n in least]
        axis.plot([n * 2**0.5 for n in least], blind, **FLOOR)
    axis.set_ylim(-0.04, 1.08)
    axis.set(xlabel="tokens from the evidence to the question (log scale)", ylabel=panel["axis"])


def _floors(found: dict[str, Any]) -> dict[str, float]:
    """What the best blind readers score on the rows, the same in all runs, in the names of `accuracy`."""
    run = next(iter(found["arms"].values()))["runs"][0]
    return {name: value for name, value in run["measures"].items() if name.startswith("floor")}


PANELS = {"bars": _bars, "curve": _curve, "distance": _distance}
