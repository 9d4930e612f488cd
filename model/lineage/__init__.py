"""The generations before V4, module by module beside it: what changed, and what it cost.

    V3     multi-head latent attention (MLA) over all tokens; dense first layers; sigmoid routing within groups
    V3.2   the same with a lightning indexer over raw tokens: top-2048 of them (DSA)

config         their released keys
attention      MLA, expanded or absorbed, and DSA
moe            group-limited routing, dense layers
cache          one latent and one index key per token
transformer    the whole model
names          under which names checkpoints store it
"""

from .cache import LatentCache
from .config import LineageConfig
from .transformer import LineageTransformer

__all__ = ["LatentCache", "LineageConfig", "LineageTransformer"]
