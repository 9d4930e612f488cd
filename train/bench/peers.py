"""Contenders from transformers, which is no dependency: they take part where it is installed, as with `abyssal[test]`.

Found at run time, never imported otherwise: this file is a comparison, and the rest of the package does without it.
"""

import importlib
import importlib.util
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..roofline import MoE
from .task import Contender

LIBRARY = "transformers"
BACKENDS = ("eager", "grouped_mm", "batched_mm")  # those that honour the clamp and have a backward pass


def experts(m: MoE, limit: float) -> list[Contender]:
    """The experts of its DeepSeek-V4 with each backend, on the inputs of `moe_experts`."""
    if not importlib.util.find_spec(LIBRARY):
        return [Contender(f"{LIBRARY} {name}", None, "not installed") for name in BACKENDS]
    gathered = 3 * m.rows * m.width * m.expert_width * m.itemsize  # batched_mm copies the weights for every row
    scratch = {"batched_mm": 2 * gathered}  # the copies, and the gradient of one at a time
    return [Contender(f"{LIBRARY} {name}", _experts(name, m, limit), scratch=scratch.get(name, 0)) for name in BACKENDS]


def _experts(backend: str, m: MoE, limit: float) -> Any:
    package = importlib.import_module(f"{LIBRARY}.models.deepseek_v4")
    modeling = importlib.import_module(f"{LIBRARY}.models.deepseek_v4.modeling_deepseek_v4")
    config = package.DeepseekV4Config(
        hidden_size=m.width,
        moe_intermediate_size=m.expert_width,
        n_routed_experts=m.experts,
        num_experts_per_tok=m.slots,
        swiglu_limit=limit,
        num_hidden_layers=1,
        experts_implementation=backend,
    )
    with torch.device("meta"):
        module = modeling.DeepseekV4Experts(config)

    def run(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        ours = {"gate_up_proj": w13, "down_proj": w2}
        return (torch.func.functional_call(module, ours, (x, experts, weights)),)

    return run


def versions() -> dict[str, str]:
    try:
        return {LIBRARY: metadata.version(LIBRARY)}
    except metadata.PackageNotFoundError:
        return {LIBRARY: "not installed"}
