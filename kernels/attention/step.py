"""Attention of one token in numpy, over keys that it sees all of.

Axes: h heads · c head dim · l keys of a part.
"""

import numpy as np


def attention_step(q: np.ndarray, parts: list[np.ndarray], sink: np.ndarray, scale: float) -> np.ndarray:
    """One softmax over the keys of all parts [l, c] and the sink [h, 1], K = V; q [h, c] to [h, c]."""
    q = q * scale
    scores = np.concatenate((sink, *(keys.dot(q.T).T for keys in parts)), 1)
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, scores)
    scores /= scores.sum(1, keepdims=True)
    out, first = np.zeros_like(q), 1
    for keys in parts:
        out += scores[:, first : first + len(keys)].dot(keys)
        first += len(keys)
    return out
