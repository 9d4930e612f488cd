"""What can be had without reading the question: readers that know how rows are made and all that stands before a
question, but not what it asks for. A task's floor is the best of them, on the very rows that a model is scored on.

    recency     the r-th candidate at least n tokens back         n = nearest and every power of two, r < RANKS
    unasked     the same with r = 0, skipping candidates that were an answer before
    frequency   the commonest candidate so far
    left        the commonest of those so far that were no answer before: the best there is where each is asked for once
    position    the r-th candidate of the row
    likeliest   the answer that is right most often, the same for every question

Candidates are the tokens of a row that can be an answer. Of a reader with several guesses (n, r) the one is taken that
is right most often in other rows of the task, one for each kind of answer. For a floor by distance it is one for each
octave of distances, too: that of a reader who is told the octave. `likeliest` is told nothing.

a answers · g guesses of one reader · c candidates of a row
"""

from collections.abc import Sequence

import numpy as np

from .task import NO_GUESS, Guesses, Row, Task

RANKS = 4
LIKELIEST = "likeliest"


def readers(row: Row, candidates: np.ndarray, nearest: int = 1) -> dict[str, Guesses]:
    """The guesses [a, g] of the first five readers. `candidates`: positions, in order, with every answer's evidence."""
    values, asked = row.ids[candidates], row.asked
    leasts = np.unique([nearest, *(1 << np.arange(len(row.ids).bit_length()))])
    last = np.searchsorted(candidates, asked[:, None] - leasts, side="right") - 1  # [a, n]
    ranked = (last[..., None] - np.arange(RANKS)).reshape(len(asked), -1)
    return {
        "recency": _taken(values, ranked),
        "unasked": _taken(values, _unasked(row, candidates, last)),
        "frequency": _commonest(values, np.searchsorted(candidates, asked))[:, None],
        "left": _commonest(values, np.searchsorted(candidates, asked), _answered(row, candidates))[:, None],
        "position": np.broadcast_to(_taken(values, np.arange(RANKS)), (len(asked), RANKS)),
    }


def _taken(values: np.ndarray, index: np.ndarray) -> Guesses:
    there = (index >= 0) & (index < len(values))
    return np.where(there, values[np.where(there, index, 0)], NO_GUESS)


def _unasked(row: Row, candidates: np.ndarray, last: np.ndarray) -> np.ndarray:
    """For each question and each `last` candidate: the last one up to there that no earlier question asked for."""
    answered = _answered(row, candidates)
    found, gone = np.empty_like(last), np.zeros(len(candidates), bool)
    for i, index in enumerate(answered):
        left = np.append(-1, np.flatnonzero(~gone))
        found[i] = left[np.searchsorted(left, last[i], side="right") - 1]
        gone[index] = True
    return found


def _answered(row: Row, candidates: np.ndarray) -> np.ndarray:
    """For each question, which candidate is its evidence."""
    return np.searchsorted(candidates, row.asked - row.distances[row.asked])


def _commonest(values: np.ndarray, ends: np.ndarray, answered: np.ndarray | None = None) -> np.ndarray:
    """For each end: the commonest of values[:end], of several the smallest; without those `answered` before it."""
    known, which = np.unique(values, return_inverse=True)
    counts, begin, found = np.zeros(len(known), np.int64), 0, np.full(len(ends), NO_GUESS)
    gone = np.zeros(len(values), bool)
    for i, end in enumerate(ends.tolist()):
        counts += np.bincount(which[begin:end], minlength=len(known))
        begin = end
        if counts.any():
            found[i] = known[np.argmax(counts)]
        if answered is not None and not gone[answered[i]]:
            gone[answered[i]] = True
            counts[which[answered[i]]] -= 1
    return found


def octaves(distances: np.ndarray) -> np.ndarray:
    """The largest power of two up to each distance; 0 for 0."""
    return np.where(distances > 0, 1 << (np.frexp(np.maximum(distances, 1))[1].astype(np.int64) - 1), 0)


def right(task: Task, other: Sequence[Row], scored: Sequence[Row]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By reader: which answers of the scored rows it has right [a], and which when it is told the octave of each
    distance [a]; what it has to be fitted on are other rows.
    """
    answers, kinds, octave, guesses = _flat(task, other)
    asked, asked_kinds, asked_octave, blind = _flat(task, scored)
    labels = [
        (kinds, asked_kinds),
        tuple(np.char.add(a, b.astype(str)) for a, b in ((kinds, octave), (asked_kinds, asked_octave))),
    ]
    likeliest = asked == np.argmax(np.bincount(answers))
    found = {LIKELIEST: (likeliest, likeliest)}
    for name, every in blind.items():
        known, hits = guesses[name] == answers[:, None], every == asked[:, None]
        plain, told = (hits[np.arange(len(hits)), _fitted(known, *pair)] for pair in labels)
        found[name] = plain, told
    return found


def _fitted(known: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted label the guess that was right most often under it, the first guess for a label never seen."""
    best = {label: known[labels == label].mean(0).argmax() for label in np.unique(labels).tolist()}
    return np.array([best.get(label, 0) for label in wanted.tolist()])


def _flat(task: Task, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Guesses]]:
    """Answers, their kinds, octaves of their distances, and guesses by reader, of all rows one after the other."""
    guesses = [task.blind(row) for row in rows]
    targets, kinds, distances = (
        np.concatenate([getattr(row, name)[row.asked] for row in rows]) for name in ("targets", "kinds", "distances")
    )
    return (
        targets,
        kinds,
        octaves(distances),
        {name: np.concatenate([some[name] for some in guesses]) for name in guesses[0]},
    )
