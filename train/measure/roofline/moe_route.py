"""The router: its product, the choice of experts, and their order.

n tokens · k slots (experts per token) · e experts · d width · f expert width · r = n k rows · s bytes of an element
"""

from .device import Work
from .moe_experts import MoE


def moe_logits(m: MoE) -> Work:
    """The router's product, with fp32 weights, and the choice: reads x and the weights, writes scores and choice."""
    n, r, e, d, _, s = m.sizes
    return Work(2 * n * d * e, s * n * d + 4 * d * e + 4 * n * e + 8 * r)


def moe_route(m: MoE) -> Work:
    """The choice alone: reads logits, writes scores, ids and weights."""
    n, r, e, *_ = m.sizes
    return Work(0, 8 * n * e + 8 * r)


def moe_route_backward(m: MoE) -> Work:
    """Reads scores, ids and the weights' gradient, writes the logits' gradient."""
    return moe_route(m)


def moe_permutation(m: MoE) -> Work:
    """Expert order: reads ids, writes order and inverse; counts and offsets."""
    return Work(0, 12 * m.rows + 8 * m.experts)
