"""What a run can do and what it cost: one record of JSON, from which tables, page and picture are made.

Every run sits the same examination, at temperature 1 and greedily. Of each question the record says whether it was
answered right: bits in hexadecimal, the first question in the highest bit, so that differences can be paired.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..data.tokenizers import load_tokenizer
from ..reason.exam import Score, examine
from ..run import checkpoint, metrics, provenance
from ..run.load import load_trained

Record = dict[str, Any]
TEMPERATURES = (1.0, 0.0)
CURVES = ("reward_thinking", "reward_chat", "length_thinking")  # of every step
LOOKS = ("kl_kept", "kl_free", "flipped_experts", "flipped_picks")  # of some, see `reason.drift`


def record(path: Path | str, problems: int, tasks: Sequence[str] = ()) -> Record:
    """Of a run or a checkpoint, from up to `problems` questions of each task in each mode.

    tasks: those that are asked; () = the ones that it learnt.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its recipe has no [reason].
    """
    folder = checkpoint.find(path)
    run = checkpoint.require_run(folder)
    model, recipe = load_trained(folder)
    reason, progress = recipe.reason, checkpoint.read_state(folder)[1]
    if reason is None:
        raise ValueError(f"{str(path)!r} is a run of {recipe.name!r}: allowed are runs whose recipe has [reason]")
    tokenizer, scores, tasks = load_tokenizer("bytes"), {}, list(tasks or reason.tasks)
    for temperature in TEMPERATURES:
        found = examine(model, tokenizer, tasks, reason.modes, problems, reason.max_new_tokens, temperature)
        scores[str(temperature)] = {
            mode: {task: stored(score) for task, score in by_task.items()} for mode, by_task in found.items()
        }
    records, start = metrics.read(run), provenance.starts(run)[-1]
    return {
        "folder": run.resolve().name,
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "tasks": tasks,
        "modes": list(reason.modes),
        "steps": progress.step,
        "tokens": progress.tokens,
        "minutes": round(progress.seconds / 60, 2),
        **{name: start[name] for name in ("parameters", "machine", "source")},
        "scores": scores,
        "curves": {name: [_short(r[name]) for r in records] for name in CURVES if all(name in r for r in records)},
        "looks": {name: _short(fmean(values)) for name in LOOKS if (values := [r[name] for r in records if name in r])},
    }


def stored(score: Score) -> dict[str, Any]:
    """A score as JSON has it."""
    bits = np.packbits(score.right).tobytes().hex()
    return {
        "right": bits,
        "questions": len(score.right),
        "well_formed": _short(score.well_formed),
        "length": _short(score.length),
    }


def right(score: Mapping[str, Any]) -> np.ndarray:
    """[questions] 1 where right, of a stored score."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(score["right"]), np.uint8), count=score["questions"])


def _short(value: float) -> float:
    return float(f"{value:.4g}")
