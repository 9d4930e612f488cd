"""The indexer's choice for one token in numpy.

Axes: h index heads · d index head dim · p entries · k picks.
"""

import numpy as np
import torch

from ..topk import stable_topk

HITS = 1 << 16  # products of heads and entries at a time


def index_topk_step(q: np.ndarray, weights: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray | None:
    """The k best of keys [p, d], ascending, ties to the lowest; None if there are no more than k. q [h, d], weights
    [h].
    """
    if len(keys) <= k:
        return None
    scores = np.empty(len(keys), q.dtype)
    size = max(1, HITS // len(q))
    for first in range(0, len(keys), size):
        hits = keys[first : first + size].dot(q.T)  # in this order the keys are read as they lie
        np.maximum(hits, 0, out=hits).dot(weights, scores[first : first + size])
    return stable_topk(torch.from_numpy(scores), k, ordered=False).numpy()
