"""The picture of a benchmark, from its JSON alone: a row of panels for each shape and task, a bar per contender."""

import json
from pathlib import Path
from typing import Any

from ...plots.style import BLUE, GREEN, GREY, ORANGE, PINK, canvas, save

COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", GREY)
BOTH = "forward + backward"


def draw(path: Path | str, picture: Path | str | None = None) -> Path:
    """Draws the benchmark in the JSON file `path` to `picture` (default: beside it).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing was measured.
    """
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "milliseconds" in row:
            groups.setdefault((row["shape"], row["task"]), []).append(row)
    if not groups:
        raise ValueError("nothing was measured")
    names = list(dict.fromkeys(row["contender"] for rows in groups.values() for row in rows))
    colour = dict(zip(names, COLOURS * len(names)))
    figure = canvas(14, 1.4 + 3.1 * len(groups))
    axes = figure.subplots(len(groups), 3, squeeze=False)
    for line, ((shape, task), rows) in zip(axes, groups.items()):
        title = f"{shape} {task}"
        for axis, stage in zip(line, ("forward", BOTH)):
            if stage not in rows[0]["stages"]:
                axis.set_axis_off()
                continue
            unit = _rates(axis, rows, stage, colour)
            axis.set_title(f"{title}: {stage}, {unit}")
        _memory(line[2], rows, colour)
        what = "a training step, MiB (kept: dark)" if BOTH in rows[0]["stages"] else "a forward pass, MiB"
        line[2].set_title(f"{title}: peak of {what}")
        for axis in line:
            _tidy(axis)
    from matplotlib.patches import Patch

    handles = [Patch(color=colour[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False)
    return save(figure, Path(picture) if picture else Path(path).with_suffix(".png"), _title(result), dpi=100)


def _title(result: dict[str, Any]) -> str:
    machine, versions = (result["provenance"][key] for key in ("machine", "versions"))
    return "   ·   ".join(
        (
            f"abyssal bench {result['op']}",
            machine["name"],
            f"{machine['threads']} threads"
            if machine["device"] == "cpu"
            else f"torch {versions['torch']}, triton {versions['triton']}",
            result["dtype"],
            "median of turns; dashes: roofline limit",
            result["provenance"]["time"][:10],
        )
    )


def _rates(axis: Any, rows: list[dict[str, Any]], stage: str, colour: dict[str, str]) -> str:
    """Bars of useful work per second, the limit above each group."""
    key, scale, unit = "teraflops", 1.0, "TFLOP/s"
    if not rows[0]["stages"][stage]["flops"]:
        key, unit = "gigabytes_per_second", "GB/s"
    elif max(row["stages"][stage][key] for row in rows) < 1:
        scale, unit = 1e3, "GFLOP/s"
    for row, x, width in _places(axis, rows):
        found = row["stages"][stage]
        value = scale * found[key]
        axis.bar(x, value, 0.9 * width, color=colour[row["contender"]])
        axis.text(x, value, f"{value:.3g}", ha="center", va="bottom", fontsize=7)
        limit = value / found["share_of_limit"]
        if limit < 4 * max(scale * r["stages"][stage][key] for r in rows):
            axis.hlines(limit, x - width / 2, x + width / 2, color=GREY, linestyle="--", linewidth=1)
    return unit


def _memory(axis: Any, rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for row, x, width in _places(axis, rows):
        kept, peak = (row["memory"][key] / 2**20 for key in ("kept", "peak"))
        axis.bar(x, peak, 0.9 * width, color=colour[row["contender"]], alpha=0.4)
        axis.bar(x, kept, 0.9 * width, color=colour[row["contender"]])
        axis.text(x, peak, f"{peak:.3g}" if peak < 1000 else f"{peak:,.0f}", ha="center", va="bottom", fontsize=7)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if len(axis.get_yticks()) < 6 else (1,)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _places(axis: Any, rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, float]]:
    """Each row with the centre and width of its bar: a group for each length."""
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    groups = [[row for row in rows if row["tokens"] == n] for n in lengths]
    width = 0.85 / max(map(len, groups))
    axis.set_xticks(range(len(lengths)), [f"T = {n:,}" for n in lengths])
    return [
        (row, i + (j - (len(group) - 1) / 2) * width, width)
        for i, group in enumerate(groups)
        for j, row in enumerate(group)
    ]


def _tidy(axis: Any) -> None:
    axis.title.set_fontsize(10)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.06, y=0.12)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
