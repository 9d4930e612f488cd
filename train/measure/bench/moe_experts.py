"""The routed experts.

n tokens · k slots · e experts · d width · f expert width · r = n k rows in expert order
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import moe_route
from .. import roofline
from . import peers
from .ours import ours
from .task import Contender, Op, Run, Setting, Task

LIMIT = 10.0  # the SwiGLU clamp
SCALE = 1.5  # of the routing weights


@dataclass(frozen=True)
class Shape:
    """`tokens` are the lengths it is measured at unless others are asked for."""

    width: int
    expert_width: int
    experts: int
    slots: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(256, 128, 16, 4, (1024, 4096, 16384)),
    "wide": Shape(1024, 512, 16, 4, (1024, 4096)),
    "main": Shape(2048, 768, 128, 8, (8192, 32768)),  # Qwen3-30B-A3B's; most published numbers are at this one
    "v4-flash": Shape(4096, 2048, 256, 6, (8192, 32768)),
}


def shape_of(width: int, expert_width: int, experts: int, slots: int) -> Shape:
    if slots > experts:
        raise ValueError(f"slots={slots}: a token goes to at most as many experts as there are, {experts}")
    return Shape(width, expert_width, experts, slots, (1024, 4096))


def routing_inputs(setting: Setting) -> tuple[roofline.MoE, Tensor, Tensor, torch.Generator]:
    """Sizes, logits and bias, as routing and experts take them, and the generator that drew them."""
    shape, size = setting.shape, setting.dtype.itemsize
    m = roofline.MoE(setting.tokens, shape.width, shape.expert_width, shape.experts, shape.slots, size)
    g = setting.generator()
    return m, _logits(setting, m, g), 0.1 * setting.normal(g, m.experts, dtype=torch.float32), g


def tasks(setting: Setting) -> list[Task]:
    m, logits, bias, g = routing_inputs(setting)
    routing = moe_route(logits, top_k=m.slots, scale=SCALE, bias=bias, backend="eager")
    x = setting.normal(g, m.tokens, m.width)
    w13 = setting.normal(g, m.experts, 2 * m.expert_width, m.width).mul_(4 * m.width**-0.5)  # so that some clamp
    w2 = setting.normal(g, m.experts, m.width, m.expert_width).mul_(m.expert_width**-0.5)
    return [
        Task(
            name="experts",
            inputs={"x": x, "experts": routing.experts, "weights": routing.weights, "w13": w13, "w2": w2},
            learned=("x", "weights", "w13", "w2"),
            outputs=("out",),
            contenders=[
                *ours(setting, _experts, "moe_experts"),
                Contender("torch grouped_mm", lambda *inputs: (grouped_mm(*inputs),)),
                *peers.experts(m, LIMIT),
            ],
            forward=roofline.moe_forward(m, keep=False),
            training_forward=roofline.moe_forward(m),
            backward=roofline.moe_backward(m),
            kept=roofline.moe_kept(m) - x.nbytes,
        ),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "main,v4-flash", "cpu": "peer,wide"},
    data={
        "uniform": "every expert is as likely",
        "zipf": "the i-th expert's logit is log(i) below the first's: a few take most",
    },
    tasks=tasks,
    make=shape_of,
    format="WIDTHxEXPERT_WIDTHxEXPERTSxSLOTS",
)


def _logits(setting: Setting, m: roofline.MoE, g: torch.Generator) -> Tensor:
    logits = setting.normal(g, m.tokens, m.experts, dtype=torch.float32)
    if setting.data == "zipf":
        logits -= torch.arange(1, m.experts + 1, device=setting.device).log()
    return logits


# contenders ----------------------------------------------------------------------------------------------------------


def _experts(kernels: ModuleType, backend: str) -> Run:
    return lambda *inputs: (kernels.moe_experts(*inputs, limit=LIMIT, backend=backend),)


def grouped_mm(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """The experts by `F.grouped_mm`: rows gathered into expert order, everything else in operators of torch."""
    ids, order = experts.flatten().sort(stable=True)
    edges = torch.arange(1, len(w13) + 1, device=x.device)
    ends = torch.searchsorted(ids, edges).int()  # of each expert's rows
    rows = x.index_select(0, order // experts.shape[1])
    g, u = F.grouped_mm(rows, w13.mT, offs=ends).chunk(2, -1)
    a = F.silu(g.clamp(max=LIMIT)) * u.clamp(-LIMIT, LIMIT)
    a = (a * weights.flatten().index_select(0, order).unsqueeze(-1)).to(x.dtype)
    y = F.grouped_mm(a, w2.mT, offs=ends)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return y.index_select(0, inverse).view(*experts.shape, -1).sum(1)
