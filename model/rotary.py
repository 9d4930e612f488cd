"""Which rotation a layer uses: one base and one table for everything in the layer (V4 2.3; spec B.2.3).

Pure sliding-window layers (and the MTP block) turn by theta = rope_theta without YaRN; layers with a compressor by
compress_rope_theta with YaRN, for queries, window keys, entries, index queries and keys, and the inverse turn of the
output.
"""

import torch
from torch import Tensor

from ..kernels import rope_frequencies, rope_rotation
from .config import ModelConfig, RopeScaling
from .layout import Entries, Layout, remembered


def token_rotation(config: ModelConfig, layer: int, layout: Layout) -> Tensor:
    """exp(i t f) at the tokens' positions: complex [b|1, t, qk_rope_head_dim / 2]; layers of one base share it."""
    base = config.compress_ratio(layer) > 0
    return layout.once(("rotation", base), lambda: _rotation(config, base, layout.positions))


def entry_rotation(config: ModelConfig, layer: int, layout: Layout, entries: Entries) -> Tensor:
    """The same at the positions of a layer's entries, [b|1, p, ...]; layers of one ratio share it."""
    key = "entry rotation", config.compress_ratio(layer)
    return layout.once(key, lambda: _rotation(config, True, entries.positions))


def frequencies(config: ModelConfig, layer: int) -> Tensor:
    """f, float32 [qk_rope_head_dim / 2]."""
    return _frequencies(config, config.compress_ratio(layer) > 0, torch.device("cpu"))


@remembered
def scaled_frequencies(width: int, theta: float, yarn: RopeScaling | None, device: torch.device) -> Tensor:
    """`rope_frequencies`, on the device once and for all: a copy there makes the host wait."""
    return rope_frequencies(width, theta, **(yarn.arguments() if yarn else {})).to(device)


def _rotation(config: ModelConfig, compressed: bool, positions: Tensor) -> Tensor:
    return rope_rotation(positions, _frequencies(config, compressed, positions.device))


def _frequencies(config: ModelConfig, compressed: bool, device: torch.device) -> Tensor:
    theta, yarn = (config.compress_rope_theta, config.rope_scaling) if compressed else (config.rope_theta, None)
    return scaled_frequencies(config.qk_rope_head_dim, theta, yarn, device)
