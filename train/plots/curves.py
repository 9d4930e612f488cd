"""curves.png: how a run went, drawn from its files alone (metrics.jsonl, opponents.json), so that anyone can draw it.

Five panels: bits per byte, against what else training text can tell of the same held-out bytes; the parts of the loss;
expert load; residual streams; what the indexer captures. Per-layer curves run from dark (first layer) to light (last).
Faint lines are single steps, strong ones a running mean.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..run import metrics, opponents, provenance
from . import rewards
from .style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    canvas,
    draw_layers,
    draw_line,
    legend_below,
    save,
    series,
    smooth,
    tidy,
)

FILE = "curves.png"
PARTS = {
    "lm": (BLUE, "next {0}"),
    "mtp": (ORANGE, "{0} after next (MTP)"),
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
    for number, record in enumerate(records, 1):
        missing = [name for name in metrics.OF_ALL if record.get(name) is None]
        if missing:
            raise ValueError(f"{str(folder / metrics.FILE)!r}: line {number} has no {missing[0]}")
    figure, width = canvas(14, 8), provenance.bytes_per_token(folder)
    axes = figure.subplot_mosaic("AAB;CDE")
    for name, panel in zip("ABCDE", _panels(records, opponents.read(folder), width)):
        panel(axes[name], records)
        tidy(axes[name])
    return save(figure, Path(path) if path else folder / FILE, _title(folder, records, width))


def _panels(
    records: list[dict[str, Any]], compared: dict[str, Any], width: float
) -> tuple[Callable[[Any, list[dict[str, Any]]], None], ...]:
    """The large panel and four small ones, as the run's metrics ask for; `width`: bytes of a token."""
    if any("reward" in record for record in records):
        return rewards.reward, rewards.distance, rewards.entropy, rewards.length, rewards.limits
    scored = any("accuracy" in record for record in records)
    answers = any("answers" in record for record in records)
    bits, losses = partial(_bits, compared, width), partial(_losses, width)
    return rewards.accuracy if scored else rewards.answers if answers else bits, losses, _load, _spread, _captured


def _title(folder: Path, records: list[dict[str, Any]], width: float) -> str:
    last = records[-1]
    speed = sorted(record["tokens_per_second"] for record in records)[len(records) // 2]
    parts = (
        folder.resolve().name,
        f"{last['step']:,} steps",
        f"{last['tokens'] / 1e6:.2f} M {_unit(width)}s",
        f"{last['seconds'] / 60:.1f} min",
        f"{speed:,.0f} tokens/s (median)",
        f"peak memory {last['peak_memory_gib']:.2f} GiB",
    )
    return "   ·   ".join(parts)


def _unit(width: float) -> str:
    return "byte" if width == 1 else "token"


def _bits(compared: dict[str, Any], width: float, axis: Any, records: list[dict[str, Any]]) -> None:
    steps, nats = series(records, "lm")
    bits = [value / math.log(2) / width for value in nats]
    mean = smooth(bits)
    axis.plot(steps, bits, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, mean, color=BLUE, label=f"training text: {mean[-1]:.3f} at the end")
    shown = [mean[len(mean) // 20], min(mean)]
    for name, label, style in (("held_out", "held-out text", "-"), ("clean", "its clean bytes alone", ":")):
        steps, values = series(records, name)
        if steps:
            label = f"{label}: {values[-1]:.3f} at the end"
            axis.plot(steps, values, style, color=ORANGE, marker="o", markersize=4, label=label)
            shown += values
    for height, label, style in _lines(compared, records):
        axis.axhline(height, color=GREY, linestyle=style, linewidth=1.2, label=f"{label}: {height:.3f}")
        shown.append(height)
    if curve := compared.get("curve"):
        label = f"5-gram model (KN) of what was read: {curve[-1]['held_out']:.3f} at the end"
        steps, values = series(curve, "held_out")
        axis.plot(steps, values, color=GREEN, marker="s", markersize=4, label=label)
    axis.set_ylim(max(0, min(shown) - 0.3), max(shown) + 0.3)
    axis.set(title="Compression: held-out text against other models of it", ylabel="bits per byte")
    axis.legend(loc="upper right")


def _lines(compared: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[tuple[float, str, str]]:
    """What all training text makes of the same held-out bytes."""
    if compared:
        given = f"{compared['training']['all'] / 1e6:.2f} MB"
        yield opponents.bits(compared, "KN-5"), f"5-gram model (KN) of {given}", "--"
        yield opponents.bits(compared, "xz"), f"xz after {given}", "-."
    elif trigrams := series(records, "trigram")[1]:
        yield trigrams[-1], "trigram model, same held-out bytes", "--"


def _losses(width: float, axis: Any, records: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for name, (colour, label) in PARTS.items():
        if any(value > 0 for value in series(records, name)[1]):
            draw_line(axis, records, name, colour, label.format(_unit(width)))
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
