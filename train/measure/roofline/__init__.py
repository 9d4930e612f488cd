"""Lower bounds: what an op has to compute and to move, and the least time a device needs for it.

    limit = max(flops / peak flops, bytes / peak bytes)

FLOPs are the useful ones: the products that the mathematics asks for, over the pairs of query and key that are seen,
without padding or recomputation; activations and sums, below a hundredth of them, are not counted. Bytes are those of
main memory: every tensor read or written once, a row once however often it is gathered. Ids and fp32 numbers take 4
bytes.

A file per op that is counted, and device.py: work, peaks, limits.
"""

from .attention import Attention
from .cross_entropy import CrossEntropy
from .device import DTYPES, GPUS, H100_ACHIEVED, Peak, Work, datasheet, elementwise
from .engram import Engram
from .hyper import Hyper
from .index_loss import index_loss, index_loss_backward
from .index_topk import Indexer
from .moe_experts import (
    MoE,
    moe_backward,
    moe_combine,
    moe_down,
    moe_down_backward,
    moe_down_weight,
    moe_forward,
    moe_kept,
    moe_up,
    moe_up_backward,
    moe_up_weight,
)
from .moe_route import moe_logits, moe_permutation, moe_route, moe_route_backward
from .newton_schulz import NewtonSchulz
from .pool import Pool

__all__ = [
    "DTYPES",
    "GPUS",
    "H100_ACHIEVED",
    "Attention",
    "CrossEntropy",
    "Engram",
    "Hyper",
    "Indexer",
    "MoE",
    "NewtonSchulz",
    "Peak",
    "Pool",
    "Work",
    "datasheet",
    "elementwise",
    "index_loss",
    "index_loss_backward",
    "moe_backward",
    "moe_combine",
    "moe_down",
    "moe_down_backward",
    "moe_down_weight",
    "moe_forward",
    "moe_kept",
    "moe_logits",
    "moe_permutation",
    "moe_route",
    "moe_route_backward",
    "moe_up",
    "moe_up_backward",
    "moe_up_weight",
]
