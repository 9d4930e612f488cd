"""The released number formats: codes and scales of activations, index keys and weights, and back; the rotation.

t rows · d channels · index keys of i channels
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ....kernels import quantize
from .. import roofline
from .ours import ours
from .task import Contender, Op, Run, Setting, Task

E4M3, E2M1 = 128, 32  # channels that share a scale, of activations and of index keys


@dataclass(frozen=True)
class Shape:
    width: int
    index_dim: int
    tokens: tuple[int, ...]


SHAPES = {
    "peer": Shape(256, 32, (4096, 16384)),
    "v4-flash": Shape(4096, 128, (8192, 65536)),
}


def shape_of(width: int, index_dim: int) -> Shape:
    if width % E4M3 or index_dim % E2M1 or index_dim & (index_dim - 1):
        raise ValueError(
            f"width={width}, index_dim={index_dim}: multiples of {E4M3} and {E2M1}, the latter a power of 2"
        )
    return Shape(width, index_dim, (4096,))


def tasks(setting: Setting) -> list[Task]:
    shape, t, g, s = setting.shape, setting.tokens, setting.generator(), setting.dtype.itemsize
    x, keys = setting.normal(g, t, shape.width), setting.normal(g, t, shape.index_dim)
    codes, scales = quantize(x, "e4m3", block=E4M3, backend="eager")
    wide, narrow, coded = x.numel(), keys.numel(), ("codes", "scales")

    def torchs(format: str) -> list[Contender]:
        return [Contender("torch", lambda values: coded_by_torch(values, format))]

    return [
        Task(
            name="e4m3",
            inputs={"x": x},
            learned=(),
            outputs=coded,
            exact=coded,
            contenders=[*ours(setting, _quantize("e4m3", E4M3), "quant"), *torchs("e4m3")],
            forward=roofline.elementwise(wide, s, 1) + roofline.elementwise(wide // E4M3, 0, 1),
        ),
        Task(
            name="e2m1",
            inputs={"keys": keys},
            learned=(),
            outputs=coded,
            exact=coded,
            contenders=[*ours(setting, _quantize("e2m1", E2M1), "quant"), *torchs("e2m1")],
            forward=roofline.elementwise(narrow // 2, 2 * s, 1) + roofline.elementwise(narrow // E2M1, 0, 1),
        ),
        Task(
            name="e4m3 back",
            inputs={"codes": codes, "scales": scales},
            learned=(),
            outputs=("x",),
            exact=("x",),
            contenders=[
                *ours(setting, _dequantize(setting.dtype), "quant"),
                Contender("torch", lambda codes, scales: (decoded_by_torch(codes, scales, setting.dtype),)),
            ],
            forward=roofline.elementwise(wide, 1, s) + roofline.elementwise(wide // E4M3, 1, 0),
        ),
        Task(
            name="e4m3, straight through",
            inputs={"x": x},
            learned=("x",),
            outputs=("rounded",),
            contenders=[
                *ours(setting, _fake_quant, "quant"),
                Contender("torch", lambda x: (rounded_by_torch(x),)),
            ],
            forward=roofline.elementwise(wide, s, s),
            backward=roofline.elementwise(wide, 0, 0),
        ),
        Task(
            name="hadamard",
            inputs={"keys": keys},
            learned=("keys",),
            outputs=("rotated",),
            contenders=[*ours(setting, _hadamard, "quant"), Contender("torch matmul", rotated_by_torch)],
            forward=roofline.elementwise(narrow, s, s),
            backward=roofline.elementwise(narrow, s, s),
        ),
    ]


OP = Op(
    shapes=SHAPES,
    defaults={"cuda": "v4-flash", "cpu": "peer"},
    data={"normal": "values of unit variance"},
    tasks=tasks,
    make=shape_of,
    format="WIDTHxINDEX_DIM",
)


def _quantize(format: str, block: int):
    def make(kernels: ModuleType, backend: str) -> Run:
        return lambda x: tuple(kernels.quantize(x, format, block=block, backend=backend))

    return make


def _dequantize(dtype: torch.dtype):
    def make(kernels: ModuleType, backend: str) -> Run:
        return lambda *coded: (kernels.dequantize(*coded, block=E4M3, dtype=dtype, backend=backend),)

    return make


def _fake_quant(kernels: ModuleType, backend: str) -> Run:
    return lambda x: (kernels.fake_quant(x, "e4m3", block=E4M3, backend=backend),)


def _hadamard(kernels: ModuleType, backend: str) -> Run:
    return lambda x: (kernels.hadamard(x, backend=backend),)


def coded_by_torch(x: Tensor, format: str) -> tuple[Tensor, ...]:
    """Scales from the exponent of amax / top, rounded up; codes by torch's own conversion, or by steps of 0.5, 1, 2."""
    block, top, floor = (E4M3, 448.0, 1e-4) if format == "e4m3" else (E2M1, 6.0, 6 * 2.0**-126)
    values = x.float().unflatten(-1, (-1, block))
    mantissa, exponent = torch.frexp(values.abs().amax(-1, keepdim=True).clamp_min(floor) / top)
    exponent = exponent - (mantissa == 0.5).int()
    scaled = torch.ldexp(values, -exponent)
    scales = torch.ldexp(torch.ones_like(mantissa), exponent).squeeze(-1).to(torch.float8_e8m0fnu)
    if format == "e4m3":
        return scaled.flatten(-2).to(torch.float8_e4m3fn), scales
    size = scaled.abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, 2 + size, 4 + size / 2)).round()
    code = (code + 8 * scaled.signbit()).flatten(-2).to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, scales


def decoded_by_torch(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    values = codes.float().unflatten(-1, (-1, E4M3)) * scales.float().unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def rounded_by_torch(x: Tensor) -> Tensor:
    """As it is read back, with the gradient of the identity."""
    codes, scales = coded_by_torch(x, "e4m3")
    return x + (decoded_by_torch(codes, scales, x.dtype) - x).detach()


def rotated_by_torch(x: Tensor) -> tuple[Tensor, ...]:
    """A product with the matrix, which is made in the same pass: it is small."""
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return ((x.float() @ (matrix * x.shape[-1] ** -0.5)).to(x.dtype),)
