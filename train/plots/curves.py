"""curves.png: how a run went, drawn from its metrics.jsonl alone, so that anyone can draw it again.

Five panels: bits per byte against the trigram model; the parts of the loss; expert load; residual streams; what the
indexer captures. Per-layer curves run from dark (first layer) to light (last). Faint lines are single steps,
strong ones a running mean.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..run import metrics

FILE = "curves.png"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"  # Okabe and Ito
PARTS = {
    "lm": (BLUE, "next byte"),
    "mtp": (ORANGE, "byte after next (MTP)"),
    "balance": (GREEN, "expert balance (no unit)"),
    "index": (PINK, "indexer KL"),
}


def plot(folder: Path | str, path: Path | str | None = None) -> Path:
    """Draws the run in `folder` to `path` (default `folder`/curves.png).

    Raises:
        FileNotFoundError: no metrics.jsonl in `folder`.
        ValueError: it holds no complete line yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    folder = Path(folder)
    records = metrics.read(folder)
    if not records:
        raise ValueError(f"{str(folder / metrics.FILE)!r} holds no step yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic("AAB;CDE")
    for name, panel in zip("ABCDE", _panels(records)):
        panel(axes[name], records)
        tidy(axes[name])
    figure.suptitle(_title(folder, records), fontsize=11, color=GREY)
    path = Path(path) if path else folder / FILE
    figure.savefig(path, dpi=110)
    return path


def _panels(records: list[dict[str, Any]]) -> tuple[Callable[[Any, list[dict[str, Any]]], None], ...]:
    """The large panel and four small ones, as the run's metrics ask for."""
    from ..reason import curves

    if any("reward" in record for record in records):
        return curves.reward, curves.distance, curves.entropy, curves.length, curves.limits
    scored = any("accuracy" in record for record in records)
    return curves.accuracy if scored else _bits, _losses, _load, _spread, _captured


def draw_line(
    axis: Any, records: list[dict[str, Any]], name: str, colour: str, label: str, width: int | None = None
) -> None:
    """A quantity of every step, faint, and its mean over the last `width`, whose last value the legend has."""
    steps, values = series(records, name)
    if steps:
        smooth = _smooth(values, width)
        axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(steps, smooth, color=colour, label=f"{label}: {smooth[-1]:.3g}")


def _title(folder: Path, records: list[dict[str, Any]]) -> str:
    last = records[-1]
    speed = sorted(record["tokens_per_second"] for record in records)[len(records) // 2]
    parts = (
        folder.resolve().name,
        f"{last['step']:,} steps",
        f"{last['tokens'] / 1e6:.2f} M bytes",
        f"{last['seconds'] / 60:.1f} min",
        f"{speed:,.0f} tokens/s (median)",
        f"peak memory {last['peak_memory_gib']:.2f} GiB",
    )
    return "   ·   ".join(parts)


def _bits(axis: Any, records: list[dict[str, Any]]) -> None:
    steps, nats = series(records, "lm")
    bits = [value / math.log(2) for value in nats]
    smooth = _smooth(bits)
    axis.plot(steps, bits, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color=BLUE, label=f"training text: {smooth[-1]:.3f} at the end")
    shown = [*smooth]
    steps, held_out = series(records, "held_out")
    if steps:
        trigram = series(records, "trigram")[1][-1]
        label = f"held-out text: {held_out[-1]:.3f} at the end"
        axis.plot(steps, held_out, color=ORANGE, marker="o", markersize=4, label=label)
        label = f"trigram model, same held-out bytes: {trigram:.3f}"
        axis.axhline(trigram, color=GREY, linestyle="--", linewidth=1.2, label=label)
        shown += [*held_out, trigram]
    axis.set_ylim(max(0, min(shown) - 0.3), max(max(shown[len(smooth) :], default=0), smooth[len(smooth) // 20]) + 0.3)
    axis.set(title="Compression: held-out text against a trigram model", ylabel="bits per byte")
    axis.legend(loc="upper right")


def _losses(axis: Any, records: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, (colour, label) in PARTS.items():
        if any(value > 0 for value in series(records, name)[1]):
            draw_line(axis, records, name, colour, label)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(title="Parts of the loss, unweighted", ylabel="nats per token (log scale)")
    legend_below(axis)


def _load(axis: Any, records: list[dict[str, Any]]) -> None:
    layers = len(records[-1].get("spread", []))
    draw_layers(axis, records, "load_max", lambda i: f"layer {i}" if i < layers else "MTP")
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1.2)
    axis.set(title="Expert load: busiest expert", ylabel="times the mean load (1 = balanced)")


def _spread(axis: Any, records: list[dict[str, Any]]) -> None:
    draw_layers(axis, records, "spread", lambda i: f"layer {i}")
    axis.set_ylim(0, None)
    axis.set(title="Residual streams: how far apart", ylabel="relative spread (0 = all alike)")


def _captured(axis: Any, records: list[dict[str, Any]]) -> None:
    draw_layers(axis, records, "captured", lambda i: f"CSA layer {i + 1}")
    axis.set_ylim(None, 1.005)
    axis.set(title="Indexer: attention mass that its picks hold", ylabel="share of mass on compressed entries")


def draw_layers(axis: Any, records: list[dict[str, Any]], name: str, label: Any, digits: str = ".2f") -> None:
    """One smoothed curve per layer, named in the legend with its last value."""
    import matplotlib

    steps, rows = series(records, name)
    count = max(map(len, rows), default=0)
    for layer in range(count):
        points = [(s, row[layer]) for s, row in zip(steps, rows) if layer < len(row) and row[layer] is not None]
        if points:
            xs, ys = zip(*points)
            colour = matplotlib.colormaps["viridis"](0.9 * layer / max(count - 1, 1))
            axis.plot(xs, ys, color=colour, alpha=0.15, linewidth=0.8)
            axis.plot(
                xs, _smooth(ys), color=colour, label=f"{label(layer)}: {format(_smooth(ys)[-1], digits)}", linewidth=1.3
            )
    if axis.lines:
        legend_below(axis)
    else:
        axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", color=GREY)


def legend_below(axis: Any) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3 if len(axis.get_lines()) > 8 else 2)


def tidy(axis: Any) -> None:
    axis.set_xlabel("step")
    axis.title.set_fontsize(11)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    legend = axis.get_legend()
    if legend:
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set_fontsize(9)


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float], width: int | None = None) -> list[float]:
    """The mean of the last `width` steps, by default a fiftieth of the run (at least 1), fewer at the start."""
    width = width or max(1, len(values) // 50)
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]
