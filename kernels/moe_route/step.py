"""Routing of one token in numpy.

Axes: e experts · k chosen.
"""

import numpy as np

from .eager import ASYMPTOTE


def moe_route_step(
    logits: np.ndarray, scale: float, top_k: int, bias: np.ndarray | None = None, experts: np.ndarray | None = None
) -> tuple[list[int], np.ndarray]:
    """The chosen experts and their weights [k], from logits [e]; `experts` [k] are given in hash-routed layers."""
    scores = np.where(logits < ASYMPTOTE, np.exp(logits / 2), np.sqrt(np.logaddexp(0, logits)))
    if experts is None:
        experts = np.argsort(-(scores if bias is None else scores + bias), kind="stable")[:top_k]
    weights = scores[experts]
    weights *= scale / (weights.sum() + 1e-20)
    return experts.tolist(), weights
