"""Lower bounds: what an op has to compute and to move, and the least time a device needs for it.

    limit = max(flops / peak flops, bytes / peak bytes)

FLOPs are the useful ones: the products that the mathematics asks for, without padding or recomputation; activations and
sums, below a hundredth of them, are not counted. Bytes are those of main memory: every tensor read or written once, a
token's row once however many experts it visits. Ids and fp32 numbers take 4 bytes.

n tokens · k slots (experts per token) · e experts · d width · f expert width · r = n k rows · s bytes of an element
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one op, or of several that run one after the other."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Peak(NamedTuple):
    """What a device reaches at most, per second, in one dtype, and who says so."""

    flops: float
    bytes: float
    source: str

    def seconds(self, work: Work) -> float:
        """The roofline limit: no implementation takes less time."""
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def bound(self, work: Work) -> str:
        """What the limit comes from, "compute" or "memory"."""
        return "compute" if work.flops / self.flops > work.bytes / self.bytes else "memory"


# devices -------------------------------------------------------------------------------------------------------------

# by the name CUDA gives: dense TFLOP/s in bf16, fp16 (fp32 accumulation) and fp32 (no tensor cores), and GB/s
_DATASHEETS = {
    "NVIDIA A100-PCIE-40GB": (312, 312, 19.5, 1555),
    "NVIDIA A100-SXM4-40GB": (312, 312, 19.5, 1555),
    "NVIDIA A100 80GB PCIe": (312, 312, 19.5, 1935),
    "NVIDIA A100-SXM4-80GB": (312, 312, 19.5, 2039),
    "NVIDIA L40S": (362, 362, 91.6, 864),
    "NVIDIA GeForce RTX 4090": (165, 165, 82.6, 1008),
    "NVIDIA H100 PCIe": (756, 756, 51.2, 2039),
    "NVIDIA H100 80GB HBM3": (989, 989, 66.9, 3350),
    "NVIDIA H200": (989, 989, 66.9, 4800),
    "NVIDIA B200": (2250, 2250, 75, 7700),
}
DTYPES = ("bfloat16", "float16", "float32")
# a large bf16 product and a copy, measured on an H100 SXM: what implementations are usually compared with
H100_ACHIEVED = Peak(798e12, 3.0e12, "a large bf16 product and a copy on an H100 SXM")


def datasheet(device: str, dtype: str) -> Peak | None:
    """Peaks of a device, by the name CUDA gives it, from its maker's datasheet (dense, at boost clocks).

    None for a device or dtype that is not in the table: measure it.
    """
    if device not in _DATASHEETS or dtype not in DTYPES:
        return None
    *teraflops, gigabytes = _DATASHEETS[device]
    return Peak(1e12 * teraflops[DTYPES.index(dtype)], 1e9 * gigabytes, "datasheet")


# mixture of experts --------------------------------------------------------------------------------------------------


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
