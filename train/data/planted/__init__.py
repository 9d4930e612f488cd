"""Planted dependencies: endless rows whose answers are known, and how far back the evidence for each of them stands.

    recall           key-value pairs, later asked for, at distances drawn log-uniformly
    selective_copy   scattered items, to be repeated in order after a wait
    induction        what followed the same tokens before
    ngram_facts      a table of n-grams and their answers, used by Zipf's law, to be learnt by heart (Engram)

A row is a pure function of (seed, stage, number), so a run has no position to save. Only answers are targets: all else
is drawn at random, and learning to predict it would add noise to every gradient and nothing to the answers.
"""

from ...settings import PLANTED, PlantedConfig
from .induction import Induction
from .ngram_facts import NgramFacts
from .recall import Recall
from .selective_copy import SelectiveCopy
from .source import PlantedSource
from .task import Row, Task

TASKS: dict[str, type[Task]] = {
    "recall": Recall,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "ngram_facts": NgramFacts,
}

__all__ = ["TASKS", "PlantedSource", "Row", "Task", "planted_task"]


def planted_task(source: str, config: PlantedConfig | None) -> Task:
    """The task that `planted:NAME` names. Raises ValueError for an unknown one, or for options that it has not."""
    name = source.removeprefix(PLANTED)
    if name not in TASKS:
        raise ValueError(f"data.source={source!r}: allowed after {PLANTED!r} are {', '.join(TASKS)}")
    return TASKS[name](config or PlantedConfig())
