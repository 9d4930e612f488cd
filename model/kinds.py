"""The kinds of a layer's attention, by their names in a released config.json: what it reads beside its own window."""

from collections.abc import Sequence

SLIDING = "sliding_attention"  # nothing
SPARSE = "compressed_sparse_attention"  # the compressed entries that an indexer picks (CSA)
HEAVY = "heavily_compressed_attention"  # every compressed entry, of many tokens each (HCA)
LAYER_TYPES = (SLIDING, SPARSE, HEAVY)


def kinds_of(ratios: Sequence[int]) -> tuple[str, ...]:
    """The kinds of layers that have so many tokens per compressed entry, unless a configuration names them."""
    return tuple({0: SLIDING, 4: SPARSE}.get(ratio, HEAVY) for ratio in ratios)
