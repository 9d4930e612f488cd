"""What all pictures share: colours, the canvas, and curves over the steps of a run.

records: the lines of a metrics.jsonl
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...model.disk import whole

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#595959"  # Okabe and Ito
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000", "#999999")


def canvas(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no display. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path, title: str = "", dpi: int = 110) -> Path:
    """Writes the figure, with a title above its panels; a PNG where the name says no other kind.

    Raises:
        OSError: a full disk, say; what picture there was is there still.
    """
    if title:
        figure.suptitle(title, fontsize=11, color=GREY)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as writing:
        figure.savefig(writing, dpi=dpi)
    return path


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float], width: int | None = None) -> list[float]:
    """The mean of the last `width` steps, by default a fiftieth of the run (at least 1), fewer at the start."""
    width = width or max(1, len(values) // 50)
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(values))]


def draw_line(
    axis: Any, records: list[dict[str, Any]], name: str, colour: str, label: str, width: int | None = None
) -> None:
    """A quantity of every step, faint, and its mean over the last `width`, whose last value the legend has."""
    steps, values = series(records, name)
    if steps:
        mean = smooth(values, width)
        axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(steps, mean, color=colour, label=f"{label}: {mean[-1]:.3g}")


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
                xs, smooth(ys), color=colour, label=f"{label(layer)}: {format(smooth(ys)[-1], digits)}", linewidth=1.3
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
