"""The router as launches: one for each direction of the choice, three to sort, two and one for the balance.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs · b sequences · t tokens of a sequence
"""

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device, registers
from . import kernels

SCORES = 2048  # of one program, about
PAIRS = 128  # of one program of the sort
SPAN = 2  # programs that share a row of its table
STRIPS = 64  # of a sequence, at most: each leaves sums of its own


def route_outputs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for scores `[n, e]`, experts and weights `[n, k]`."""
    n, e = logits.shape
    scores, weights = (logits.new_empty(n, width, dtype=torch.float32) for width in (e, top_k))
    return scores, logits.new_empty(n, top_k, dtype=torch.int64), weights


def route(
    logits: Tensor, bias: Tensor | None, given: Tensor | None, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, experts and weights; the experts are those given, where they are."""
    n, e = logits.shape
    logits, bias, given = (t if t is None else t.contiguous() for t in (logits, bias, given))
    scores, experts, weights = route_outputs(logits, top_k)
    grid, blocks = _rows(n, e, top_k)
    flags = {"BIASED": bias is not None, "GIVEN": given is not None}
    with on_device(logits):
        kernels.route_forward[grid](
            logits, bias, given, scores, experts, weights, n, e, top_k, scale, **flags, **blocks
        )
    return scores, experts, weights


def route_backward(
    dscores: Tensor | None, dweights: Tensor | None, scores: Tensor, experts: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """The logits' gradient `[n, e]`."""
    (n, e), k = scores.shape, experts.shape[1]
    dscores, dweights = (t if t is None else t.contiguous() for t in (dscores, dweights))
    dlogits = scores.new_empty(scores.shape, dtype=dtype)
    grid, blocks = _rows(n, e, k)
    flags = {"DSCORES": dscores is not None, "DWEIGHTS": dweights is not None}
    with on_device(scores):
        kernels.route_backward[grid](dscores, dweights, scores, experts, dlogits, n, e, k, scale, **flags, **blocks)
    return dlogits


def _rows(n: int, e: int, k: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and blocks of the router, the same whatever the number of tokens."""
    wide = next_power(e)
    rows = max(SCORES // wide, 1)
    return (triton.cdiv(n, rows),), {"ROWS": rows, "E": wide, "K": next_power(k), "num_warps": 4 if wide <= 2048 else 8}


def _at_once(wide: int) -> int:
    """Spans or strips of so many experts that are added up at once."""
    return min(max(4096 // wide, 16), 64)


def permutation_outputs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for order `[r]`, counts `[e]` and inverse `[n, k]`."""
    empty = experts.new_empty
    return empty(experts.numel()), empty(num_experts), empty(experts.shape)


def permutation(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Order, counts and inverse, by a counting sort: how many pairs of each expert in each span, then their places."""
    experts, real = experts.contiguous(), real if real is None else real.contiguous()
    r, k = experts.numel(), experts.shape[1]
    order, counts, inverse = permutation_outputs(experts, num_experts)
    blocks, wide = triton.cdiv(r, PAIRS), next_power(num_experts, 2)
    spans = triton.cdiv(blocks, SPAN)
    table, counted, before, offsets = (
        experts.new_empty(rows, wide, dtype=torch.int32) for rows in (spans, spans if real is not None else 0, spans, 1)
    )
    with on_device(experts):
        kernels.count[(spans,)](
            experts, real, table, counted, r, num_experts, k,
            REAL=real is not None, SPAN=SPAN, PAIRS=PAIRS, E=wide,
        )  # fmt: skip
        kernels.scan[(1,)](
            table, table if real is None else counted, before, offsets, counts, num_experts, spans,
            E=wide, SPANS=_at_once(wide), **registers(8),
        )  # fmt: skip
        kernels.place[(blocks,)](
            experts, before, offsets, order, inverse, r, num_experts,
            SPAN=SPAN, PAIRS=PAIRS, STEP=min(PAIRS, 64), E=wide, **registers(4),
        )  # fmt: skip
    return order, counts, inverse


def balance_outputs(scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the loss, counts `[e]`, and what the gradient needs: slopes `[b, e]` and the share of a sequence."""
    b, _, e = scores.shape
    loss, share = scores.new_empty(()), scores.new_empty((), dtype=torch.float32)
    return loss, scores.new_empty(e, dtype=torch.int64), scores.new_empty(b, e, dtype=torch.float32), share


def balance(scores: Tensor, experts: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `balance_outputs`."""
    scores, experts, real = (x if x is None else x.contiguous() for x in (scores, experts, real))
    (b, t, e), k = scores.shape, experts.shape[2]
    wide = next_power(e, 2)
    rows = max(SCORES // wide, 1)
    steps = max(triton.cdiv(triton.cdiv(t, rows), STRIPS), 1)
    strips = triton.cdiv(t, rows * steps)
    shares, visits = (scores.new_empty(b, strips, wide, dtype=dtype) for dtype in (torch.float32, torch.int32))
    lengths = visits.new_empty(b, strips)
    found = balance_outputs(scores)
    with on_device(scores):
        kernels.balance_strips[(strips, b)](
            scores, experts, real, shares, visits, lengths, t, e, k, strips, steps,
            REAL=real is not None, ROWS=rows, E=wide, **registers(4),
        )  # fmt: skip
        kernels.balance_sum[(1,)](
            shares, visits, lengths, *found, b, e, k, strips, STRIPS=_at_once(wide), E=wide, **registers(8)
        )
    return found


def balance_backward(dloss: Tensor, scores: Tensor, real: Tensor | None, slopes: Tensor, share: Tensor) -> Tensor:
    """The scores' gradient `[b, t, e]`."""
    scores, real = scores.contiguous(), real if real is None else real.contiguous()
    b, t, e = scores.shape
    dscores, wide = scores.new_empty(scores.shape), next_power(e, 2)
    rows = max(SCORES // wide, 1)
    with on_device(scores):
        kernels.balance_backward[(triton.cdiv(b * t, rows),)](
            dloss, scores, real, slopes, share, dscores, b * t, t, e,
            REAL=real is not None, ROWS=rows, E=wide, **registers(4),
        )  # fmt: skip
    return dscores
