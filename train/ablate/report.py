"""Tables and the page of results, from the suites' JSON alone: every number in them is computed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.disk import write_text
from ...model.folders import read_json
from ..evaluate.verdict import holm
from .floors import table as floor_table
from .suite import Measure
from .summary import read_summary, values_of

HEAD = """# What held, and what did not

Written by `abyssal ablate --page` from the JSON beside the pictures; no number here is typed by hand. Every suite
compares arms that differ in one thing, over the same data and learning rate, in the same steps or, where it says so,
in the same time, with several seeds. Claims, measures and seeds stand in `train/ablate/suites/`, committed before the
first run, or, where one of them was added later, the suite says so: every run names its commit, and none has
uncommitted changes.

A verdict is computed from the differences between runs of the same seed (`train/evaluate/verdict.py`): the effect
with its 95 % interval, over seeds and, between arms that answer, over the rows of questions too, but not over other
text; p after Holm's correction for all {claims} claims of this page that have two seeds or more. A claim *holds*
where p is below 5 % and the effect lies on the claimed side, *does not hold* where it lies on the other, and is
*undecided* else. `±` is the sample standard deviation over seeds. Seconds of a run are by the wall, whatever else the
machine did; equal time is by seconds of the processor (`train/ablate/clock.py`). All of this is toy scale: a verdict
says what happened here, not what happens in a large model.
"""


FLOORS = """What is answered right without the question: by readers who know how rows are made and all that stands
before a question, but not what it asks for (`train/data/planted/blind.py`), on the very rows that models are scored
on. A model has found nothing that it does not have above them. Of recall, mqar and ruler the rows are those of the
recipes `indexer`, `mqar` and `ruler`, of others 12 rows of 4,096 tokens by the tasks' defaults. The last column is of a
reader who is told how far back the evidence lies, to within an octave.
"""


def table(found: dict[str, Any]) -> str:
    """Mean and spread of every measure by arm, then the claims, as lines for a terminal."""
    rows = [("", *(arm["label"] for arm in found["arms"].values())), *_costs(found)]
    rows += [(measure.label, *_cells(found, measure)) for measure in _measures(found)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([found["question"], "", *lines, "", *(_claim(claim, found) for claim in found["claims"])])


def write_page(folder: Path, page: Path, order: Sequence[str]) -> Path:
    """Writes `page` (Markdown) from the JSON of the suites in `folder`, in the given order.

    Raises:
        FileNotFoundError: `folder` holds none of them.
        ValueError: a suite has runs of uncommitted code.
    """
    paths = [folder / f"{name}.json" for name in order if (folder / f"{name}.json").is_file()]
    if not paths:
        raise FileNotFoundError(f"{str(folder)!r} holds no results of {', '.join(order)}")
    every = [read_summary(path) for path in paths]
    for found in every:
        if found["provenance"]["uncommitted_changes"]:
            raise ValueError(f"{found['suite']}: runs of uncommitted code; the page takes runs of commits alone")
    _correct(every)
    pictures = Path(os.path.relpath(folder, page.parent))
    sections = [_section(found, every, pictures) for found in every]
    tested = sum(claim["verdict"].get("p") is not None for found in every for claim in found["claims"])
    head = HEAD.replace("{claims}", str(tested))
    floors = f"## floors\n\n{FLOORS}\n{floor_table()}\n"
    tuned = [_tuned(read_json(path)) for path in sorted(folder.glob("sweep-*.json"))]
    write_text(page, "\n".join([head, _overview(every), *sections, floors, *tuned]))
    return page


def _tuned(found: dict[str, Any]) -> str:
    """A sweep's trials, the chosen changes first."""
    lines = [
        f"## sweep-{found['sweep']}\n",
        f"`abyssal ablate --sweep {found['sweep']}`: one axis after the other, each from the best before it, at equal"
        " time, one seed and one thread a trial (`train/ablate/sweep.py`; what it starts from: `suites/sweeps.py`)."
        f" Chosen: {_code(found['best'])}.\n",
        "| axis | changes | steps | parameters | held-out bits per byte, clean bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for trial in found["trials"]:
        score = f"{trial['score']:.4f}" if trial["changes"] != found["best"] else f"**{trial['score']:.4f}**"
        numbers = f"{trial['steps']:,}", f"{trial['parameters']:,}", score
        lines.append(f"| {' | '.join((trial['axis'], _code(trial['tried']), *numbers))} |")
    commits = sorted({trial["commit"][:7] for trial in found["trials"] if trial["commit"]})
    return "\n".join([*lines, f"\nCommit {', '.join(commits)}.\n"])


def _code(changes: Sequence[str]) -> str:
    return ", ".join(f"`{change}`" for change in changes) or "nothing"


def _correct(every: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over all claims of the page."""
    claims = [claim for found in every for claim in found["claims"]]
    for claim, verdict in zip(claims, holm([c["verdict"] for c in claims], [c["better"] for c in claims])):
        claim["verdict"] = verdict


def _overview(every: Sequence[dict[str, Any]]) -> str:
    lines = ["| suite | claim | effect | p (Holm) | verdict |", "| --- | --- | --- | --- | --- |"]
    for found in every:
        for claim in found["claims"]:
            p = claim["verdict"]["p"]
            cells = f"[{found['suite']}](#{found['suite']})", claim["text"], _effect(claim, found), _p(p)
            lines.append(f"| {' | '.join(cells)} | **{claim['verdict']['word']}** |")
    return "\n".join(lines) + "\n"


def _section(found: dict[str, Any], every: Sequence[dict[str, Any]], pictures: Path) -> str:
    arms = found["arms"]
    lines = [
        f"## {found['suite']}\n",
        f"**{found['title']}.** {found['question']}\n",
        f"![{found['title']}]({(pictures / found['suite']).as_posix()}.png)\n",
        "| | " + " | ".join(arm["label"] for arm in arms.values()) + " |",
        "| --- |" + " --- |" * len(arms),
        *("| " + " | ".join(row) + " |" for row in _costs(found)),
        *("| " + " | ".join((m.label, *_cells(found, m))) + " |" for m in _measures(found)),
        "",
        *(f"- {_claim(claim, found)}" for claim in found["claims"]),
        "",
        f"*Scale.* {_scale(found)}{_shared(found, every)}\n",
        f"*What this cannot tell.* {found['caveat']}\n",
        f"*Arms.* {_arms(found)}\n",
    ]
    return "\n".join(lines)


def _measures(found: dict[str, Any]) -> list[Measure]:
    """Those that a run of some arm has."""
    measures = [Measure(**measure) for measure in found["measures"]]
    return [m for m in measures if any(values_of(arm, m.name) for arm in found["arms"].values())]


def _costs(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Parameters, steps where they differ, and seconds of a run."""
    arms = found["arms"].values()
    rows = [("parameters", *(f"{arm['parameters']:,}" for arm in arms))]
    if len({arm["steps"] for arm in arms}) > 1:
        rows.append(("steps", *(f"{arm['steps']:,}" for arm in arms)))
    return [*rows, ("seconds of a run", *(f"{arm['seconds']:,.0f}" for arm in arms))]


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
    verdict = claim["verdict"]
    text = f"{claim['text']}: **{verdict['word']}**"
    if verdict["difference"] is None:
        return f"{text} ({verdict['note']} have the number)"
    p = f", p {_p(verdict['p'])}" if verdict["p"] is not None else ""
    return f"{text} ({_measure(claim, found).label}: {_effect(claim, found)}{p})"


def _effect(claim: dict[str, Any], found: dict[str, Any]) -> str:
    """The difference with its interval."""
    measure, verdict = _measure(claim, found), claim["verdict"]
    if verdict["difference"] is None:
        return "-"
    text = f"{'+' if verdict['difference'] >= 0 else ''}{measure.show(verdict['difference'])}"
    return text + (f" ({' to '.join(map(measure.show, verdict['interval']))})" if verdict["interval"] else "")


def _measure(claim: dict[str, Any], found: dict[str, Any]) -> Measure:
    return next(Measure(**measure) for measure in found["measures"] if measure["name"] == claim["measure"])


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _scale(found: dict[str, Any]) -> str:
    scale, origin = found["scale"], found["provenance"]
    commits = ", ".join(commit[:7] for commit in origin["commits"])
    lacking = scale["registered"] - scale["seeds"]
    seeds = f"{scale['seeds']} seeds" + (f" of {scale['registered']} that are registered" if lacking > 0 else "")
    steps = {arm["steps"] for arm in found["arms"].values()}
    each = "each" if len(steps) == 1 else "of the first arm"
    return (
        f"{seeds}, {scale['runs']} runs, {each} {scale['steps']:,} steps and {scale['tokens']:,} targets"
        f" from recipe `{scale['recipe']}` (learning rate {scale['learning_rate']:g});"
        f" {scale['cpu_minutes']:g} minutes of training on {', '.join(origin['machines'])}, one thread a run;"
        f" commit {commits};"
        f" {', '.join(origin['dates'])}; `abyssal ablate {found['suite']} --{found['size']}`."
        f" {'; '.join(origin['data'])}."
    )


def _shared(found: dict[str, Any], every: Sequence[dict[str, Any]]) -> str:
    """Which arms are the very runs of other suites: their verdicts are not independent."""
    told = []
    for other in every:
        theirs = {run["key"] for arm in other["arms"].values() for run in arm["runs"]}
        arms = [arm["label"] for arm in found["arms"].values() if {run["key"] for run in arm["runs"]} <= theirs]
        if other is not found and arms:
            told.append(f"{other['suite']} ({', '.join(arms)})")
    return f" Runs shared with {'; '.join(told)}." if told else ""


def _arms(found: dict[str, Any]) -> str:
    told = []
    for arm in found["arms"].values():
        changes = [f"`{change}`" for change in arm["set"]] + [f"without `{key}`" for key in arm["without"]]
        changes += [f"variant *{arm['variant']}*"] if arm["variant"] != "as configured" else []
        told.append(f"{arm['label']}: {', '.join(changes) or 'the recipe'}")
    return "; ".join(told) + "."
