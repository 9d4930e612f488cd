"""The number formats: the definition against the bits of the formats and a search; the engines and the numpy steps have
the definition's bits.

v values of a probe · D channels · N x K a weight
"""

import importlib
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from oracle import hold
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import dequantize, e2m1_to_e4m3, fake_quant, hadamard, quant, quantize
from abyssal.kernels.quant import reference
from abyssal.kernels.quant.step import dequantize_step, quantize_e4m3_step

HALVES = (torch.bfloat16, torch.float16)
FLOATS = {"eager": (torch.float64, torch.float32, *HALVES), "triton": (torch.float32, *HALVES)}
TOPS = {"e4m3": 448.0, "e2m1": 6.0}
FLOORS = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
formats = pytest.mark.parametrize("format", ["e4m3", "e2m1"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def by_triton(by_triton, emulated, monkeypatch):
    """Programs so small that the larger blocks need several rounds, and that there are several programs."""
    from abyssal.kernels.quant.triton import launch

    if emulated:
        monkeypatch.setattr(launch, "HELD", 128)
        monkeypatch.setattr(launch, "FEW", 64)


@pytest.fixture
def large_programs(engine, monkeypatch):
    """One program for many values: the interpreter's time is by the operation, not by the value."""
    if engine == "triton":
        from abyssal.kernels.quant.triton import launch

        monkeypatch.setattr(launch, "HELD", 4096)
        monkeypatch.setattr(launch, "FEW", 1 << 16)


@pytest.fixture
def real_memory(monkeypatch, by_triton):
    """Fake tensors cannot be filled with NaN, and gigabytes need not be."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def same(a, b):
    """Equal bits, but for those of a NaN."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype in (torch.uint8, E8M0):
        return torch.equal(bits(a), bits(b))
    a, b = (x.float() if x.dtype == E4M3 else x for x in (a, b))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


def agrees(engine, x, format, block):
    """Codes, scales, values in every dtype, and the two in one, all as defined; nothing is written to x."""
    want, before = quantize(x.cpu(), format, block=block, backend="reference"), x.clone()
    got = quantize(x, format, block=block, backend=engine)
    assert all(same(a, b) and a.is_contiguous() for a, b in zip(got, want))
    for dtype in {torch.float32, torch.float64, x.dtype}:
        values = dequantize(*want, block=block, dtype=dtype, backend="reference")
        assert same(dequantize(*got, block=block, dtype=dtype, backend=engine), values)
    y = fake_quant(x, format, block=block, backend=engine)
    assert same(y, fake_quant(x.cpu(), format, block=block, backend="reference"))
    assert same(x, before) and (y.data_ptr() != x.data_ptr() or not x.numel())


def spread(*shape, dtype=torch.float32):
    """Of many magnitudes."""
    return (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)


def powers(exponents):
    return (exponents + 127).to(torch.uint8).view(E8M0)


@pytest.mark.parametrize("name", ["quantize", "dequantize", "fake_quant", "e2m1_to_e4m3", "hadamard"])
def test_one_signature(engine, name):
    public = dict(inspect.signature(getattr(quant, name)).parameters)
    public.pop("backend")
    for module in (reference, importlib.import_module(f"abyssal.kernels.quant.{engine}")):
        given = inspect.signature(getattr(module, name)).parameters
        assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in given.items()}


# the definition ------------------------------------------------------------------------------------------------------


def minifloat(code, exponent_bits, mantissa_bits, bias):
    """The value of the bits sign | exponent | mantissa, without the format's NaN."""
    mantissa, exponent = code % (1 << mantissa_bits), code >> mantissa_bits & (1 << exponent_bits) - 1
    value = ((exponent > 0) + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - bias)
    return -value if code >> exponent_bits + mantissa_bits else value


CODES = {
    "e4m3": [math.nan if code & 127 == 127 else minifloat(code, 4, 3, 7) for code in range(256)],
    "e2m1": [minifloat(code, 2, 1, 1) for code in range(16)],
}


def test_definition_of_the_values():
    byte, one = torch.arange(256, dtype=torch.uint8), powers(torch.zeros(1))
    got = dequantize(byte.view(E4M3), one, block=256, dtype=torch.float64, backend="reference")
    assert same(got, torch.tensor(CODES["e4m3"]).double()) and same(got, byte.view(E4M3).double())
    got = dequantize(byte, one, block=512, dtype=torch.float64, backend="reference")
    want = [CODES["e2m1"][half] for b in range(256) for half in (b % 16, b // 16)]
    assert same(got, torch.tensor(want).double())
    scales, top = byte.view(E8M0)[:, None], torch.full((256, 1), 448.0).to(E4M3)
    want = [math.ldexp(448, e - 127) for e in range(255)] + [math.nan]
    got = dequantize(top, scales, block=1, dtype=torch.float64, backend="reference")
    assert same(got[:, 0], torch.tensor(want, dtype=torch.float64))


def around(x, ulps):
    """Positive float32 or float64 [v] with the values up to `ulps` steps below and above."""
    near = (bits(x)[:, None] + torch.arange(-ulps, ulps + 1)).clamp_min(0).flatten()
    return near.to(bits(x).dtype).view(x.dtype)


def boundaries(format, dtype, ulps):
    """The format's values, the middles between them and half of the least, with their neighbours, of both signs."""
    values = torch.tensor(CODES[format][: 127 if format == "e4m3" else 8], dtype=dtype)
    probes = around(torch.cat([values, (values[1:] + values[:-1]) / 2, values[1:2] / 4]), ulps)
    probes = probes[probes <= TOPS[format]]
    return torch.cat([probes, -probes])


def in_rows(probes, amax, group):
    """Rows of `group`, each begun by `amax`, which sets the scale."""
    probes = torch.nn.functional.pad(probes, (0, -len(probes) % (group - 1))).view(-1, group - 1)
    return torch.cat([probes.new_full((len(probes), 1), amax), probes], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@formats
def test_definition_of_the_nearest(format, dtype):
    """By distance to every code; of two that are equally near the even one. E4M3 also as torch rounds."""
    x = in_rows(boundaries(format, dtype, 20), TOPS[format], 8)
    codes, scales = quantize(x, format, block=8, backend="reference")
    assert (scales.double() == 1).all()
    values = torch.tensor(CODES[format][: 127 if format == "e4m3" else 8], dtype=torch.float64)
    distance = (x.double().abs()[..., None] - values).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    code = (nearest * (2 - torch.arange(len(values)) % 2)).int().argmax(-1)
    code += x.signbit() * (128 if format == "e4m3" else 8)
    want = code if format == "e4m3" else code[:, 0::2] + 16 * code[:, 1::2]
    assert torch.equal(bits(codes).int(), want.int())
    if format == "e4m3" and dtype == torch.float32:  # torch takes float64 to float32 first
        assert same(codes, x.to(E4M3))


@formats
def test_definition_of_the_scale(format):
    """amax = top 2^k is the last that takes the scale 2^k; amax = 2^k is nothing special."""
    exponents = torch.arange(-126, 120, dtype=torch.float64)
    edges = torch.cat([TOPS[format] * exponents.exp2(), exponents.exp2(), torch.tensor([FLOORS[format]])])
    amax = around(edges, 3)
    _, scales = quantize(torch.stack([-amax, amax / 2], 1), format, block=2, backend="reference")
    needed = [max(x, FLOORS[format]) for x in amax.tolist()]
    want = [next(e for e in range(-127, 128) if x <= math.ldexp(TOPS[format], e)) for x in needed]
    assert (bits(scales).int() - 127).flatten().tolist() == want
    limit = TOPS[format] * 2.0**127
    x = torch.tensor([[limit, -1], [math.nextafter(limit, math.inf), 1], [1e308, 1], [0, -0.0]], dtype=torch.float64)
    codes, scales = quantize(x, format, block=2, backend="reference")
    assert bits(scales).flatten().tolist() == [254, 255, 255, {"e4m3": 105, "e2m1": 1}[format]]
    values = dequantize(codes, scales, block=2, dtype=torch.float64, backend="reference")
    assert values[0].tolist() == [limit, 0] and values[1:3].isnan().all() and same(values[3], x[3])


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (6, 9), (0, 4)])
def test_definition_of_the_blocks(shape):
    """Those at the end may be smaller. A bad value spoils its block, and no other."""
    x = spread(2, *shape)
    codes, scales = quantize(x, "e4m3", block=(2, 3), backend="reference")
    assert scales.shape == (2, -(-shape[0] // 2), -(-shape[1] // 3))
    for n, i, j in itertools.product(*map(range, scales.shape)):
        at = (n, slice(2 * i, 2 * i + 2), slice(3 * j, 3 * j + 3))
        one, scale = quantize(x[at].reshape(1, -1), "e4m3", block=x[at].numel(), backend="reference")
        assert same(one.view(x[at].shape), codes[at]) and same(scale[0, 0], scales[n, i, j])
    for bad in (math.nan, math.inf, -math.inf) if x.numel() else ():
        dirty, spoilt = x.clone(), torch.zeros(x.shape, dtype=torch.bool)
        dirty[1, 0, 1], spoilt[1, :2, :3] = bad, True
        for format in ("e4m3", "e2m1") if shape[1] % 2 == 0 else ("e4m3",):
            codes, scales = quantize(dirty, format, block=(2, 3), backend="reference")
            got = dequantize(codes, scales, block=(2, 3), backend="reference")
            clean = fake_quant(x, format, block=(2, 3), backend="reference")
            assert torch.equal(got.isnan(), spoilt) and same(got[~spoilt], clean[~spoilt])
            assert bits(scales).eq(255).sum() == 1


@pytest.mark.parametrize("d", [1, 2, 4, 32])
def test_definition_of_the_hadamard_rotation(d):
    sign = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64)
    x, other = torch.randn(2, 3, 5, d, dtype=torch.float64)
    got = hadamard(x, backend="reference")
    torch.testing.assert_close(got, x @ sign / d**0.5, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard(got, backend="reference"), x, rtol=0, atol=1e-13)
    product = (got * hadamard(other, backend="reference")).sum(-1)
    torch.testing.assert_close(product, (x * other).sum(-1), rtol=0, atol=1e-12)


def test_definition_of_the_layout():
    """584 bytes an entry of 512 channels with 64 rotary ones, one of them unused; 68 an index key (spec D.1)."""
    entry, key = torch.randn(512).bfloat16(), torch.randn(128).bfloat16()
    parts = [*quantize(entry[:448], "e4m3", block=64), entry[448:]]
    assert sum(part.nbytes for part in parts) + 1 == 584
    assert sum(part.nbytes for part in quantize(hadamard(key), "e2m1", block=32)) == 68
    codes, _ = quantize(torch.tensor([0.5, -6, 1, 0, -0.5, 3]), "e2m1", block=6, backend="reference")
    assert codes.tolist() == [0xF1, 0x02, 0x59]


@pytest.mark.parametrize("format, block", [("e4m3", 64), ("e4m3", (128, 128)), ("e2m1", 32), ("e2m1", (3, 16))])
def test_what_was_quantised_quantises_to_itself(format, block):
    """The values always; a scale unless the largest of a block was rounded down to half of the top."""
    x = spread(260, 256, dtype=torch.float64)
    codes, scales = quantize(x, format, block=block, backend="reference")
    values = dequantize(codes, scales, block=block, dtype=torch.float64, backend="reference")
    again, rescaled = quantize(values, format, block=block, backend="reference")
    assert same(dequantize(again, rescaled, block=block, dtype=torch.float64, backend="reference"), values)
    halved = rescaled.double() != scales.double()
    assert torch.equal(rescaled.double()[halved], scales.double()[halved] / 2)
    if isinstance(block, int):
        assert torch.equal(halved, values.abs().view(260, -1, block).amax(-1) == scales.double() * TOPS[format] / 2)


@pytest.mark.parametrize(
    "format, relative, absolute, low, high",
    [("e4m3", 2.0**-4, 2.0**-10, 0.0255, 0.0275), ("e2m1", 2.0**-2, 2.0**-2, 0.112, 0.119)],
)
def test_the_error_is_bounded_and_nothing_is_clipped(format, relative, absolute, low, high):
    x, normal = spread(500, 64, dtype=torch.float64), torch.randn(512, 512)
    codes, scales = quantize(x, format, block=32)
    scale = scales.double().repeat_interleave(32, 1)
    assert (x.abs() <= TOPS[format] * scale).all()
    error = (dequantize(codes, scales, block=32, dtype=torch.float64) - x).abs()
    assert (error <= torch.maximum(relative * x.abs() / (1 + relative), absolute * scale)).all()
    assert low < ((fake_quant(normal, format, block=32) - normal).norm() / normal.norm()).item() < high


# the engines ---------------------------------------------------------------------------------------------------------

BLOCKS = [  # block, shape
    (8, (3, 40)),
    (64, (2, 7, 256)),
    (4, (2, 3, 12)),
    ((3, 16), (2, 7, 36)),
    ((4, 6), (9, 14)),
    ((1, 6), (4, 10)),
    ((16, 24), (17, 50)),
    ((5, 3), (11, 8)),
    (2, (6,)),
    (4, (0, 8)),
    (4, (3, 0)),
    (4, (2, 0, 8)),
    ((2, 4), (0, 8)),
]
WHOLE = [(1, 2), (127, 2), (128, 128), (129, 256), (300, 130), (2, 133, 146)]


@formats
@pytest.mark.parametrize("block, shape", BLOCKS)
def test_blocks_of_every_shape(engine, block, shape, format, device):
    for dtype in FLOATS[engine]:
        agrees(engine, spread(*shape, dtype=dtype).to(device), format, block)


@formats
@pytest.mark.parametrize("shape", WHOLE)
def test_blocks_of_a_weight(engine, large_programs, shape, format, device):
    for dtype in (FLOATS[engine][0], torch.bfloat16):
        agrees(engine, spread(*shape, dtype=dtype).to(device), format, (128, 128))


@pytest.mark.parametrize("exponent", [0, 40, -20, -100])
@formats
def test_on_and_around_every_boundary(engine, large_programs, format, exponent, device):
    for dtype in {torch.float32, FLOATS[engine][0]}:
        agrees(engine, (in_rows(boundaries(format, dtype, 4), TOPS[format], 8) * 2.0**exponent).to(device), format, 8)
        edges = TOPS[format] * torch.arange(-126, 119, dtype=dtype).exp2()
        amax = around(torch.cat([edges, edges / TOPS[format], edges.new_tensor([FLOORS[format]])]), 3)
        agrees(engine, torch.stack([-amax, amax / 2], 1).to(device), format, 2)


@pytest.mark.parametrize("dtype", HALVES)
@formats
def test_every_half_precision_value(engine, large_programs, format, dtype, device):
    """All 65,536 bit patterns, NaN and infinities with them: in ascending order, shuffled, and each one alone."""
    ascending = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    shuffled = ascending[torch.randperm(2**16)]
    agrees(engine, ascending, format, 16)
    agrees(engine, shuffled[shuffled.isfinite()][: 2**15], format, 16)
    agrees(engine, ascending[:, None].expand(-1, 2), format, 2)


@formats
def test_random_bits_subnormal_values_and_the_floor(engine, large_programs, format, device):
    x = torch.randint(-(2**31), 2**31, (1 << 15,)).int().view(torch.float32).to(device)
    agrees(engine, x, format, 2)
    agrees(engine, x.sort().values, format, 16)
    tiny = torch.randint(0, 1 << 26, (1 << 12,)).int().view(torch.float32).to(device)
    agrees(engine, torch.cat([tiny, -tiny]), format, 4)
    for row in (
        [0.0, -0.0, 1e-30, -1e-30],
        [9e-5, 2.0**-32, 1.01 * 2.0**-32, -(2.0**-31)],
        [448 * 2.0**119, -3e38, 6 * 2.0**125, 3.4e38],
        [2.0**-149, 2.0**-127, 1.5 * 2.0**-126, -(2.0**-128), 2.0**-140, 6 * 2.0**-126, 0, 2.0**-130],
    ):
        agrees(engine, torch.tensor(row, device=device).expand(3, -1), format, 4)
        agrees(engine, torch.tensor(row, device=device), format, 2)


@formats
def test_zeros_bad_values_and_strides(engine, format, device):
    for dtype in FLOATS[engine]:
        zeros = torch.zeros(2, 8, dtype=dtype, device=device)
        zeros[:, ::3] = -0.0
        agrees(engine, zeros, format, 4)
        for bad, block in itertools.product((math.nan, -math.nan, math.inf, -math.inf), (4, (2, 4))):
            x = spread(6, 20, dtype=dtype).to(device)
            x[1, 5] = bad
            agrees(engine, x, format, block)
    agrees(engine, torch.tensor([[65504.0, -65504, 1, 0]], device=device).half(), format, 4)
    x = spread(12, 8, 5).to(device)
    agrees(engine, x.permute(2, 1, 0), format, 4)
    codes, scales = quantize(x.mT.contiguous(), format, block=(5, 4), backend=engine)
    strided = [bits(part).mT.contiguous().mT.view(part.dtype) for part in (codes, scales)]
    got, want = (dequantize(*parts, block=(5, 4), backend=engine) for parts in (strided, (codes, scales)))
    assert same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_every_code_under_every_scale(engine, large_programs, dtype, device):
    """Codes of four bits: each one low and high, with different neighbours."""
    byte = torch.arange(256, dtype=torch.uint8)
    scales, pairs = byte.view(E8M0)[:, None], byte[:16] | (byte[:16] * 7 + 3) << 4
    for codes in (byte.view(E4M3), pairs, pairs.view(torch.int8)):
        codes, block = codes.expand(256, -1), len(codes) * (1 if codes.dtype == E4M3 else 2)
        want = dequantize(codes, scales, block=block, dtype=dtype, backend="reference")
        assert same(dequantize(codes.to(device), scales.to(device), block=block, dtype=dtype, backend=engine), want)


@formats
def test_fake_quant_is_straight_through(engine, format, device):
    for dtype in FLOATS[engine]:
        x = spread(3, 8, dtype=dtype).to(device)
        x[0, 0] = math.nan
        dy = torch.randn(3, 8, device=device).to(dtype)
        for backend in (engine, "reference"):
            leaf = x.clone().requires_grad_()
            y = fake_quant(leaf, format, block=4, backend=backend)
            assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], dy)
            assert not any(part.requires_grad for part in quantize(leaf, format, block=4, backend=backend))


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 5)])
def test_shapes_with_and_without_rows_by_eager_and_definition(lead, backend, where):
    on = {"backend": backend}
    for format, block, codes_shape in (("e4m3", 64, (*lead, 128)), ("e2m1", 32, (*lead, 64))):
        x = torch.zeros(*lead, 128, device=where)
        codes, scales = quantize(x, format, block=block, **on)
        assert (codes.shape, scales.shape) == (codes_shape, (*lead, 128 // block))
        assert (codes.device.type, scales.device.type, scales.dtype) == (where, where, E8M0)
        assert dequantize(codes, scales, block=block, dtype=torch.bfloat16, **on).shape == x.shape
        assert fake_quant(x, format, block=block, **on).shape == hadamard(x, **on).shape == x.shape
    rows = lead[-1] if lead else 5
    codes, scales = quantize(torch.zeros(*lead[:-1], rows, 160, device=where), "e2m1", block=32, **on)
    codes, scales = e2m1_to_e4m3(codes, scales, **on)
    assert codes.shape == (*lead[:-1], rows, 160) and scales.shape == (*lead[:-1], -(-rows // 128), 2)
    assert quantize(torch.zeros(3, 0, device=where), "e4m3", block=64, **on)[1].shape == (3, 0)


def test_errors_name_the_argument():
    x = torch.zeros(4, 96)
    codes, scales = quantize(x, "e4m3", block=32)
    four, four_scales = quantize(x, "e2m1", block=32)
    wrong = {
        "format='e5m2'": lambda: quantize(x, "e5m2", block=32),
        r"x: got torch.int64": lambda: quantize(x.long(), "e4m3", block=32),
        r"x: got torch.float8_e4m3fn": lambda: fake_quant(codes, "e4m3", block=32),
        r"x: got torch.float32 \[\]": lambda: quantize(x[0, 0], "e4m3", block=1),
        "x: 95 channels": lambda: quantize(x[:, :95], "e2m1", block=5),
        "block=64: must divide the 96": lambda: quantize(x, "e4m3", block=64),
        "block=0": lambda: fake_quant(x, "e4m3", block=0),
        r"block=\(128, 0\)": lambda: quantize(x, "e4m3", block=(128, 0)),
        r"block=\(2, 2\)": lambda: quantize(x[0], "e4m3", block=(2, 2)),
        r"block=\(1, 2, 4\)": lambda: quantize(x, "e4m3", block=(1, 2, 4)),
        "codes: got torch.float32": lambda: dequantize(x, scales, block=32),
        r"codes: got torch.float8_e4m3fn \[\]": lambda: dequantize(codes[0, 0], scales[0], block=1),
        "dtype=torch.int8": lambda: dequantize(codes, scales, block=32, dtype=torch.int8),
        "scales: got torch.uint8": lambda: dequantize(codes, scales.view(torch.uint8), block=32),
        r"scales: .* allowed is float8_e8m0fnu \[4, 6\]": lambda: dequantize(codes, scales, block=16),
        r"scales: .* allowed is float8_e8m0fnu \[1, 1\]": lambda: dequantize(codes, scales, block=(128, 128)),
        "codes: got torch.float8_e4m3fn": lambda: e2m1_to_e4m3(codes, scales),
        r"codes: got torch.uint8 \[48\]": lambda: e2m1_to_e4m3(four[0], four_scales[0]),
        "group=36": lambda: e2m1_to_e4m3(four, four_scales, group=36),
        r"scales: .*\[4, 6\] for group=16": lambda: e2m1_to_e4m3(four, four_scales, group=16),
        "block=32: must be": lambda: e2m1_to_e4m3(four, four_scales, block=32),
        r"block=\(0, 32\): must be positive": lambda: e2m1_to_e4m3(four, four_scales, block=(0, 32)),
        r"block=\(128, 48\)": lambda: e2m1_to_e4m3(four, four_scales, block=(128, 48)),
        r"x: got torch.float32 \[4, 96\]": lambda: hadamard(x),
        r"x: got torch.float32 \[4, 0\]": lambda: hadamard(x[:, :0]),
        r"x: got torch.int64 \[4, 64\]": lambda: hadamard(x[:, :64].long()),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


# four bits to eight --------------------------------------------------------------------------------------------------


def expert(groups, group=4):
    """Random e2m1 codes [N, K / 2] under scales of the given exponents [N, K / group]."""
    return torch.randint(256, (*groups.shape[:-1], groups.shape[-1] * group // 2)).to(torch.uint8), powers(groups)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
@pytest.mark.parametrize("low, high", [(-127, -127), (-127, -120), (-126, -121), (-127, -113), (-9, 5), (113, 127)])
def test_reblocking_keeps_every_value(engine, low, high, stored, device):
    """Up to 14 powers of two in each block, down to scales that leave no room for 2^-6."""
    for shape, group, block in (((2, 19, 5), 4, (16, 12)), ((2, 7, 6), 16, (3, 32)), ((140, 5), 32, (128, 128))):
        if shape[0] == 140 and engine == "triton":
            continue  # too large for the interpreter
        groups = torch.randint(low, high + 1, shape)
        codes, scales = expert(groups, group)
        options = {"group": group, "block": block}
        want = e2m1_to_e4m3(codes, scales, **options, backend="reference")
        got = e2m1_to_e4m3(codes.view(stored).to(device), scales.to(device), **options, backend=engine)
        assert all(same(a, b) for a, b in zip(got, want))
        values = dequantize(codes, scales, block=group, dtype=torch.float64, backend="reference")
        assert same(dequantize(*want, block=block, dtype=torch.float64, backend="reference"), values)
        top = groups[..., : block[0], : block[1] // group].amax((-2, -1))
        assert torch.equal(want[1][..., 0, 0].double(), (top - 6).clamp_min(-127).double().exp2())


@pytest.mark.parametrize("exponent", [-14, -15, -40, -120, 128])
def test_reblocking_refuses_to_lose_a_value(engine, exponent, device):
    groups = torch.zeros(19, 5, dtype=torch.int64)
    groups[7, 2] = exponent
    codes, scales = (x.to(device) for x in expert(groups))
    fold = lambda backend=engine: e2m1_to_e4m3(codes, scales, group=4, block=(16, 12), backend=backend)  # noqa: E731
    codes[7, 4] = 0x91  # a half and its negative: the smallest that there is
    if exponent == -14:
        fold()
        return
    with pytest.raises(ValueError, match=r"^scales: \d+ of 380 values, the first at \[\d+, \d+\], .*none NaN.*2\^14"):
        fold()
    with pytest.raises(ValueError, match=r"^scales: \d+ of 380 values"):
        fold("reference")
    codes[7, 4:6] = 0
    if exponent < 0:
        fold()
    if exponent == -15:
        codes[7, 4:6] = 0x42  # 1 and 2 are even multiples of a half, and fit at 2^-15 of the largest scale
        fold()


# Hadamard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 16, 128, 256])
def test_hadamard(engine, d, device):
    for dtype in FLOATS[engine]:
        limits = {"out": 4e-3, "dx": 1e-2} if dtype in HALVES else {}
        x = torch.randn(2, 5, d).to(dtype)
        for given in (x, x[:0], x.mT.contiguous().mT):
            hold(hadamard, {"x": given}, engine, dtype, limits=limits, device=device)
        if dtype in HALVES:  # rounded once
            got, want = hadamard(x.to(device), backend=engine).cpu(), hadamard(x.double(), backend="reference")
            assert ((got - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-6).all()
        if engine == "triton":
            assert torch.equal(hadamard(x.to(device), backend=engine).cpu(), hadamard(x, backend="eager"))
        assert hadamard(x[..., :1], backend=engine).data_ptr() != x.data_ptr()


def test_hadamard_spreads_a_channel_that_sticks_out():
    x = torch.randn(64, 128)
    x[:, 3] *= 100
    plain, rotated = (fake_quant(y, "e2m1", block=32) for y in (x, hadamard(x)))
    beside = (slice(None), slice(4, 32))
    assert (plain - x)[beside].norm() > 0.9 * x[beside].norm()
    assert (hadamard(rotated) - x).norm() < 0.2 * x.norm()


# one token in numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d, block", [(448, 64), (8, 8), (10, 4), (3, 1)])
def test_steps(d, block):
    """The last group may be smaller."""
    rows = spread(20, d)
    rows[3], rows[4, d // 2], rows[5, 0], rows[6] = 0, math.nan, -math.inf, 1e-6 * rows[6]
    rows[7] = rows[7].clamp(-448, 448)
    rows[7, 0] = 448  # the last that takes its scale
    whole = torch.nn.functional.pad(rows, (0, -d % block))
    codes, scales = quantize(whole, "e4m3", block=block, backend="reference")
    with np.errstate(invalid="ignore"):
        stepped = [quantize_e4m3_step(row.numpy(), block) for row in rows]
        got_codes, got_scales = map(np.stack, zip(*stepped))
        got = torch.from_numpy(dequantize_step(got_codes, got_scales, "e4m3", block))
    assert same(torch.from_numpy(got_codes).view(E4M3), codes[:, :d])
    assert same(torch.from_numpy(got_scales).view(E8M0), scales)
    assert same(got, dequantize(codes, scales, block=block, backend="reference")[:, :d])
    if d % block == 0 and d % 2 == 0:
        codes, scales = quantize(rows, "e2m1", block=block, backend="reference")
        with np.errstate(invalid="ignore"):
            got = torch.from_numpy(dequantize_step(codes.numpy(), bits(scales).numpy(), "e2m1", block))
        assert same(got, dequantize(codes, scales, block=block, backend="reference"))


# as torch sees it ----------------------------------------------------------------------------------------------------


def layer(backend, x):
    on = {"backend": backend}
    y = fake_quant(hadamard(x * 1.5, **on), "e2m1", block=4, **on) + fake_quant(x.sin(), "e4m3", block=(2, 8), **on)
    return (y * dequantize(*quantize(x, "e4m3", block=8, **on), block=8, **on)).cos().sum()


@pytest.mark.parametrize("op", ["quantize", "groups", "dequantize", "fake_quant", "fold", "hadamard"])
def test_opcheck(real_memory, device, op):
    from abyssal.kernels.quant import triton

    x, check = torch.randn(3, 8, device=device), torch.library.opcheck
    byte = torch.randint(118, 122, (3, 4), device=device).to(torch.uint8)
    if op == "quantize":
        check(triton._quantize, (x, True, 2, 4, False))
    elif op == "groups":
        check(triton._quantize, (x, False, 1, 4, True))
    elif op == "dequantize":
        check(triton._dequantize, (byte, byte[:, :2], False, 1, 4, True, torch.bfloat16))
    elif op == "fake_quant":
        check(triton._fake_quant, (x, True, 1, 4, True))
        leaf = x.clone().requires_grad_()  # its gradient is the caller's own: not through opcheck's autograd test
        assert torch.equal(torch.autograd.grad(triton._fake_quant(leaf, True, 1, 4, True), leaf, x)[0], x)
    elif op == "fold":
        check(triton._fold, (byte, byte[:, :2], 4, 2, 8))
    else:
        check(triton._hadamard, (x.requires_grad_(),))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, device, dynamic):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f("triton", x), x)[0] for f in (layer, compiled))
    assert torch.equal(want, got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(engine, device, reentrant):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    want = torch.autograd.grad(layer(engine, x), x)[0]
    checkpoint(layer, engine, x, use_reentrant=reentrant).backward()
    assert torch.equal(want, x.grad)


# at sizes of a model on a CUDA device --------------------------------------------------------------------------------

SIZES = [
    ("e4m3", 128, (777, 4096)),
    ("e4m3", (1, 64), (777, 448)),
    ("e4m3", (128, 128), (1000, 3000)),
    ("e4m3", (256, 256), (1000, 3000)),
    ("e2m1", 32, (8, 96, 2048)),
    ("e2m1", (1, 32), (777, 128)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("format, block, shape", SIZES)
def test_gpu_sizes_of_a_model(real_memory, format, block, shape, dtype):
    agrees("triton", spread(*shape, dtype=dtype).cuda(), format, block)


@pytest.mark.gpu
@formats
def test_gpu_all_magnitudes(real_memory, format):
    for width, block in ((32, 2), (26, 4), (24, 2)):
        x = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (1 << 20,)).int().view(torch.float32)
        agrees("triton", x.cuda(), format, block)


@pytest.mark.gpu
def test_gpu_four_bits_to_eight_and_hadamard(real_memory):
    codes, scales = quantize(torch.randn(2, 300, 640, device="cuda"), "e2m1", block=32)
    want = e2m1_to_e4m3(codes.cpu(), scales.cpu(), backend="reference")
    assert all(same(a, b) for a, b in zip(e2m1_to_e4m3(codes, scales), want))
    for d, dtype in itertools.product((1, 64, 128, 512), (torch.float32, *HALVES)):
        x = torch.randn(999, d, device="cuda", dtype=dtype)
        assert torch.equal(hadamard(x).cpu(), hadamard(x.cpu(), backend="eager"))


@pytest.mark.gpu
def test_gpu_graph_replays_other_values_and_nothing_waits(real_memory):
    x = torch.randn(300, 512, device="cuda")

    def step():
        keys = quantize(hadamard(x), "e2m1", block=32)
        return dequantize(*keys, block=32), fake_quant(x, "e4m3", block=(128, 128))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.normal_()
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(captured, again))
