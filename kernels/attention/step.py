"""Attention of one token in numpy, over keys that it sees all of.

Axes: h heads · c head dim · l keys of a part.
"""

import numpy as np


def attention_step(q: np.ndarray, parts: list[np.ndarray], sink: np.ndarray, scale: float) -> np.ndarray:
    """One softmax over the keys of all parts [l, c] and the sink [h, 1], K = V; q [h, c] to [h, c]."""
    q = q * scale
    ends = np.cumsum([1, *map(len, parts)]).tolist()
    scores = np.empty((len(q), ends[-1]), q.dtype)
    scores[:, :1] = sink
    for keys, first, end in zip(parts, ends, ends[1:]):
        scores[:, first:end] = keys.dot(q.T).T  # in this order the keys are read as they lie
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, scores)
    scores /= scores.sum(1, keepdims=True)
    out = scores[:, 1 : ends[1]].dot(parts[0])
    for keys, first, end in zip(parts[1:], ends[1:], ends[2:]):
        out += scores[:, first:end].dot(keys)
    return out
