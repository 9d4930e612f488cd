"""Lower bounds: what an op has to compute and to move, and the least time a device needs for it.

    limit = max(flops / peak flops, bytes / peak bytes)

FLOPs are the useful ones: the products that the mathematics asks for, over the pairs of query and key that are seen,
without padding or recomputation; activations and sums, below a hundredth of them, are not counted. Bytes are those of
main memory: every tensor read or written once, a row once however often it is gathered. Ids and fp32 numbers take 4
bytes.

device     work, peaks, limits
moe        routed experts
attention  sliding, compressed-sparse and heavily-compressed attention, the indexer and its loss
streams    what passes over memory: pooling, norms, rotation, mHC, Engram, number formats
head       linear cross-entropy; Muon's orthogonalisation
"""

from .attention import Attention, Indexer
from .device import DTYPES, H100_ACHIEVED, Peak, Work, datasheet
from .head import Head, NewtonSchulz
from .moe import (
    MoE,
    moe_backward,
    moe_combine,
    moe_down,
    moe_down_backward,
    moe_down_weight,
    moe_forward,
    moe_kept,
    moe_logits,
    moe_permutation,
    moe_route,
    moe_route_backward,
    moe_up,
    moe_up_backward,
    moe_up_weight,
)
from .streams import Engram, Hyper, Pool, elementwise

__all__ = [
    "DTYPES",
    "H100_ACHIEVED",
    "Attention",
    "Engram",
    "Head",
    "Hyper",
    "Indexer",
    "MoE",
    "NewtonSchulz",
    "Peak",
    "Pool",
    "Work",
    "datasheet",
    "elementwise",
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
