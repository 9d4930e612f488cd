"""Planted rows as a source of batches, and a model's accuracy on held-out rows by distance.

    row          drawn with the seed (0, seed, stage, number)
    held out     drawn with the seed (1, number): the same for every run, and none that training can meet

b rows of a batch · t tokens
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...settings import DataConfig
from ..rows import Batch
from .task import NO_ANSWER, Task

TRAINING, HELD_OUT = 0, 1


class PlantedSource:
    """Endless rows of one task, each a document."""

    tokenizer = None

    def __init__(self, task: Task, data: DataConfig, seed: int, code: str = "") -> None:
        """`code`: the digest of a task of one's own."""
        self.task, self.vocabulary = task, task.vocabulary
        self.seed, self.rows, self.batch_size = seed, data.held_out_rows, data.batch_size
        self.eval_length = task.config.eval_length or data.sequence_length
        told = [task.name, asdict(task.config), *([code] if code else [])]
        self.digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def describe(self) -> str:
        shown = ", ".join(f"{name}={getattr(self.task.config, name)}" for name in self.task.options)
        return f"planted {self.task.name}: {shown}; scored on {self.rows} rows of {self.eval_length} tokens"

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        return self.graded(rows, length, stage)[0]

    def graded(self, rows: range, length: int, stage: int = 0) -> tuple[Batch, Tensor]:
        """Rows by number and their `Row.distances` [b, t]."""
        return self._draw([(TRAINING, self.seed, stage, number) for number in rows], length)

    def held_out(self, rows: range, length: int) -> tuple[Batch, Tensor]:
        """As `graded`, of rows that are never trained on."""
        return self._draw([(HELD_OUT, number) for number in rows], length)

    def _draw(self, seeds: list[tuple[int, ...]], length: int) -> tuple[Batch, Tensor]:
        rows = [self.task.row(np.random.default_rng(seed), length) for seed in seeds]
        ids, targets, distances = (
            torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("ids", "targets", "distances")
        )
        return Batch(ids, targets, torch.zeros_like(ids)), distances

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Share of held-out answers that are the likeliest token: `accuracy`; `accuracy_at`: by distance, each number
        standing for distances from it to below its double; `answer_nats`: mean -ln p(answer).
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        right: dict[int, list[bool]] = defaultdict(list)
        nats = 0.0
        for start in range(0, self.rows, self.batch_size):
            batch, distances = self.held_out(range(start, min(start + self.batch_size, self.rows)), self.eval_length)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(batch.ids.to(device)).logits.float().cpu()
            asked = distances != NO_ANSWER
            logits, answers = logits[asked], batch.targets[asked]
            nats += F.cross_entropy(logits, answers, reduction="sum").item()
            for distance, found in zip(distances[asked].tolist(), (logits.argmax(-1) == answers).tolist()):
                right[1 << (distance.bit_length() - 1) if distance else 0].append(found)
        model.train(was_training)
        every = [found for some in right.values() for found in some]
        return {
            "accuracy": sum(every) / len(every),
            "accuracy_at": {str(least): sum(some) / len(some) for least, some in sorted(right.items())},
            "answer_nats": nats / len(every),
        }

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        chance = math.log(self.task.config.values)
        by_distance = "  ".join(f"{least}: {share:.0%}" for least, share in scores["accuracy_at"].items())
        return {
            "held-out answers right": f"{scores['accuracy']:.1%}",
            f"by {self.task.axis}": by_distance,
            "nats per answer": f"{scores['answer_nats']:.4f}   (without the evidence {chance:.4f})",
        }
