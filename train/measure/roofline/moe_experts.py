"""Routed experts: their products.

n tokens · k slots (experts per token) · e experts · d width · f expert width · r = n k rows · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


@dataclass(frozen=True)
class MoE:
    """Sizes of one layer of routed experts."""

    tokens: int
    width: int
    expert_width: int
    experts: int
    slots: int
    itemsize: int = 2

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """n, r, e, d, f, s."""
        return self.tokens, self.rows, self.experts, self.width, self.expert_width, self.itemsize

    @property
    def rows(self) -> int:
        return self.tokens * self.slots


def moe_up(m: MoE, keep: bool = True) -> Work:
    """Gate and up product with SwiGLU: reads x and w13, writes the activation, and the pre-activations if kept."""
    n, r, e, d, f, s = m.sizes
    return Work(4 * r * d * f, s * (n * d + 2 * e * d * f + r * f + (2 * r * f if keep else 0)))


def moe_down(m: MoE) -> Work:
    """Down product: reads the activation and w2, writes a row for each slot."""
    _, r, e, d, f, s = m.sizes
    return Work(2 * r * d * f, s * (r * f + e * d * f + r * d))


def moe_combine(m: MoE, shared: bool = False) -> Work:
    """Sum over slots: reads their rows (and the shared expert's), writes the output. Also the last step to dx."""
    n, r, _, d, _, s = m.sizes
    return Work(0, s * (r * d + n * d * (2 if shared else 1)))


def moe_forward(m: MoE, keep: bool = True) -> Work:
    """`keep`: the pre-activations are written for a backward pass."""
    return moe_up(m, keep) + moe_down(m) + moe_combine(m)


def moe_down_backward(m: MoE) -> Work:
    """Down product and SwiGLU backwards: reads dout, w2, h; writes dh, the activation again, dweights."""
    n, r, e, d, f, s = m.sizes
    return Work(2 * r * d * f, s * (n * d + e * d * f + 2 * r * f + 2 * r * f + r * f) + 4 * r)


def moe_up_backward(m: MoE) -> Work:
    """Up product backwards: reads dh and w13, writes a row for each slot; their sum is `moe_combine`."""
    _, r, e, d, f, s = m.sizes
    return Work(4 * r * d * f, s * (2 * r * f + 2 * e * d * f + r * d))


def moe_down_weight(m: MoE) -> Work:
    """dw2: reads dout and the activation, writes dw2."""
    n, r, e, d, f, s = m.sizes
    return Work(2 * r * d * f, s * (r * f + n * d + e * d * f))


def moe_up_weight(m: MoE) -> Work:
    """dw13: reads dh and x, writes dw13."""
    n, r, e, d, f, s = m.sizes
    return Work(4 * r * d * f, s * (2 * r * f + n * d + 2 * e * d * f))


def moe_backward(m: MoE) -> Work:
    return moe_down_backward(m) + moe_down_weight(m) + moe_up_backward(m) + moe_up_weight(m) + moe_combine(m)


def moe_kept(m: MoE) -> int:
    """Bytes that the experts need between forward and backward besides the routing: x and the pre-activations."""
    n, r, _, d, f, s = m.sizes
    return s * (n * d + 2 * r * f)
