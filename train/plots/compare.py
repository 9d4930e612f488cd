"""compare.png: runs in one picture, a colour each, drawn from their files; and what they came to, in words.

A panel for each quantity that any of them has: training loss (or reward), held-out scores, learning rate.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from ...model.accounting import counted
from ..run import metrics, opponents, provenance
from ..settings import PLANTED
from .style import COLOURS, GREY, canvas, save, smooth, tidy

FILE = Path("compare.png")
AXES: dict[str, Callable[[dict[str, Any]], float]] = {
    "step": lambda record: record["step"],
    "tokens": lambda record: record["tokens"],
    "time": lambda record: record["seconds"] / 60,
}
UNITS = {"step": "step", "tokens": "tokens", "time": "minutes of training"}
SCORES = {
    "held_out": ("Held-out text", "bits per byte"),
    "answers": ("Held-out answers", "bits per token"),
    "accuracy": ("Held-out questions answered right", "share"),
}
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Finished:
    """A run as its files tell it."""

    name: str
    records: list[dict[str, Any]]
    recipe: dict[str, Any]
    parameters: int
    compared: dict[str, Any]

    def scores(self, kind: str) -> list[str]:
        """Metrics that begin with `kind` and are a number somewhere."""
        found = {name: 0 for record in self.records for name, value in record.items() if isinstance(value, int | float)}
        return [name for name in found if name.startswith(kind)]

    def series(self, name: str, by: str = "step") -> tuple[list[float], list[float]]:
        found = [(AXES[by](record), record[name]) for record in self.records if record.get(name) is not None]
        return [x for x, _ in found], [y for _, y in found]

    @property
    def opponent(self) -> tuple[str, float] | None:
        """An n-gram model of all training text and its bits per byte, of order 5 where the run has been compared."""
        if self.compared:
            return "5-gram model (KN)", opponents.bits(self.compared, "KN-5")
        trigrams = self.series("trigram")[1]
        return ("trigram model", trigrams[-1]) if trigrams else None

    @property
    def in_bytes(self) -> bool:
        data = self.recipe["data"]
        learns_text = not ({"reason", "chat"} & self.recipe.keys() or data["source"].startswith(PLANTED))
        return learns_text and data["tokenizer"] == "bytes"


Coloured = Sequence[tuple[Finished, Any]]


def read(folders: Sequence[Path]) -> list[Finished]:
    """The runs in the folders, each named by what its path has for itself.

    Raises:
        FileNotFoundError: a folder that holds no run.
        ValueError: fewer than two, one twice, or one that has not made a step yet.
    """
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < max(2, len(paths)):
        raise ValueError(f"runs={', '.join(map(str, folders))}: allowed are two or more different folders")
    found = []
    for name, folder in zip(_names(paths), folders):
        records, last = metrics.read(folder), provenance.starts(folder)[-1]
        if not records:
            raise ValueError(f"{str(folder / metrics.FILE)!r} holds no step yet")
        found.append(Finished(name, records, last["recipe"], last["parameters"], opponents.read(folder)))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """What is left of the paths without the folders, and the first words of a name, that all have."""
    parts = _without_ends([list(path.parts) for path in paths])
    words = _without_ends([re.split(r"(?<=[-_])", "/".join(part)) for part in parts], tail=False)
    return ["".join(word) for word in words]


def _without_ends(lists: list[list[str]], tail: bool = True) -> list[list[str]]:
    """Without what all begin with, and (`tail`) all end with; at least one is left of each."""
    for first in (0, -1) if tail else (0,):
        while min(map(len, lists)) > 1 and len({parts[first] for parts in lists}) == 1:
            lists = [parts[1:] if first == 0 else parts[:-1] for parts in lists]
    return lists


def draw(runs: Sequence[Finished], path: Path = FILE, by: str = "step") -> Path:
    """Draws their curves over steps, tokens or time.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    panels = list(_panels(runs))
    figure = canvas(5.2 * len(panels), 4.6 + 0.2 * math.ceil(len(runs) / 4))
    colours = COLOURS if len(runs) <= len(COLOURS) else matplotlib.colormaps["tab20"](range(20))
    coloured = list(zip(runs, cycle(colours)))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axis, coloured, by)
        tidy(axis)
        axis.set(xlabel=UNITS[by], xlim=(0, None))
        if by == "tokens":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    handles = [Line2D([], [], color=colour, label=run.name) for run, colour in coloured]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
    return save(figure, path)


