"""The router and the expert order as launches: one for each direction of the router, two around a cumsum to sort.

n tokens · e experts · k experts per token · r = n k (token, slot) pairs
"""

import torch
import triton
from torch import Tensor

from ...triton.launch import next_power, on_device
from . import kernels

SCORES = 2048  # of one program, about
PAIRS = 128  # of one program of the sort
SPAN = 8  # programs that share a column of its table


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


def permutation_outputs(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for order `[r]`, counts `[e]` and inverse `[n, k]`."""
    empty = experts.new_empty
    return empty(experts.numel()), empty(num_experts), empty(experts.shape)


def permutation(experts: Tensor, num_experts: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Order, counts and inverse, by a counting sort: how many pairs of each expert in each span, then their places."""
    experts, real = experts.contiguous(), real if real is None else real.contiguous()
    r, k = experts.numel(), experts.shape[1]
    order, counts, inverse = permutation_outputs(experts, num_experts)
    blocks = triton.cdiv(r, PAIRS)
    spans = triton.cdiv(blocks, SPAN)
    table, counted = experts.new_empty(2, num_experts + 1, spans, dtype=torch.int32)
    with on_device(experts):
        kernels.count[(spans,)](
            experts, real, table, counted, r, num_experts, k, spans,
            REAL=real is not None, SPAN=SPAN, PAIRS=PAIRS, E=next_power(num_experts + 1),
        )  # fmt: skip
        ends = table.flatten().cumsum(0)
        torch.sum(counted[:-1], dim=1, out=counts)
        kernels.place[(blocks,)](
            experts, ends, table, order, inverse, r, num_experts, spans, SPAN=SPAN, PAIRS=PAIRS, STEP=min(PAIRS, 64)
        )
    return order, counts, inverse
