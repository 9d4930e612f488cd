"""Planted rows as a source of batches, and a model's accuracy on held-out rows beside that of blind readers.

    row          drawn with the seed (0, seed, stage, number)
    held out     drawn with the seed (1, number): the same for every run, and none that training can meet
    fitted on    drawn with the seed (2, number): what blind readers learn their place from (`blind.py`)

b rows of a batch · t tokens · a answers of all held-out rows
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
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
        self.eval_lengths = task.config.eval_lengths or (task.config.eval_length or data.sequence_length,)
        nearest = task.config.eval_nearest or task.config.nearest
        self.scored = type(task)(replace(task.config, nearest=nearest, eval_nearest=0))
        told = [task.name, asdict(task.config), *([code] if code else [])]
        self.digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def describe(self) -> str:
        shown = ", ".join(f"{name}={getattr(self.task.config, name)}" for name in self.task.options)
        lengths = ", ".join(map(str, self.eval_lengths))
        return f"planted {self.task.name}: {shown}; scored on {self.rows} rows of {lengths} tokens"

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
    def _blind(self) -> tuple["Labels", dict[str, np.ndarray]]:
        """What the held-out answers are scored apart by, and by blind reader `blind.right`, [2, a]."""
        labels, readers = [], []
        for number, length in enumerate(self.eval_lengths):
            scored, other = (
                [self._row(self.scored, (kind, row), length) for row in range(self.rows)] for kind in (HELD_OUT, FITTED)
            )
            labels.append(Labels.of(scored, length, self.task.name, number * self.rows))
            readers.append(blind.right(self.scored, other, scored))
        return Labels.joined(labels), {
            name: np.concatenate([found[name] for found in readers], 1) for name in readers[0]
        }

    def floors(self) -> dict[str, dict[str, Any]]:
        """By blind reader, the best one first: accuracies as `evaluate` has them for a model."""
        labels, readers = self._blind
        scores = {name: labels.shares(*right) for name, right in readers.items()}
        return dict(sorted(scores.items(), key=lambda item: -item[1]["accuracy"]))

    def floor(self) -> dict[str, Any]:
        """The best blind reader's accuracies, `floor`, and its name, `floor_reader`; the best one's for each distance,
        `floor_at`, and for each kind and length, `floor_of`.
        """
        floors = self.floors()
        found = {
            name.replace("accuracy", "floor"): _best([one[name] for one in floors.values()])
            for name in next(iter(floors.values()))
        }
        return {**found, "floor_reader": next(iter(floors))}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Share of held-out answers that are the likeliest token: `accuracy`; `accuracy_at`: by distance, each number
        standing for distances from it to below its double; `accuracy_of`: by kind and length, where there are several;
        `answer_nats`: mean -ln p(answer); those of `floor`; and `right`, which were, by distance and kind.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        right, nats = [], 0.0
        for length in self.eval_lengths:
            for start in range(0, self.rows, self.batch_size):
                batch, distances = self.held_out(range(start, min(start + self.batch_size, self.rows)), length)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    logits = model(batch.ids.to(device)).logits.float().cpu()
                asked = distances != NO_ANSWER
                logits, answers = logits[asked], batch.targets[asked]
                nats += F.cross_entropy(logits, answers, reduction="sum").item()
                right.append((logits.argmax(-1) == answers).numpy())
        model.train(was_training)
        every = np.concatenate(right)
        labels, mean = self._blind[0], nats / len(every)
        return {**labels.shares(every), "answer_nats": mean, **self.floor(), "right": labels.answers(every)}

    def rows_of_answers(self) -> dict[str, np.ndarray]:
        """The row of every answer, in the names and the order of `right`."""
        labels = self._blind[0]
        return {name: labels.rows[some] for name, some in labels.parts().items()}

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        def beside(found: dict[str, float], floors: dict[str, float]) -> str:
            return "  ".join(f"{name}: {share:.0%} ({floors[name]:.0%})" for name, share in found.items())

        kinds = {
            f"{kind}, by length (blind)": beside(found, scores["floor_of"][kind])
            for kind, found in scores.get("accuracy_of", {}).items()
        }
        return {
            "held-out answers right": f"{scores['accuracy']:.1%}",
            "without the question": f"{scores['floor']:.1%}   (the best blind reader, {scores['floor_reader']})",
            f"by {self.task.axis} (blind)": beside(scores["accuracy_at"], scores["floor_at"]),
            **kinds,
            "nats per answer": f"{scores['answer_nats']:.4f}",
        }


@dataclass(frozen=True)
class Labels:
    """What answers are scored apart by: [a] each."""

    octaves: np.ndarray
    kinds: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray  # each by a number, those of one length after those of the other

    @classmethod
    def of(cls, rows: list[Row], length: int, name: str, first: int) -> "Labels":
        distances, kinds = (
            np.concatenate([getattr(row, of)[row.asked] for row in rows]) for of in ("distances", "kinds")
        )
        return cls(
            blind.octaves(distances),
            np.where(kinds == "", name, kinds),
            np.full(len(kinds), length),
            np.repeat(np.arange(first, first + len(rows)), [len(row.asked) for row in rows]),
        )

    @classmethod
    def joined(cls, some: list["Labels"]) -> "Labels":
        return cls(*(np.concatenate([getattr(one, f.name) for one in some]) for f in fields(cls)))

    def shares(self, right: np.ndarray, told: np.ndarray | None = None) -> dict[str, Any]:
        """The share of right answers: of all; by distance (of those that are `told`, if given); by kind and length."""
        kinds, lengths = np.unique(self.kinds).tolist(), np.unique(self.lengths).tolist()
        by_distance = _shares(self.octaves, right if told is None else told)
        found = {"accuracy": float(right.mean()), "accuracy_at": by_distance}
        if len(kinds) * len(lengths) > 1:
            of = {kind: self.kinds == kind for kind in kinds}
            found["accuracy_of"] = {kind: _shares(self.lengths[some], right[some]) for kind, some in of.items()}
        return found

    def parts(self) -> dict[str, np.ndarray]:
        """Which answers are those at a distance, which those of a kind and length, in the names of `shares`."""
        at = {f"accuracy_at.{n}": self.octaves == n for n in np.unique(self.octaves).tolist()}
        of = {
            f"accuracy_of.{kind}.{length}": (self.kinds == kind) & (self.lengths == length)
            for kind in np.unique(self.kinds).tolist()
            for length in np.unique(self.lengths).tolist()
        }
        return {name: some for name, some in (at | (of if len(of) > 1 else {})).items() if some.any()}

    def answers(self, right: np.ndarray) -> dict[str, str]:
        """Each answer of `parts` as 1 or 0."""
        return {name: "".join(map(str, right[some].astype(int))) for name, some in self.parts().items()}


def _shares(labels: np.ndarray, right: np.ndarray) -> dict[str, float]:
    return {str(label): float(right[labels == label].mean()) for label in np.unique(labels).tolist()}


def _best(found: list[Any]) -> Any:
    """The largest of several numbers, or of each name's."""
    return (
        {name: _best([one[name] for one in found]) for name in found[0]} if isinstance(found[0], dict) else max(found)
    )


def _stacked(rows: list[Row]) -> tuple[Batch, Tensor]:
    ids, targets, distances = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("ids", "targets", "distances")
    )
    return Batch(ids, targets, torch.zeros_like(ids)), distances
