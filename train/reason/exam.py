"""Examinations: held-out problems, each asked in each mode, and which of them are answered right.

The questions depend on the tasks alone, so that every model, run and seed sits the same examination; V4 draws its
answers at temperature 1 (spec E.1), and so do we unless asked for greedy ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...model import Transformer, generate
from ..data.tokenizers import Tokenizer
from .conversations import prompt
from .reward import judge
from .tasks import Problem, problem

ROWS = 256  # asked side by side
DRAWS = 20  # of problems for each question of an examination, in search of others


@dataclass(frozen=True)
class Score:
    """Of one task in one mode: which questions were answered right; of all completions, the share that is well formed
    and the mean length in tokens.
    """

    right: list[bool]
    well_formed: float
    length: float

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def questions(task: str, count: int) -> list[Problem]:
    """The first `count` held-out problems of a task no two of which count as the same; fewer where it has no more."""
    found: dict[str, Problem] = {}
    for number in range(DRAWS * count):
        drawn = problem((task,), 0, 0, number, held_out=True)
        found.setdefault(drawn.identity, drawn)
        if len(found) == count:
            break
    return list(found.values())


@torch.no_grad()
def examine(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    modes: Sequence[str],
    problems: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, dict[str, Score]]:
    """Scores by mode and task, from up to `problems` questions of each task; leaves the model in the mode it was in.

    seed: of the draws of the answers, not of the questions.
    """
    was_training = model.training
    model.eval()
    asked = {task: questions(task, problems) for task in tasks}
    every = [question for found in asked.values() for question in found]
    scores = {}
    for mode in modes:
        written: list[list[int]] = []
        for first in range(0, len(every), ROWS):
            written += generate(
                model,
                [prompt(question, mode, tokenizer) for question in every[first : first + ROWS]],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed * len(every) + first,
                stop=[tokenizer.eos],
            )
        answers = iter(written)
        scores[mode] = {
            task: _score([(question, next(answers)) for question in found], mode, tokenizer)
            for task, found in asked.items()
        }
    model.train(was_training)
    return scores


def _score(answered: Sequence[tuple[Problem, list[int]]], mode: str, tokenizer: Tokenizer) -> Score:
    verdicts = [judge(question, mode, ids, tokenizer) for question, ids in answered]
    well_formed, length = (
        sum(values) / len(answered)
        for values in ((verdict.well_formed for verdict in verdicts), (len(ids) for _, ids in answered))
    )
    return Score([verdict.right for verdict in verdicts], well_formed, length)


def mean_right(scores: dict[str, Score]) -> float:
    """Over tasks, each counting the same."""
    return sum(score.share for score in scores.values()) / len(scores)
