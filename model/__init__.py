"""The modules: one concept per file."""

from .config import EngramConfig, ModelConfig
from .generate import generate
from .huggingface import load_pretrained, save_pretrained
from .transformer import Output, Transformer

__all__ = ["EngramConfig", "ModelConfig", "Output", "Transformer", "generate", "load_pretrained", "save_pretrained"]
