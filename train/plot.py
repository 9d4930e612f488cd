"""curves.png: how a run went, drawn from its metrics.jsonl alone, so that anyone can draw it again.

Six panels: held-out bits per byte against the trigram model; the loss parts; learning rate and gradient norm; expert
load; residual streams; what the indexer captures. Per-layer curves run from dark (first layer) to light (last).
"""

import math
from pathlib import Path
from typing import Any

from . import metrics

FILE = "curves.png"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"  # Okabe and Ito
PARTS = {"lm": (BLUE, "next byte (lm)"), "mtp": (ORANGE, "byte after next (mtp)")}
EXTRAS = {"balance": (GREEN, "expert balance"), "index": (PINK, "indexer KL")}


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

    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    panels = (_held_out, _losses, _optimizer, _load, _spread, _captured)
    for axis, panel in zip(axes.flat, panels):
        panel(axis, records)
        _tidy(axis)
    figure.suptitle(_title(folder, records), fontsize=12, x=0.01, ha="left")
    path = Path(path) if path else folder / FILE
    figure.savefig(path, dpi=120)
    return path


def _title(folder: Path, records: list[dict[str, Any]]) -> str:
    last = records[-1]
    speed = sorted(r["tokens_per_second"] for r in records)[len(records) // 2]
    parts = (
        folder.resolve().name,
        f"{last['step']:,} steps",
        f"{last['tokens'] / 1e6:.2f} M bytes",
        f"{last['seconds'] / 60:.1f} min",
        f"{speed:,.0f} tokens/s (median)",
        f"peak {last['peak_memory_gib']:.2f} GiB",
    )
    return "   ·   ".join(parts)


def _held_out(axis: Any, records: list[dict[str, Any]]) -> None:
    steps, bits = _series(records, "lm")
    axis.plot(steps, [value / math.log(2) for value in bits], color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, [value / math.log(2) for value in _smooth(bits)], color=BLUE, label="training (smoothed)")
    steps, bits = _series(records, "held_out")
    values = list(bits)
    if steps:
        axis.plot(steps, bits, color=ORANGE, marker="o", markersize=4, label=f"held out: {bits[-1]:.3f} at the end")
        trigram = next(r["trigram"] for r in reversed(records) if "trigram" in r)
        axis.axhline(trigram, color=GREY, linestyle="--", linewidth=1.2, label=f"trigram, same bytes: {trigram:.3f}")
        values.append(trigram)
    lowest = min(values + [r["lm"] / math.log(2) for r in records])
    axis.set_ylim(max(0, lowest - 0.3), None)
    axis.set(title="Compression of text", ylabel="bits per byte")
    axis.legend()


def _losses(axis: Any, records: list[dict[str, Any]]) -> None:
    for name, (colour, label) in {**PARTS, **EXTRAS}.items():
        steps, values = _series(records, name)
        if any(value > 0 for value in values):
            axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            axis.plot(steps, _smooth(values), color=colour, label=f"{label}: {_smooth(values)[-1]:.3g}")
    axis.set_yscale("log")
    axis.set(title="Loss parts, unweighted", ylabel="nats (log scale)")
    axis.legend()


def _optimizer(axis: Any, records: list[dict[str, Any]]) -> None:
    steps, norms = _series(records, "grad_norm")
    axis.plot(steps, norms, color=PINK, alpha=0.25, linewidth=0.8)
    axis.plot(steps, _smooth(norms), color=PINK)
    axis.set_yscale("log")
    axis.set(title="Optimizer")
    axis.set_ylabel("gradient norm before clipping (log scale)", color=PINK)
    other = axis.twinx()
    other.plot(*_series(records, "lr"), color=GREEN, linestyle="--")
    other.set_ylabel("learning rate", color=GREEN)
    other.set_ylim(0, None)
    other.spines[["top", "left"]].set_visible(False)


def _load(axis: Any, records: list[dict[str, Any]]) -> None:
    _layers(axis, records, "load_max")
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1.2)
    axis.set(title="Expert load: busiest over mean", ylabel="ratio (1 = balanced)")


def _spread(axis: Any, records: list[dict[str, Any]]) -> None:
    _layers(axis, records, "spread")
    axis.set_ylim(0, None)
    axis.set(title="Residual streams: distance from one another", ylabel="relative spread (0 = all alike)")


def _captured(axis: Any, records: list[dict[str, Any]]) -> None:
    _layers(axis, records, "captured", kind="CSA layer")
    axis.set_ylim(None, 1)
    axis.set(title="Indexer: attention mass that its picks hold", ylabel="share of mass on compressed entries")


def _layers(axis: Any, records: list[dict[str, Any]], name: str, kind: str = "layer") -> None:
    """One smoothed curve per layer, each named in the legend with its last value."""
    import matplotlib

    steps, rows = _series(records, name)
    count = max(map(len, rows), default=0)
    if not count:
        axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", color=GREY)
        return
    for layer in range(count):
        points = [(s, row[layer]) for s, row in zip(steps, rows) if layer < len(row) and row[layer] is not None]
        if points:
            xs, ys = zip(*points)
            colour = matplotlib.colormaps["viridis"](0.9 * layer / max(count - 1, 1))
            axis.plot(xs, _smooth(ys), color=colour, label=f"{kind} {layer}: {_smooth(ys)[-1]:.2f}", linewidth=1.3)
    axis.legend(ncols=2 if count > 4 else 1)


def _tidy(axis: Any) -> None:
    axis.set_xlabel("step")
    axis.title.set_fontsize(11)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    legend = axis.get_legend()
    if legend:
        for text in legend.get_texts():
            text.set_fontsize(8)
        legend.get_frame().set(alpha=0.8, linewidth=0)


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Any) -> list[float]:
    """A running mean over the last fiftieth of the run (at least 1 step), shorter at the start."""
    width = max(1, len(values) // 50)
    return [sum(part) / len(part) for part in (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))]
