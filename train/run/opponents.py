"""opponents.json: a run on text beside what else can be made of the same text, on the same held-out bytes.

step, init      of the model that was scored; the weights that it began from, "" = none
bytes           scored, `held_out` and among them `clean`
training        bytes that opponents had: `all` training text, and what the run had `read` of it; `corpus`: all there is
scores          list of `name`, `training` ("all", "read"), and bits per byte, `held_out` and `clean`; the model's first
curve           `step` and `held_out`: a 5-gram model of what the run had read by then, at steps of halves

What was read follows from the recipes of the run's starts and the number of steps, resumed or not; of steps before the
first start (a run that went on from another's checkpoint) from the first. It is unknown (no "read") where a start had
other data, and of a tokenizer that is not exact.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...model.disk import write_json
from ...model.folders import read_json
from ..data.opponents import MOST, n_grams, opponents, training_text
from ..data.seen import Rows, seen
from ..data.source import TextSource
from ..recipe import Recipe
from . import provenance
from .schedule import Schedule

FILE = "opponents.json"
CURVE = 5  # the order of the model whose scores over the steps are in it
BYTES = 256


def compare(source: TextSource, scores: dict[str, Any], step: int, run: Path | None) -> dict[str, Any]:
    """What opponents.json says of a model with these scores; `run`: its folder, None where no run of ours made it."""
    starts = provenance.starts(run) if run and (run / provenance.FILE).is_file() else []
    same = all(start.get("data", {}).get("digest") == source.digest for start in starts)
    known = bool(starts) and step > 0 and same and source.tokenizer.exact
    texts = {"all": training_text(source.corpus.train)}
    if known:
        texts["read"] = read_text(source, starts, step)
    own = {part: scores[part] for part in ("held_out", "clean") if part in scores}
    others = [
        {"name": name, "training": training, **bits}
        for training, text in texts.items()
        for name, bits in opponents(text, source.scored, source.clean).items()
    ]
    return {
        "step": step,
        "init": starts[0]["recipe"]["train"].get("init", "") if starts else "",
        "bytes": {"held_out": source.held_out_bytes(), "clean": source.clean_bytes()},
        "training": {
            "corpus": sum(document.size for document in source.corpus.train),
            **{name: int((text < BYTES).sum()) for name, text in texts.items()},
        },
        "scores": [{"name": "model", "training": "read", **own}, *others],
        "curve": [*_curve(source, starts, step)] if known else [],
    }


def write(folder: Path, found: dict[str, Any]) -> None:
    write_json(folder / FILE, found)


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote there; empty where nothing is."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else {}


def bits(found: dict[str, Any], name: str, training: str = "all", part: str = "held_out") -> float:
    """A score of an opponent. Raises KeyError where there is none."""
    scores = {(score["name"], score["training"]): score for score in found["scores"]}
    return scores[name, training][part]


def table(found: dict[str, Any]) -> str:
    """The scores for people, a line each."""
    training, parts = found["training"], found["bytes"]
    whole = "all" if training["all"] == training["corpus"] else "first"
    given = {
        "all": f"{whole} {training['all'] / 1e6:.2f} MB",
        "read": f"the {training.get('read', 0) / 1e6:.2f} MB read",
    }
    lines = [f"{'bits per byte of':<24} {parts['held_out']:>12,} bytes {parts['clean']:>12,} clean ones"]
    for score in found["scores"]:
        label = score["name"] if score["name"] == "model" else f"{score['name']}, {given[score['training']]}"
        bits = [f"{score[part]:.4f}" if part in score else "-" for part in parts]
        lines.append(f"{label:<24} {bits[0]:>12}       {bits[1]:>12}")
    if found["init"]:
        lines.append(f"the model began from {found['init']}, whose text opponents did not have")
    return "\n".join(lines)


def read_text(source: TextSource, starts: Sequence[dict[str, Any]], step: int) -> Any:
    return seen(source.tokens, source.tokenizer, _rows(starts, step), MOST)


def _rows(starts: Sequence[dict[str, Any]], step: int) -> Iterator[Rows]:
    """The rows of the steps up to `step`: from each start on until a later one took over."""
    for number, start in enumerate(starts):
        begin = start["step"] if number else 0
        end = min([step, *(later["step"] for later in starts[number + 1 :])])
        recipe = Recipe.from_dict(start["recipe"])
        schedule = Schedule(recipe)
        for stage, (first, stop) in enumerate(zip(schedule.starts, [*schedule.starts[1:-1], end])):
            if (first := max(first, begin)) < (stop := min(stop, end)):
                last = schedule.phase(stop - 1)
                yield Rows(
                    range(schedule.phase(first).rows.start, last.rows.stop), last.length, stage, recipe.train.seed
                )


def _curve(source: TextSource, starts: Sequence[dict[str, Any]], step: int) -> Iterator[dict[str, Any]]:
    size, bits = 0, 0.0
    for part in sorted({-(-step // (1 << halves)) for halves in range(7)}):
        text = read_text(source, starts, part)
        if len(text) > size:  # else it is the same: what opponents are given has a limit
            size, bits = len(text), float(n_grams(text, source.scored, [CURVE])[CURVE].mean())
        yield {"step": part, "held_out": bits}
