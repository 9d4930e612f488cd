"""Quantisation-aware training: the model computes with what the released formats would hold (V4 3.4; spec B.10).

    y = Q(W) Q(x)          gradients pass as if Q were the identity (straight-through); the weights stay what they are

    family    what is rounded                                                  format
    experts   the routed experts' weights                                      fp4: E2M1, 32 of a row share a scale;
                                                                               fp8: E4M3, blocks of 128 by 128
    linears   attention's, the shared expert's, the index queries' and MTP's   fp8: E4M3, weights in blocks of 128 by
              projections: weights and inputs                                  128, inputs in groups of 128
    index     index queries and keys, Hadamard-rotated                         fp4: E2M1 in groups of 32

Compressors, routers, embedding, head and norms are exact in the release and here. A family that is on is on whenever
the model computes, in training and after it. The backward pass keeps a rounded copy of each weight that is rounded.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import fake_quant, hadamard
from .config import ModelConfig

WEIGHT_BLOCK, INPUT_BLOCK, FP4_BLOCK = (128, 128), (1, 128), (1, 32)


class RoundedLinear(nn.Linear):
    """A linear map without bias whose weight and input are rounded to E4M3; the parameter itself is exact."""

    parts = 1  # matrices that lie one above the other in the weight: no block reaches from one into the next

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_input(x), rounded_weight(self.weight, "fp8", self.parts))


def linear(config: ModelConfig, inputs: int, outputs: int, parts: int = 1) -> nn.Linear:
    """A linear map of the family `linears`."""
    if rounding(config, "linears") is None:
        return nn.Linear(inputs, outputs, bias=False)
    module = RoundedLinear(inputs, outputs, bias=False)
    module.parts = parts
    return module


def rounding(config: ModelConfig, family: str) -> str | None:
    """The format of a family, None where it is exact."""
    aware = config.quantization_aware
    return None if aware is None else getattr(aware, family)


def rounded_weight(weight: Tensor, format: str | None, parts: int = 1) -> Tensor:
    """Weights [..., o, d], `parts` matrices above each other, as `fp8` or `fp4` holds them; as they are for None."""
    if format is None:
        return weight
    codes, block = ("e4m3", WEIGHT_BLOCK) if format == "fp8" else ("e2m1", FP4_BLOCK)
    return fake_quant(weight.unflatten(-2, (parts, -1)), codes, block=block).flatten(-3, -2)


def rounded_input(x: Tensor) -> Tensor:
    """Activations [..., t, d] in E4M3."""
    return fake_quant(x, "e4m3", block=INPUT_BLOCK)


def rounded_index(x: Tensor) -> Tensor:
    """Index queries or keys [..., d] in E2M1. They come back rotated: their products are those with rotated ones."""
    return fake_quant(hadamard(x), "e2m1", block=FP4_BLOCK)
