"""The lightning indexer's training loss: KL from the attention's own probabilities (V3.2; spec C.4).

    p_s   = sum_h exp(scale <q_h, c_s> - lse_h)          joint softmax: window, entries and sink are in lse
    loss  = mean_t KL( p / sum p  ||  softmax(I) )       both over the picked entries, or over all visible ones

b batch · t queries · h attention heads · d head dim · i index heads · e index head dim · p entries · k picks
"""

from torch import Tensor

from ..backend import implementation
from ..shapes import check_bounds, check_shape


def index_loss(
    index_q: Tensor,
    index_weights: Tensor,
    index_keys: Tensor,
    q: Tensor,
    compressed: Tensor,
    lse: Tensor,
    *,
    scale: float,
    start: Tensor,
    end: Tensor,
    index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The KL that teaches the indexer which entries the attention reads, and the share of its reading that was picked.

    The teacher is a constant: gradients reach index_q, index_weights and index_keys only. A query that sees no entry
    adds nothing. The share (sum of p over the picks / sum of p over the visible entries) is measured on up to 32
    queries of each sequence, evenly spaced.

    Args:
        index_q, index_weights, index_keys: [b, t, i, e], [b, t, i], [b, p, e] as given to `index_topk`.
        q, compressed, lse, scale: [b, t, h, d], [b, p, d], [b, t, h] as given to and returned by `attention`.
        start, end: [b|1, t] visible range.
        index: [b, t, k] the picks, -1 = none; None = all visible entries (the dense warm-up).

    Returns:
        loss and share, float32 scalars (float64 of float64); the share is not differentiable, and 1 without picks. The
        loss is 0 if no query sees an entry, and so is the share of picks.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("q", q, "batch", "queries", "heads", "head dim")
    b, t, h, d = q.shape
    check_shape("index_q", index_q, b, t, "index heads", "index head dim")
    check_shape("index_weights", index_weights, b, t, index_q.shape[2])
    check_shape("compressed", compressed, b, "entries", d)
    check_shape("index_keys", index_keys, b, compressed.shape[1], index_q.shape[3])
    check_shape("lse", lse, b, t, h)
    check_bounds(b, t, start=start, end=end)
    if index is not None:
        check_shape("index", index, b, t, "picks")
    run = implementation("index_loss", backend, q).index_loss
    return run(index_q, index_weights, index_keys, q, compressed, lse, scale=scale, start=start, end=end, index=index)
