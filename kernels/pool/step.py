"""The compressor's pooling of one entry in numpy.

Axes: m ratio · s slots, m or 2 m · C channels of a token · D channels of the entry.
"""

import numpy as np


def pool_step(kv: np.ndarray, gate: np.ndarray, bias: np.ndarray, overlap: bool) -> np.ndarray:
    """The entry [D] of the last m rows of kv and gate [t, C], bias [m, C]. With overlap, the m rows before them count
    too, if they are there: t is m or 2 m.
    """
    m = len(bias)
    if not overlap:
        return _pooled(kv, gate + bias)
    width = kv.shape[1] // 2
    own, logits = kv[-m:, width:], gate[-m:, width:] + bias[:, width:]
    if len(kv) > m:
        own = np.concatenate((kv[:m, :width], own))
        logits = np.concatenate((gate[:m, :width] + bias[:, :width], logits))
    return _pooled(own, logits)


def _pooled(values: np.ndarray, logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(0))
    return (weights * values).sum(0) / weights.sum(0)
