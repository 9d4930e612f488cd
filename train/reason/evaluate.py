"""`abyssal eval reasoning RUN...`: what training runs know of their tasks, as a table, JSON and a picture.

Each run sits the same examination, at temperature 1 and greedily. Runs of one recipe with other seeds are one row of
the table: mean, and the range from the worst seed to the best.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...model.disk import write_json, write_text
from ...model.folders import read_json
from ..data.tokenizers import load_tokenizer
from ..run import checkpoint, metrics, provenance
from ..run.load import load_trained
from .exam import examine
from .report import markdown, table

FILE, PAGE = "reasoning.json", "RESULTS.md"
TEMPERATURES = (1.0, 0.0)
CURVES = (
    *("reward", "reward_thinking", "reward_chat", "well_formed", "length_thinking", "length_chat"),
    *("kl", "entropy", "clip_fraction", "off_policy", "grad_norm"),
)


def run(runs: Sequence[Path | str], problems: int, out: Path | str | None = None) -> Path:
    """Examines the runs with `problems` questions of each task and mode, prints the tables, writes JSON and Markdown.

    A reasoning.json instead of runs gives its tables and its page again.

    Raises:
        FileNotFoundError: one of them is no run.
        ValueError: one of them has no [reason] table, or other tasks than the first.
    """
    stored = Path(runs[0]) if len(runs) == 1 and Path(runs[0]).is_file() else None
    if stored:
        found = read_json(stored)
    else:
        found = {"problems": problems, "runs": [_examined(path, problems) for path in runs]}
    try:
        for other in found["runs"]:
            if other["tasks"] != found["runs"][0]["tasks"]:
                raise ValueError(f"{other['folder']!r} has tasks {other['tasks']}: allowed are those of the first run")
        page, tables = markdown(found), [table(found, temperature) for temperature in TEMPERATURES]
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"{str(stored or runs[0])!r} holds no results of abyssal eval reasoning") from None
    out = Path(out) if out else stored.parent if stored else Path(runs[0])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, found)
    write_text(out / PAGE, page)
    for text in tables:
        print(text + "\n")
    return out / FILE


def _examined(path: Path | str, problems: int) -> dict[str, Any]:
    """A run's record in the JSON."""
    folder = checkpoint.find(path)
    run_folder = checkpoint.require_run(folder)
    model, recipe = load_trained(folder)
    reason, progress = recipe.reason, checkpoint.read_state(folder)[1]
    if reason is None:
        raise ValueError(f"{str(path)!r} is a run of {recipe.name!r}: allowed are runs whose recipe has [reason]")
    scores = {
        str(temperature): {
            mode: {task: asdict(score) for task, score in by_task.items()}
            for mode, by_task in examine(
                model, load_tokenizer("bytes"), reason.tasks, reason.modes, problems, reason.max_new_tokens, temperature
            ).items()
        }
        for temperature in TEMPERATURES
    }
    records = metrics.read(run_folder)
    start = provenance.starts(run_folder)[-1]
    return {
        "folder": run_folder.resolve().name,
        "recipe": recipe.name if len(reason.modes) > 1 else f"{recipe.name}, {reason.modes[0]} only",
        "rewarded": recipe.grpo is not None,
        "seed": recipe.train.seed,
        "tasks": list(reason.tasks),
        "modes": list(reason.modes),
        "steps": progress.step,
        "tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 2),
        "parameters": start["parameters"],
        "machine": start["machine"],
        "scores": scores,
        "curves": _curves(records),
    }


def _curves(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Every step's numbers of a run with rewards, rounded; and the examinations on the way."""
    rewarded = all("reward" in r for r in records)
    kept = {name: [_short(r[name]) for r in records] for name in CURVES} if rewarded else {}
    exams = [
        {"step": r["step"], **{k: _short(v) for k, v in r.items() if k.startswith("accuracy_")}}
        for r in records
        if "accuracy" in r
    ]
    return {**kept, "exams": exams}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
