"""mechanisms.png: what `observe.py` measured during a run, drawn from its metrics.jsonl alone.

Six panels: gradient norms and relative updates by family of parameters; how far the mixing matrices are from doubly
stochastic, site by site; the composite gain of the streams; the indexer's recall; Engram's gate and collisions.
"""

from pathlib import Path
from typing import Any

from ..run import metrics
from .style import BLUE, GREEN, GREY, ORANGE, PINK, canvas, draw_layers, legend_below, save, series, tidy

FILE = "mechanisms.png"
MARKED = {"marker": "o", "markersize": 2.5, "linewidth": 1.2}


def plot_mechanisms(folder: Path | str, path: Path | str | None = None) -> Path | None:
    """Draws the run in `folder` to `path` (default `folder`/mechanisms.png); None if nothing was observed in it.

    Raises:
        FileNotFoundError: no metrics.jsonl in `folder`.
        ModuleNotFoundError: matplotlib is not installed.
    """
    folder = Path(folder)
    records = [record for record in metrics.read(folder) if "grad_by" in record]
    if not records:
        return None
    figure = canvas(14, 8.5)
    for axis, panel in zip(figure.subplots(2, 3).flat, (_gradients, _updates, _sinkhorn, _gain, _recall, _engram)):
        panel(axis, records)
        tidy(axis)
    title = f"{folder.resolve().name}   ·   measured on {len(records)} steps"
    return save(figure, Path(path) if path else folder / FILE, title)


def _gradients(axis: Any, records: list[dict[str, Any]]) -> None:
    _families(axis, records, "grad_by")
    axis.set(title="Gradient norm, before clipping", ylabel="norm (log scale)")


def _updates(axis: Any, records: list[dict[str, Any]]) -> None:
    _families(axis, records, "update_by")
    axis.set(title="Update of a step, relative to the weights", ylabel="|w' - w| / |w| (log scale)")


def _families(axis: Any, records: list[dict[str, Any]], name: str) -> None:
    import matplotlib

    names = sorted({family for record in records for family in record.get(name, {})})
    for i, family in enumerate(names):
        points = [(r["step"], r[name][family]) for r in records if r.get(name, {}).get(family)]
        if points:
            axis.plot(*zip(*points), color=matplotlib.colormaps["tab20"](i), label=family, **MARKED)
    axis.set_yscale("log")
    legend_below(axis)


def _sinkhorn(axis: Any, records: list[dict[str, Any]]) -> None:
    draw_layers(axis, records, "sinkhorn", lambda i: f"{'attn' if i % 2 == 0 else 'ffn'} {i // 2}", digits="#.1e")
    axis.set_yscale("log")
    axis.set(title="mHC: largest |row or column sum - 1|", ylabel="deviation (log scale)")


def _gain(axis: Any, records: list[dict[str, Any]]) -> None:
    steps, gains = series(records, "gain")
    for column, (label, colour) in enumerate((("forward", BLUE), ("backward", ORANGE))):
        values = [gain[column] for gain in gains]
        axis.plot(steps, values, color=colour, label=f"{label}: {values[-1]:.4f} at the end", **MARKED)
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1.2)
    axis.set(title="mHC: gain of all mixing matrices together", ylabel="largest sum (1 = doubly stochastic)")
    legend_below(axis)


def _recall(axis: Any, records: list[dict[str, Any]]) -> None:
    draw_layers(axis, records, "recall", lambda i: f"CSA layer {i + 1}")
    axis.set(title="Indexer: share of the attention's own top k", ylabel="recall", ylim=(0, 1.02))


def _engram(axis: Any, records: list[dict[str, Any]]) -> None:
    for name, label, colours in (("gate", "mean gate", (BLUE, GREEN)), ("collisions", "collisions", (ORANGE, PINK))):
        steps, rows = series(records, name)
        for layer in range(max(map(len, rows), default=0)):
            values = [row[layer] for row in rows]
            axis.plot(steps, values, color=colours[layer % 2], label=f"{label} {layer + 1}: {values[-1]:.2f}", **MARKED)
    axis.set(title="Engram", ylabel="share", ylim=(0, 1.02))
    if axis.lines:
        legend_below(axis)
    else:
        axis.text(0.5, 0.5, "no Engram in this run", transform=axis.transAxes, ha="center", color=GREY)
