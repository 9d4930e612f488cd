"""Tables and the page of results, from the suites' JSON alone: every number in them is computed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.disk import write_text
from .suite import Measure
from .summary import read_summary, values_of

HEAD = """# What held, and what did not

Written by `abyssal ablate --page` from the JSON beside the pictures; no number here is typed by hand. Every suite
compares arms that differ in one thing, over the same data, steps and learning rate, with several seeds. A verdict is
computed: a claim *holds* if the 95 % interval of the difference of the means (Welch's t) lies wholly on the claimed
side of zero, *does not hold* if it lies on the other side, and is *undecided* if zero is inside. `±` is the sample
standard deviation over seeds. All of this is toy scale: a verdict says what happened here, not what happens in a large
model.
"""


def table(found: dict[str, Any]) -> str:
    """Mean and spread of every measure by arm, then the claims, as lines for a terminal."""
    rows = [("", *(arm["label"] for arm in found["arms"].values())), _parameters(found)]
    rows += [(measure.label, *_cells(found, measure)) for measure in _measures(found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([found["question"], "", *lines, "", *(_claim(claim, found) for claim in found["claims"])])


def write_page(folder: Path, page: Path, order: Sequence[str]) -> Path:
    """Writes `page` (Markdown) from the JSON of the suites in `folder`, in the given order.

    Raises:
        FileNotFoundError: `folder` holds none of them.
    """
    paths = [folder / f"{name}.json" for name in order if (folder / f"{name}.json").is_file()]
    if not paths:
        raise FileNotFoundError(f"{str(folder)!r} holds no results of {', '.join(order)}")
    every = [read_summary(path) for path in paths]
    pictures = Path(os.path.relpath(folder, page.parent))
    write_text(page, "\n".join([HEAD, _overview(every), *(_section(found, pictures) for found in every)]))
    return page


def _overview(every: Sequence[dict[str, Any]]) -> str:
    lines = ["| suite | claim | verdict |", "| --- | --- | --- |"]
    for found in every:
        lines += [
            f"| [{found['suite']}](#{found['suite']}) | {claim['text']} | **{claim['verdict']['word']}** |"
            for claim in found["claims"]
        ]
    return "\n".join(lines) + "\n"


def _section(found: dict[str, Any], pictures: Path) -> str:
    arms = found["arms"]
    lines = [
        f"## {found['suite']}\n",
        f"**{found['title']}.** {found['question']}\n",
        f"![{found['title']}]({(pictures / found['suite']).as_posix()}.png)\n",
        "| | " + " | ".join(arm["label"] for arm in arms.values()) + " |",
        "| --- |" + " --- |" * len(arms),
        "| " + " | ".join(_parameters(found)) + " |",
        *("| " + " | ".join((m.label, *_cells(found, m))) + " |" for m in _measures(found)),
        "",
        *(f"- {_claim(claim, found)}" for claim in found["claims"]),
        "",
        f"*Scale.* {_scale(found)}\n",
        f"*What this cannot tell.* {found['caveat']}\n",
        f"*Arms.* {_arms(found)}\n",
    ]
    return "\n".join(lines)


def _measures(found: dict[str, Any]) -> list[Measure]:
    """Those that a run of some arm has."""
    measures = [Measure(**measure) for measure in found["measures"]]
    return [m for m in measures if any(values_of(arm, m.name) for arm in found["arms"].values())]


def _parameters(found: dict[str, Any]) -> tuple[str, ...]:
    return ("parameters", *(f"{arm['parameters']:,}" for arm in found["arms"].values()))


def _cells(found: dict[str, Any], measure: Measure) -> list[str]:
    """Mean ± deviation; how many runs it is of, where not of all."""
    cells = []
    for arm in found["arms"].values():
        values = values_of(arm, measure.name)
        if not values:
            cells.append("-")
            continue
        spread = arm["summary"][measure.name]
        text = measure.show(spread["mean"])
        if spread["deviation"] is not None:
            text += f" ± {measure.show(spread['deviation'])}"
        missing = len(arm["runs"]) - len(values)
        cells.append(text + (f" ({missing} never)" if missing else ""))
    return cells


def _claim(claim: dict[str, Any], found: dict[str, Any]) -> str:
    measure = next(m for m in _measures(found) if m.name == claim["measure"])
    verdict = claim["verdict"]
    text = f"{claim['text']}: **{verdict['word']}**"
    if verdict["difference"] is None:
        return f"{text} ({verdict['note']} have the number)"
    sign = "+" if verdict["difference"] >= 0 else ""
    text += f" ({measure.label}: {sign}{measure.show(verdict['difference'])}"
    if verdict["interval"]:
        text += f", 95 % interval {' to '.join(map(measure.show, verdict['interval']))}"
    return text + ")"


def _scale(found: dict[str, Any]) -> str:
    scale, origin = found["scale"], found["provenance"]
    commits = ", ".join(commit[:7] for commit in origin["commits"])
    dirty = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    return (
        f"{scale['seeds']} seeds, {scale['runs']} runs, each {scale['steps']:,} steps and {scale['tokens']:,} targets"
        f" from recipe `{scale['recipe']}` (learning rate {scale['learning_rate']:g});"
        f" {scale['cpu_minutes']:g} minutes of training on {', '.join(origin['machines'])}, one thread a run;"
        f" commit {commits}{dirty};"
        f" {', '.join(origin['dates'])}; `abyssal ablate {found['suite']} --{found['size']}`."
        f" {'; '.join(origin['data'])}."
    )


def _arms(found: dict[str, Any]) -> str:
    told = []
    for arm in found["arms"].values():
        changes = [f"`{change}`" for change in arm["set"]] + [f"without `{key}`" for key in arm["without"]]
        changes += [f"variant *{arm['variant']}*"] if arm["variant"] != "as configured" else []
        told.append(f"{arm['label']}: {', '.join(changes) or 'the recipe'}")
    return "; ".join(told) + "."
