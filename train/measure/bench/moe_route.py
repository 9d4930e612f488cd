"""The router's choice of experts, with their order.

n tokens · k slots · e experts
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import roofline
from . import moe_experts
from .moe_experts import SCALE, Shape, routing_inputs
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task


def tasks(setting: Setting) -> list[Task]:
    shape = setting.shape
    m, logits, bias, _ = routing_inputs(setting)
    return [
        Task(
            name="routing",
            inputs={"logits": logits, "bias": bias},
            learned=("logits",),
            outputs=("weights", "counts"),
            contenders=[
                *ours(setting, _route(shape), "moe_route"),
                Contender("torch topk, sort", lambda z, b: topk_and_sort(z, b, m.slots)),
            ],
            forward=roofline.moe_route(m) + roofline.moe_permutation(m),
            training_forward=roofline.moe_route(m) + roofline.moe_permutation(m),
            backward=roofline.moe_route_backward(m),
            kept=4 * m.tokens * m.experts + 8 * m.rows,  # scores and ids
        ),
    ]


OP = Op(
    shapes=moe_experts.SHAPES,
    defaults=moe_experts.OP.defaults,
    data=moe_experts.OP.data,
    tasks=tasks,
    make=moe_experts.OP.make,
    format=moe_experts.OP.format,
)


def _route(shape: Shape) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            chosen = kernels.moe_route(logits, top_k=shape.slots, scale=SCALE, bias=bias, backend=backend)
            return chosen.weights, kernels.moe_permutation(chosen.experts, shape.experts, backend=backend).counts

        return run

    return make


def topk_and_sort(logits: Tensor, bias: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Scores, choice and expert order in operators of torch: ties and rows with NaN are left to `topk`."""
    scores = F.softplus(logits).sqrt()
    ids = (scores + bias).topk(slots).indices
    chosen = scores.gather(-1, ids)
    sorted_ids, order = ids.flatten().sort(stable=True)
    torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    edges = torch.arange(logits.shape[1] + 1, device=order.device)
    counts = torch.searchsorted(sorted_ids, edges).diff()
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * SCALE, counts
