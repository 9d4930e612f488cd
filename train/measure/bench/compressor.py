"""The compressor's pooling, and the norm and rotation that queries, keys and entries go through.

t tokens · d head dim · h heads · m ratio · c = 2 with overlap
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import rope_frequencies, rope_rotation
from .. import roofline
from .ours import Make, ours
from .task import Contender, Op, Run, Setting, Task

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """`ratio` with overlap in CSA, `heavy` without in HCA; `heads` queries of `dim`, `rotary` of them rotated."""

    heads: int
    dim: int
    rotary: int
    ratio: int
    heavy: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(4, 64, 16, 4, 32, (4096, 16384)),
    "v4-flash": Shape(64, 512, 64, 4, 128, (8192, 65536)),
}


def tasks(setting: Setting) -> list[Task]:
    """Pooling of both kinds, in float32 as in the release, and the queries' norm and rotation."""
    shape, g = setting.shape, setting.generator()
    return [
        _pooling("pool, csa", setting, shape.ratio, True, g),
        _pooling("pool, hca", setting, shape.heavy, False, g),
        _norm_rope(setting, g),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash", "cpu": "peer"},
    data={"normal": "values and logits of unit variance"},
    tasks=tasks,
    tests=("test_pool.py", "test_norm_rope.py", "triton/test_pool_gpu.py", "triton/test_norm_rope_gpu.py"),
    make=lambda h, d, r, m, heavy: Shape(h, d, r, m, heavy, (4096,)),
    format="HEADSxDIMxROTARYxRATIOxHEAVY",
)


def _pooling(name: str, setting: Setting, ratio: int, overlap: bool, g: torch.Generator) -> Task:
    shape, single = setting.shape, torch.float32
    channels = (2 if overlap else 1) * shape.dim
    work = roofline.Pool(setting.tokens, shape.dim, ratio, overlap, single.itemsize)
    inputs = {x: setting.normal(g, 1, setting.tokens, channels, dtype=single) for x in ("kv", "gate")}
    return Task(
        name=name,
        inputs={**inputs, "bias": setting.normal(g, ratio, channels, dtype=single)},
        learned=("kv", "gate", "bias"),
        outputs=("entries",),
        contenders=[
            *ours(setting, _pool(ratio, overlap), "pool"),
            Contender("torch", lambda kv, gate, bias: (softmax_pool(kv, gate, bias, ratio, overlap),)),
        ],
        forward=work.forward,
        backward=work.backward,
    )


def _pool(ratio: int, overlap: bool) -> Make:
    def make(kernels: ModuleType, backend: str) -> Run:
        return lambda *inputs: (kernels.pool(*inputs, ratio=ratio, overlap=overlap, backend=backend),)

    return make


def softmax_pool(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> Tensor:
    """In operators of torch: windows, with overlap the one before beside each, a softmax over the slots."""
    whole = kv.shape[1] // ratio * ratio
    kv, gate = (x[:, :whole].unflatten(1, (-1, ratio)) for x in (kv, gate))
    gate = gate + bias
    if overlap:
        d = kv.shape[-1] // 2
        kv, gate = (
            torch.cat([F.pad(x[:, :-1, :, :d], (0, 0, 0, 0, 1, 0), value=empty), x[..., d:]], 2)
            for x, empty in ((kv, 0.0), (gate, float("-inf")))
        )
    return (gate.softmax(2) * kv).sum(2)


def _norm_rope(setting: Setting, g: torch.Generator) -> Task:
    shape, t, size = setting.shape, setting.tokens, setting.dtype.itemsize
    positions = torch.arange(t, device=setting.device)[None]
    rotation = rope_rotation(positions, rope_frequencies(shape.rotary, 1e4).to(setting.device))
    values = t * shape.heads * shape.dim
    return Task(
        name="norm, rope",
        inputs={"q": setting.normal(g, 1, t, shape.heads, shape.dim), "rotation": rotation},
        learned=("q",),
        outputs=("rotated",),
        contenders=[*ours(setting, _normed_and_rotated, "norm_rope"), Contender("torch", norm_and_rope)],
        forward=roofline.elementwise(values, size, size),
        backward=roofline.elementwise(values, 2 * size, size),
    )


def _normed_and_rotated(kernels: ModuleType, backend: str) -> Run:
    def run(q: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
        if hasattr(kernels, "norm_rope"):
            return (kernels.norm_rope(q, None, EPS, rotation, backend=backend),)
        return (kernels.rope(kernels.rms_norm(q, None, EPS, backend=backend), rotation, backend=backend),)

    return run


def norm_and_rope(q: Tensor, rotation: Tensor) -> tuple[Tensor, ...]:
    """`F.rms_norm`, then a complex product in float32."""
    dim = 2 * rotation.shape[-1]
    still, turned = F.rms_norm(q, q.shape[-1:], eps=EPS).split([q.shape[-1] - dim, dim], -1)
    pairs = torch.view_as_complex(turned.float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation.unsqueeze(2)).flatten(-2).to(q.dtype)
    return (torch.cat([still, turned], -1),)
