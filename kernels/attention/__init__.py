"""Attention over a sliding window and compressed entries with a sink, in one softmax (V4 2.3; spec B.2.4).

    s_k = scale <q_h, kv_k>          k over window rows and compressed entries; K = V, one head shared by all queries
    o_h = sum_k exp(s_k) kv_k / (sum_k exp(s_k) + exp(sink_h))

b batch · t queries · h query heads · d head dim · s window rows · p compressed entries · k picked entries
"""

from torch import Tensor

from ..backend import implementation
from ..shapes import check_bounds, check_shape


def attention(
    q: Tensor,
    kv: Tensor,
    compressed: Tensor | None,
    sink: Tensor,
    *,
    window: int,
    scale: float,
    window_start: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sliding, compressed-sparse or heavily-compressed attention: which one depends on the entries that are given.

    Query t lies at row s - T + t of `kv` and sees rows [max(window_start, row - window + 1), row]. Of `compressed` it
    sees the entries [start, end) (HCA) or those that `index` lists (CSA); the same tokens may be seen through both, and
    an entry that is listed twice counts twice. A query that sees nothing gets exactly 0 and lse = sink.

    Args:
        q: [b, t, h, d], already normed and rotated; Flash: h = 64, d = 512.
        kv: [b, s, d], s >= t: the rows before the last t are the past of a cache.
        compressed: [b, p, d] or None (pure sliding window).
        sink: [h] float32 logits that add exp(sink) to the denominator and carry no value.
        window: how many rows a query sees at most, itself included (128).
        scale: d ** -0.5; V4 has no YaRN temperature.
        window_start: [b|1, t] first row of the query's document; None = 0.
        start, end: [b|1, t] range of visible entries.
        index: [b, t, k] picked entries, -1 = none; replaces the range.

    Returns:
        out [b, t, h, d] in q's dtype and the sink-inclusive log-sum-exp [b, t, h], float32 (float64 of float64), which
        is not differentiable.

    Raises:
        ValueError: shapes that do not fit, or `compressed` without a range and without an index.
    """
    check_shape("q", q, "batch", "queries", "heads", "head dim")
    b, t, h, d = q.shape
    check_bounds(b, t, window_start=window_start, start=start, end=end)
    if kv.ndim != 3 or kv.shape[0] != b or kv.shape[1] < t or kv.shape[2] != d:
        raise ValueError(f"kv has shape {tuple(kv.shape)}: with q {tuple(q.shape)} it must be [{b}, at least {t}, {d}]")
    if sink.shape != (h,):
        raise ValueError(f"sink has shape {tuple(sink.shape)}: one logit per head, [{h}], is needed")
    if window < 1:
        raise ValueError(f"window={window}: at least 1 (the query itself)")
    if compressed is not None:
        check_shape("compressed", compressed, b, "entries", d)
        if index is None and (start is None or end is None):
            raise ValueError("compressed entries need either index or both start and end")
        if index is not None:
            check_shape("index", index, b, t, "picks")
    run = implementation("attention", backend, q).attention
    return run(
        q,
        kv,
        compressed,
        sink,
        window=window,
        scale=scale,
        window_start=window_start,
        start=start,
        end=end,
        index=index,
    )
