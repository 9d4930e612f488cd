"""Planted dependencies: endless rows whose answers are known, and how far back the evidence for each of them stands.

    recall           key-value pairs, later asked for, at distances drawn log-uniformly
    selective_copy   scattered items, to be repeated in order after a wait
    induction        what followed the same tokens before
    ngram_facts      a table of n-grams and their answers, used by Zipf's law, to be learnt by heart (Engram)
    mqar             all pairs first, then all their keys (Arora et al. 2023)
    single, multikey, multivalue, tracking, common: needles, chains of variables and common words in a haystack (after
    RULER, Hsieh et al. 2024); ruler: all of these in turn

A row is a pure function of (seed, stage, number), so a run has no position to save. Only answers are targets: all else
is drawn at random, and learning to predict it would add noise to every gradient and nothing to the answers.

`blind.py` has what can be had without reading the question, the floor of every score.

A task of one's own is a class that draws rows: `data.source = "planted:FILE.py:CLASS"` (`examples/own_task.py`).
"""

from ... import own
from ...settings import PLANTED, PlantedConfig
from .common import Common
from .induction import Induction
from .mqar import Mqar
from .needles import MultiKey, MultiValue, Single
from .ngram_facts import NgramFacts
from .recall import Recall
from .ruler import Ruler
from .selective_copy import SelectiveCopy
from .source import PlantedSource
from .task import Row, Task
from .tracking import Tracking

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Recall, SelectiveCopy, Induction, NgramFacts, Mqar),
        *(Single, MultiKey, MultiValue, Tracking, Common, Ruler),
    )
}

__all__ = ["TASKS", "PlantedSource", "Row", "Task", "planted_task"]


def planted_task(source: str, config: PlantedConfig | None) -> Task:
    """The task that `planted:NAME` names, or of one's own `planted:FILE.py:CLASS`.

    Raises:
        ValueError: an unknown one, a class that is none, or options that it has not.
        PermissionError: code of one's own that a checkpoint names (`train.own`).
    """
    name = source.removeprefix(PLANTED)
    if own.is_own(name):
        kind = own.load(name)
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            raise ValueError(f"data.source={source!r}: {kind!r} is no class of abyssal.train.data.planted.Task")
        return kind(config or PlantedConfig())
    if name not in TASKS:
        known = f"{', '.join(TASKS)}, or FILE.py:CLASS of one's own"
        raise ValueError(f"data.source={source!r}: allowed after {PLANTED!r} are {known}")
    return TASKS[name](config or PlantedConfig())