def _panels(runs: Sequence[Finished]) -> Iterator[Callable[[Any, Coloured, str], None]]:
    if any(run.scores("lm") for run in runs):
        in_bytes = all(run.in_bytes for run in runs)
        title, label, unit = ("text", "bits per byte", 1 / math.log(2)) if in_bytes else ("loss", "nats per token", 1)
        yield partial(_curves, "lm", f"Training {title}", label, unit)
    if any(run.scores("reward") for run in runs):
        yield partial(_curves, "reward", "Reward of the rollouts", "reward", 1)
    yield from (partial(_scores, kind) for kind in SCORES if any(run.scores(kind) for run in runs))
    yield _rates


def _curves(name: str, title: str, label: str, unit: float, axis: Any, runs: Coloured, by: str) -> None:
    """Every step faint, a running mean strong; what the mean was in the first tenth may lie outside."""
    shown: list[float] = []
    for run, colour in runs:
        xs, ys = run.series(name, by)
        ys = [unit * y for y in ys]
        mean = smooth(ys)
        axis.plot(xs, ys, color=colour, alpha=0.15, linewidth=0.8)
        axis.plot(xs, mean, color=colour)
        shown += mean[len(mean) // 10 :]
    room = 0.05 * (max(shown) - min(shown) or 1)
    axis.set(title=title, ylabel=label, ylim=(min(shown) - 3 * room, max(shown) + room))


def _scores(kind: str, axis: Any, runs: Coloured, by: str) -> None:
    for run, colour in runs:
        for name, style in zip(run.scores(kind), STYLES):
            axis.plot(*run.series(name, by), color=colour, linestyle=style, marker="o", markersize=3.5)
    others = [(run.opponent, colour) for run, colour in runs if run.opponent and kind == "held_out"]
    for (_, bits), colour in others:
        axis.axhline(bits, color=colour if len(dict(others)) > 1 else GREY, linestyle="--", linewidth=1)
    title, unit = SCORES[kind]
    axis.set(title=title, ylabel=unit)
    for label in dict.fromkeys(label for (label, _), _ in others):
        axis.plot([], [], color=GREY, linestyle="--", linewidth=1, label=label)
    names = max((run.scores(kind) for run, _ in runs), key=len)
    for name, style in zip(names, STYLES) if len(names) > 1 else ():
        axis.plot([], [], color=GREY, linestyle=style, label=name.removeprefix(f"{kind}_").replace("_", " "))
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def _rates(axis: Any, runs: Coloured, by: str) -> None:
    for run, colour in runs:
        axis.plot(*run.series("lr", by), color=colour)
    axis.set(title="Learning rate", ylim=(0, None))


def table(runs: Sequence[Finished]) -> str:
    """What each run came to, and below it the keys in which their recipes differ."""
    scores = dict.fromkeys(
        name for run in runs for kind in (*SCORES, "clean", "trigram", "reward") for name in run.scores(kind)
    )
    rows = [("", "steps", "tokens", "minutes", "parameters", *(name.replace("_", " ") for name in scores))]
    for run in runs:
        last, ends = run.records[-1], [run.series(name)[1][-1:] for name in scores]
        reached = f"{last['step']:,}", f"{last['tokens']:,}", f"{last['seconds'] / 60:.1f}", counted(run.parameters)
        rows.append((run.name, *reached, *(f"{end[0]:.4f}" if end else "-" for end in ends)))
    changed = [("", *(run.name for run in runs)), *_differences("", [run.recipe for run in runs])]
    differ = f"recipes differ in\n{_aligned(changed)}" if changed[1:] else "their recipes are the same"
    return f"{_aligned(rows)}\n\n{differ}"


def _differences(prefix: str, values: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """Key and values, a row for each key that is not the same everywhere; a table that some lack is a key."""
    if all(isinstance(value, dict) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            if prefix or key != "name":
                yield from _differences(f"{prefix}.{key}" if prefix else key, [value.get(key) for value in values])
    elif any(value != values[0] for value in values):
        yield prefix, *map(_cell, values)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "given"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} given"
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers, behind one of words."""
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join((f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths)))).rstrip()
        for name, *cells in rows
    )
