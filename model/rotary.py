"""Which rotation a layer uses: one base and one table for everything in the layer (V4 2.3; spec B.2.3).

Pure sliding-window layers (and the MTP block) turn by theta = rope_theta without YaRN; layers with a compressor by
compress_rope_theta with YaRN, for queries, window keys, entries, index queries and keys, and the inverse turn of the
output.
"""

import functools

from torch import Tensor

from ..kernels import rope_frequencies, rope_rotation
from .config import ModelConfig
from .layout import Layout


def rotation(config: ModelConfig, layer: int, positions: Tensor) -> Tensor:
    """exp(i t f) for positions [b|1, t]: complex [b|1, t, qk_rope_head_dim / 2]."""
    return rope_rotation(positions, frequencies(config, layer).to(positions.device))


def token_rotation(config: ModelConfig, layer: int, layout: Layout) -> Tensor:
    """The rotation of the tokens themselves; layers of one base share it."""
    base = ("rotation", config.compress_ratio(layer) > 0)
    return layout.once(base, lambda: rotation(config, layer, layout.positions))


def frequencies(config: ModelConfig, layer: int) -> Tensor:
    """f, float32 [qk_rope_head_dim / 2]."""
    return _frequencies(config, config.compress_ratio(layer) > 0)


@functools.lru_cache(maxsize=64)
def _frequencies(config: ModelConfig, compressed: bool) -> Tensor:
    theta, yarn = (config.compress_rope_theta, config.rope_scaling) if compressed else (config.rope_theta, None)
    return rope_frequencies(config.qk_rope_head_dim, theta, **(yarn.arguments() if yarn else {}))
