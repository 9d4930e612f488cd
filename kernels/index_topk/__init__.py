"""The lightning indexer's choice: exact top-k of weighted-ReLU scores, streamed (V4 2.3.1 eqs. 13-17; spec B.5).

    I_{t,s} = sum_h w_{t,h} ReLU(<q_{t,h}, k_s>)        over the visible entries s in [start_t, end_t)

b batch · t queries · h index heads · d index head dim · p compressed entries · k picks
"""

from torch import Tensor

from ..backend import implementation
from ..shapes import check_bounds, check_shape


def index_topk(
    q: Tensor, weights: Tensor, keys: Tensor, *, k: int, start: Tensor, end: Tensor, backend: str | None = None
) -> Tensor:
    """The k best visible entries of each query, ascending, -1 where fewer are visible; ties go to the lowest entry.

    Scores are never held for the whole sequence. NaN scores are never picked before others. Nothing is differentiated:
    the indexer learns from `index_loss` alone.

    Args:
        q: [b, t, h, d] rotated index queries; Flash: h = 64, d = 128.
        weights: [b, t, h], already times d ** -0.5 * h ** -0.5; may be negative.
        keys: [b, p, d] rotated index keys, one per compressed entry.
        k: how many to pick (512 Flash, 1024 Pro).
        start, end: [b|1, t] visible range, within 0 to p; that is trusted, as reading it would wait for the device.

    Returns:
        int64 [b, t, min(k, p)].

    Raises:
        ValueError: k < 1 or shapes that do not fit.
    """
    check_shape("q", q, "batch", "queries", "heads", "head dim")
    b, t, h, d = q.shape
    if k < 1:
        raise ValueError(f"k={k}: at least one entry must be picked")
    check_shape("weights", weights, b, t, h)
    check_shape("keys", keys, b, "entries", d)
    check_bounds(b, t, start=start, end=end)
    return implementation("index_topk", backend, q).index_topk(q, weights, keys, k=k, start=start, end=end)
