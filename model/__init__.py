"""The modules: one concept per file."""

from .config import EngramConfig, ModelConfig
from .generation.generate import generate
from .interchange import convert_pretrained, load_pretrained, save_pretrained
from .transformer import Output, Transformer

__all__ = [
    "EngramConfig",
    "ModelConfig",
    "Output",
    "Transformer",
    "convert_pretrained",
    "generate",
    "load_pretrained",
    "save_pretrained",
]
