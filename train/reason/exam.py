"""Examinations: held-out problems, each asked in each mode, and the share that is answered right.

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
from .tasks import problem

ROWS = 256  # asked side by side


@dataclass(frozen=True)
class Score:
    """Of one task in one mode: shares of the completions, and their mean length in tokens."""

    right: float
    well_formed: float
    length: float


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
    """Scores by mode and task, from `problems` questions of each task; leaves the model in the mode it was in.

    seed: of the draws of the answers, not of the questions.
    """
    was_training = model.training
    model.eval()
    asked = [problem((task,), 0, 0, number, held_out=True) for task in tasks for number in range(problems)]
    scores = {}
    for mode in modes:
        verdicts, lengths = [], []
        for first in range(0, len(asked), ROWS):
            part = asked[first : first + ROWS]
            written = generate(
                model,
                [prompt(question, mode, tokenizer) for question in part],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed * len(asked) + first,
                stop=[tokenizer.eos],
            )
            verdicts += [judge(question, mode, ids, tokenizer) for question, ids in zip(part, written)]
            lengths += [len(ids) for ids in written]
        scores[mode] = {
            task: Score(
                sum(v.right for v in verdicts[at : at + problems]) / problems,
                sum(v.well_formed for v in verdicts[at : at + problems]) / problems,
                sum(lengths[at : at + problems]) / problems,
            )
            for at, task in zip(range(0, len(asked), problems), tasks)
        }
    model.train(was_training)
    return scores


def mean_right(scores: dict[str, Score]) -> float:
    """Over tasks, each counting the same."""
    return sum(score.right for score in scores.values()) / len(scores)
