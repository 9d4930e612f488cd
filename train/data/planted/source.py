"""Planted rows as a source of batches, and a model's accuracy on held-out rows beside that of blind readers.

    row          drawn with the seed (0, seed, stage, number)
    held out     drawn with the seed (1, number): the same for every run, and none that training can meet
    fitted on    drawn with the seed (2, number): what blind readers learn their place from (`blind.py`)

b rows of a batch · t tokens · a answers of all held-out rows
"""

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...settings import DataConfig
from ..rows import Batch
from . import blind
from .task import NO_ANSWER, Row, Task

TRAINING, HELD_OUT, FITTED = 0, 1, 2


class PlantedSource:
    """Endless rows of one task, each a document."""

    tokenizer = None

    def __init__(self, task: Task, data: DataConfig, seed: int, code: str = "") -> None:
        """`code`: the digest of a task of one's own."""
        self.task, self.vocabulary = task, task.vocabulary
        self.seed, self.rows, self.batch_size = seed, data.held_out_rows, data.batch_size
        self.eval_length = task.config.eval_length or data.sequence_length
        nearest = task.config.eval_nearest or task.config.nearest
        self.scored = type(task)(replace(task.config, nearest=nearest, eval_nearest=0))
        told = [task.name, asdict(task.config), *([code] if code else [])]
        self.digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def describe(self) -> str:
        shown = ", ".join(f"{name}={getattr(self.task.config, name)}" for name in self.task.options)
        return f"planted {self.task.name}: {shown}; scored on {self.rows} rows of {self.eval_length} tokens"

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        return self.graded(rows, length, stage)[0]

    def graded(self, rows: range, length: int, stage: int = 0) -> tuple[Batch, Tensor]:
        """Rows by number and their `Row.distances` [b, t]."""
        return _stacked([self._row(self.task, (TRAINING, self.seed, stage, number), length) for number in rows])

    def held_out(self, rows: range, length: int) -> tuple[Batch, Tensor]:
        """As `graded`, of rows that are never trained on."""
        return _stacked([self._row(self.scored, (HELD_OUT, number), length) for number in rows])

    def _row(self, task: Task, seed: tuple[int, ...], length: int) -> Row:
        return task.row(np.random.default_rng(seed), length)

    @cached_property
    def _blind(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The octaves of the held-out distances [a], and by blind reader which answers are right [a]."""
        scored, other = (
            [self._row(self.scored, (kind, number), self.eval_length) for number in range(self.rows)]
            for kind in (HELD_OUT, FITTED)
        )
        distances = np.concatenate([row.distances[row.asked] for row in scored])
        return blind.octaves(distances), blind.right(self.scored, other, scored)

    def floors(self) -> dict[str, dict[str, Any]]:
        """By blind reader, the best one first: `accuracy` and `accuracy_at` as `evaluate` has them for a model."""
        octaves, readers = self._blind
        scores = {name: _shares(octaves, right) for name, right in readers.items()}
        return dict(sorted(scores.items(), key=lambda item: -item[1]["accuracy"]))

    def floor(self) -> dict[str, Any]:
        """`floor`: the best blind reader's accuracy; `floor_at`: the best one's for each distance; `floor_reader`: who
        it is over all of them.
        """
        floors = self.floors()
        reader, best = next(iter(floors.items()))
        at = {least: max(found["accuracy_at"][least] for found in floors.values()) for least in best["accuracy_at"]}
        return {"floor": best["accuracy"], "floor_at": at, "floor_reader": reader}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Share of held-out answers that are the likeliest token: `accuracy`; `accuracy_at`: by distance, each number
        standing for distances from it to below its double; `answer_nats`: mean -ln p(answer); and `floor`.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        right, nats = [], 0.0
        for start in range(0, self.rows, self.batch_size):
            batch, distances = self.held_out(range(start, min(start + self.batch_size, self.rows)), self.eval_length)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(batch.ids.to(device)).logits.float().cpu()
            asked = distances != NO_ANSWER
            logits, answers = logits[asked], batch.targets[asked]
            nats += F.cross_entropy(logits, answers, reduction="sum").item()
            right.append((logits.argmax(-1) == answers).numpy())
        model.train(was_training)
        every = np.concatenate(right)
        return {**_shares(self._blind[0], every), "answer_nats": nats / len(every), **self.floor()}

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        at = scores["floor_at"]
        by_distance = "  ".join(f"{n}: {share:.0%} ({at[n]:.0%})" for n, share in scores["accuracy_at"].items())
        return {
            "held-out answers right": f"{scores['accuracy']:.1%}",
            "without the question": f"{scores['floor']:.1%}   (the best blind reader, {scores['floor_reader']})",
            f"by {self.task.axis} (blind)": by_distance,
            "nats per answer": f"{scores['answer_nats']:.4f}",
        }


def _stacked(rows: list[Row]) -> tuple[Batch, Tensor]:
    ids, targets, distances = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("ids", "targets", "distances")
    )
    return Batch(ids, targets, torch.zeros_like(ids)), distances


def _shares(octaves: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    at = {str(least): float(right[octaves == least].mean()) for least in np.unique(octaves).tolist()}
    return {"accuracy": float(right.mean()), "accuracy_at": at}
