"""Rows of packed conversations about generated problems (see `train.data.packed`), for supervised fine-tuning.

    row        bos q0 a0 eos | bos q0 a0' eos | bos q1 ... | padding         completions are learnt

Every problem stands in a row once in each mode, so that the modes have the same number of the same examples. A row is a
pure function of (seed, stage, row): it takes problems from its own sequence until the next one does not fit.

b rows · t tokens of a row
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.packed import Columns, pack, stack
from ..data.rows import Batch
from ..data.tokenizers import Tokenizer, load_tokenizer
from .conversations import Conversation, conversation
from .exam import examine, mean_right
from .tasks import check_task, problem

if TYPE_CHECKING:
    from ..recipe import Recipe

PROBLEMS_OF_A_ROW = 4096  # numbers that a row has for its own problems: more than fit into any row


def packed_row(
    tasks: tuple[str, ...], modes: tuple[str, ...], seed: int, stage: int, row: int, length: int, tokenizer: Tokenizer
) -> Columns:
    """Row `row` of a stage. Raises ValueError where not even one problem fits."""
    chosen: list[Conversation] = []
    first, filled = row * PROBLEMS_OF_A_ROW, 0
    for number in range(first, first + PROBLEMS_OF_A_ROW):
        asked = problem(tasks, seed, stage, number)
        pair = [conversation(asked, mode, tokenizer) for mode in modes]
        size = sum(map(len, pair))
        if filled + size > length:
            break
        chosen += pair
        filled += size
    if not chosen:
        raise ValueError(f"data.sequence_length={length}: a row must take one problem, {size} tokens")
    return pack([talk.talk for talk in chosen], length, tokenizer.pad)


class ReasonSource:
    """Conversations about generated problems; scored by examinations (see `train.data.source.Source`)."""

    def __init__(self, recipe: "Recipe") -> None:
        assert recipe.reason is not None
        self.reason, self.seed, self.tokenizer = recipe.reason, recipe.train.seed, load_tokenizer("bytes")
        self.vocabulary, self.digest = self.tokenizer.vocab_size, "problems " + " ".join(recipe.reason.tasks)
        for task in self.reason.tasks:
            check_task(task)

    def describe(self) -> str:
        reason = self.reason
        return f"generated problems: {', '.join(reason.tasks)}; modes: {', '.join(reason.modes)}"

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        reason = self.reason
        return stack(
            [packed_row(reason.tasks, reason.modes, self.seed, stage, row, length, self.tokenizer) for row in rows]
        )

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Accuracy over the tasks by mode, and by mode and task."""
        reason, device = self.reason, next(model.parameters()).device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = examine(
                model, self.tokenizer, reason.tasks, reason.modes, reason.exam_problems, reason.max_new_tokens
            )
        means = {f"accuracy_{mode}": mean_right(by_task) for mode, by_task in scores.items()}
        by_task = {mode: {task: score.share for task, score in found.items()} for mode, found in scores.items()}
        return {**means, "accuracy": by_task}

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        return {
            f"right, {mode} mode": f"{scores[f'accuracy_{mode}']:.3f}   "
            + ", ".join(f"{task} {right:.2f}" for task, right in by_task.items())
            for mode, by_task in scores["accuracy"].items()
        }
