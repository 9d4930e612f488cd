"""The picture of a profile, from its JSON alone: stacked bars of both steps beside their limits, and the memory."""

import json
from pathlib import Path
from typing import Any

from ...plots.style import canvas, save

COLOURS = {
    "embedding": "#8c8c8c",
    "Engram": "#7b4ea3",
    "mHC": "#1a8a4b",
    "norms": "#8fd0a5",
    "projections": "#123f7c",
    "sliding attention": "#9dc3e6",
    "CSA attention": "#4a90d0",
    "HCA attention": "#2466ad",
    "compressor": "#35b4bd",
    "indexer": "#e08214",
    "index loss": "#f9c27a",
    "router": "#e6d437",
    "experts": "#c0392b",
    "shared expert": "#ef9a8d",
    "loss and head": "#8a5a36",
    "MTP": "#c77cb8",
    "optimizer": "#4d4d4d",
    "rest": "#d5d5d5",
}
LABELLED = 0.045  # of a panel's height: smaller pieces carry no name
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer\nstates",
    "kept": "kept for\nbackward",
}


def draw(path: Path | str, picture: Path | str | None = None) -> Path:
    """Draws the profile in the JSON file `path` to `picture` (default: beside it).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.patches import Patch

    result = json.loads(Path(path).read_text(encoding="utf-8"))
    training, decode = result["training"], result["decode"]
    figure = canvas(15, 8)
    axes = figure.subplots(1, 3, width_ratios=(3, 1.15, 2))
    _steps(axes[0], training, ("forward", "backward", "optimizer"))
    axes[0].set_title(f"Training step of {training['rows']} x {training['tokens']:,} tokens\n{_milliseconds(training)}")
    _steps(axes[1], decode, ("decode",))
    way = decode["path"].partition(" ")[0]
    axes[1].set_title(f"Token behind {decode['length']:,}, by {way}\n{_milliseconds(decode)}")
    _memory(axes[2], training)
    axes[2].set_title(f"Memory of the training step\npeak {training['memory']['peak'] / 2**20:,.0f} MiB")
    for axis, unit in zip(axes, ("ms", "ms", "MiB")):
        _tidy(axis, unit)
    shown = [name for name in COLOURS if name in training["mechanisms"] or name in decode["mechanisms"]]
    handles = [Patch(color=COLOURS[name], label=name) for name in reversed(shown)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return save(figure, Path(picture) if picture else Path(path).with_suffix(".png"), _title(result), dpi=100)


def _title(result: dict[str, Any]) -> str:
    preset, machine, versions = result["preset"], result["provenance"]["machine"], result["provenance"]["versions"]
    threads = "" if machine["device"].startswith("cuda") else f", {machine['threads']} threads"
    return "   ·   ".join(
        (
            f"abyssal profile {preset['name']}",
            f"{preset['parameters'] / 1e6:.1f} M parameters",
            f"{machine['name']}{threads}",
            f"torch {versions['torch']}, {preset['dtype']}",
            f"limits: {result['peak']['source']}",
            result["provenance"]["time"][:10],
        )
    )


def _milliseconds(step: dict[str, Any]) -> str:
    plain, parts = (step[kind]["total"] for kind in ("plain_ms", "parts_ms"))
    return f"{_number(plain)} ms, with instruments {_number(parts)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _steps(axis: Any, step: dict[str, Any], phases: tuple[str, ...]) -> None:
    """For each phase what was measured, and beside it the limit of the same work."""
    bars = []
    for phase in phases:
        found = {name: row["phases"][phase] for name, row in step["mechanisms"].items()}
        bars.append((phase if len(phases) > 1 else "measured", {name: cell["ms"] for name, cell in found.items()}))
        bars.append(("limit", {name: cell["limit_ms"] for name, cell in found.items()}))
    _stack(axis, bars)


def _memory(axis: Any, step: dict[str, Any]) -> None:
    rows = step["mechanisms"]
    _stack(axis, [(label, {name: row[kind] / 2**20 for name, row in rows.items()}) for kind, label in MEMORY.items()])


def _stack(axis: Any, bars: list[tuple[str, dict[str, float]]]) -> None:
    highest = max(sum(parts.values()) for _, parts in bars)
    for x, (label, parts) in enumerate(bars):
        bottom = 0.0
        for name, colour in COLOURS.items():
            value = parts.get(name, 0.0)
            axis.bar(x, value, 0.86, bottom, color=colour, alpha=0.75 if label == "limit" else 1.0, linewidth=0)
            if value > LABELLED * highest:
                ink = "white" if _is_dark(colour) else "black"
                axis.text(x, bottom + value / 2, _words(name), ha="center", va="center", fontsize=7.5, color=ink)
            bottom += value
        axis.text(x, bottom + 0.008 * highest, _number(bottom), ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(bars)), [label for label, _ in bars])
    axis.set_ylim(0, 1.05 * highest)


def _words(name: str) -> str:
    return name.replace(" ", "\n") if len(name) > 12 else name


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 140


def _tidy(axis: Any, unit: str) -> None:
    axis.title.set_fontsize(11)
    axis.tick_params(labelsize=9)
    axis.set_ylabel(unit)
    axis.margins(x=0.03)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
