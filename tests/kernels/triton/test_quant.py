"""The number formats' kernels, bit for bit: against a search through all codes and scales, and against the eager.

v values · D channels · N x K a weight
"""

import inspect
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import dequantize, e2m1_to_e4m3, fake_quant, hadamard, quantize
from abyssal.kernels.quant import eager
from abyssal.kernels.quant import triton as kernels

HALVES = (torch.bfloat16, torch.float16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = [(code & 7 | (8 if code > 7 else 0)) * 2.0 ** (max(code >> 3, 1) - 10) for code in range(127)]
CODES, FLOORS = {"e2m1": E2M1, "e4m3": E4M3}, {"e2m1": 6 * 2.0**-126, "e4m3": float(torch.tensor(1e-4))}
SHAPES = [  # block, shape
    (8, (3, 40)),
    (4, (2, 3, 12)),
    ((3, 16), (2, 7, 36)),
    ((4, 6), (9, 14)),
    ((1, 6), (4, 10)),
    ((16, 24), (17, 50)),
    ((5, 3), (11, 8)),
    (2, (6,)),
]


@pytest.fixture(autouse=True)
def several_blocks(emulated, monkeypatch):
    """Programs so small that the larger blocks need several rounds, and that there are several programs."""
    torch.manual_seed(0)
    if emulated:
        monkeypatch.setattr(kernels.launch, "HELD", 128)
        monkeypatch.setattr(kernels.launch, "FEW", 64)


@pytest.fixture
def large_programs(monkeypatch):
    """One program for many values: the interpreter's time is by the operation, not by the value."""
    monkeypatch.setattr(kernels.launch, "FEW", 1 << 16)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def same(a, b):
    """Equal bits, but for those of a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.equal(bits(a), bits(b))
    a, b = (x.float() if x.dtype == torch.float8_e4m3fn else x for x in (a, b))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


def agrees(x, format, block):
    """Codes, scales, values in every dtype and the two in one, all as the reference's."""
    codes, scales = encodes(x, format, block)
    for dtype in (torch.float32, x.dtype):
        assert same(*(dequantize(codes, scales, block=block, dtype=dtype, backend=b) for b in ("triton", "eager")))


def encodes(x, format, block):
    """Codes, scales, and values without either, as the reference's, which are returned: decoding has a test of all."""
    got, want = (quantize(x, format, block=block, backend=b) for b in ("triton", "eager"))
    assert all(same(a, b) and a.is_contiguous() for a, b in zip(got, want))
    values = dequantize(*want, block=block, dtype=x.dtype, backend="eager")
    assert same(fake_quant(x, format, block=block), values)
    return want


def spread(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 10 ** torch.randn(shape)).to(dtype)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_codes_and_scales_by_search(device, large_programs, format):
    """Rows [v, 8]: values around every boundary of the format, under scales all over the range."""
    table = torch.tensor(CODES[format], dtype=torch.float64)
    edges = torch.cat([table, (table[1:] + table[:-1]) / 2, table[1:2] / 4]).float()
    edges = (bits(edges)[:, None] + torch.arange(-2, 3)).clamp_min(0).int().view(torch.float32).flatten()
    edges = edges[edges <= table[-1]]
    x = torch.cat([edges, -edges, spread(3000).clamp(-6, 6)])
    x = torch.nn.functional.pad(x, (0, -len(x) % 7)).view(-1, 7)
    x = torch.cat(
        [torch.full((len(x), 1), table[-1].item()) * 0.76 ** torch.arange(len(x))[:, None].remainder(9), x], 1
    )
    x = torch.where(x.abs() > x[:, :1], x[:, :1], x) * 2.0 ** torch.linspace(-100, 100, len(x)).round()[:, None]
    exact, amax = x.double(), x.double().abs().amax(1).clamp_min(FLOORS[format])
    exponents = torch.arange(-127, 128, dtype=torch.float64)
    scale = (amax[:, None] <= table[-1] * 2.0**exponents).int().argmax(1)
    distance = (exact[..., None].abs() / 2.0 ** exponents[scale][:, None, None] - table).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    code = (nearest * (2 - torch.arange(len(table)) % 2)).int().argmax(-1)
    code += x.signbit() * (128 if format == "e4m3" else 8)
    codes, scales = (part.cpu() for part in quantize(x.to(device), format, block=8))
    want = code if format == "e4m3" else code[:, 0::2] + 16 * code[:, 1::2]
    assert torch.equal(bits(codes), want.to(torch.uint8)) and torch.equal(bits(scales)[:, 0], scale.to(torch.uint8))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_every_half_precision_value(device, large_programs, format, dtype):
    """All 65,536 bit patterns, NaN and infinities with them: in ascending order, shuffled, and each one alone."""
    ascending = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    shuffled = ascending[torch.randperm(2**16)]
    for x, block in (
        (ascending, 16),
        (shuffled[shuffled.isfinite()][: 2**15], 16),
        (ascending[:, None].expand(-1, 2), 2),
    ):
        encodes(x, format, block)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_random_bits_of_float32(device, large_programs, format):
    x = torch.randint(-(2**31), 2**31, (1 << 15,)).int().view(torch.float32).to(device)
    encodes(x, format, 2)
    encodes(x.sort().values, format, 16)
    tiny = torch.randint(0, 1 << 26, (1 << 12,)).int().view(torch.float32).to(device)
    agrees(torch.cat([tiny, -tiny]), format, 4)
    agrees(torch.tensor([[0.0, -0.0, 1e-30, -1e-30]], device=device).expand(3, -1), format, 4)
    agrees(torch.tensor([448 * 2.0**119, -3e38, 6 * 2.0**125, 3.4e38], device=device), format, 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
@pytest.mark.parametrize(("block", "shape"), SHAPES)
def test_blocks_of_every_shape(device, block, shape, format, dtype):
    agrees(spread(*shape, dtype=dtype).to(device), format, block)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
def test_every_code_under_every_scale(device, large_programs, dtype):
    """Codes of four bits: each one low and high, with different neighbours."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    scales, pairs = byte.view(torch.float8_e8m0fnu)[:, None], byte[:16] | (byte[:16] * 7 + 3) << 4
    for codes in (byte.view(torch.float8_e4m3fn), pairs, pairs.view(torch.int8)):
        codes, block = codes.expand(256, -1), len(codes) * (1 if codes.dtype == torch.float8_e4m3fn else 2)
        got, want = (dequantize(codes, scales, block=block, dtype=dtype, backend=b) for b in ("triton", "eager"))
        assert same(got, want)


def test_a_bad_value_spoils_its_block_alone(device):
    for bad in (math.nan, math.inf, -math.inf):
        x = spread(6, 20).to(device)
        x[1, 5] = bad
        for format in ("e4m3", "e2m1"):
            for block in (4, (2, 4)):
                agrees(x, format, block)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_nothing_to_do_and_strides(device, format):
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        agrees(torch.zeros(shape, device=device), format, 4)
    agrees(torch.zeros(0, 8, device=device), format, (2, 4))
    x = spread(12, 8, 5).to(device)
    agrees(x.permute(2, 1, 0), format, 4)
    codes, scales = quantize(x.mT.contiguous(), format, block=(5, 4))
    strided = [bits(part).mT.contiguous().mT.view(part.dtype) for part in (codes, scales)]
    assert same(dequantize(*strided, block=(5, 4)), dequantize(codes, scales, block=(5, 4)))


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_fake_quant_is_straight_through(device, format, dtype):
    x = spread(3, 8, dtype=dtype).to(device)
    x[0, 0] = math.nan
    x.requires_grad_()
    y, dy = fake_quant(x, format, block=4), torch.randn(3, 8, device=device).to(dtype)
    assert y.data_ptr() != x.data_ptr() and torch.equal(torch.autograd.grad(y, x, dy)[0], dy)
    assert not any(part.requires_grad for part in quantize(x, format, block=4))
    assert same(fake_quant(y, format, block=4), y)


# four bits to eight --------------------------------------------------------------------------------------------------


def expert(groups, columns, group=4):
    """Random e2m1 codes [N, K / 2] under scales of the given exponents [N, K / group]."""
    scales = (groups + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return torch.randint(256, (*groups.shape[:-1], columns // 2)).to(torch.uint8), scales


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
@pytest.mark.parametrize(("low", "high"), [(-127, -127), (-127, -120), (-9, 5), (113, 127)])
def test_reblocking_keeps_every_value(device, low, high, stored):
    codes, scales = expert(torch.randint(low, high + 1, (2, 19, 5)), 20)
    codes, scales = codes.view(stored).to(device), scales.to(device)
    got, want = (e2m1_to_e4m3(codes, scales, group=4, block=(16, 12), backend=b) for b in ("triton", "eager"))
    assert all(same(a, b) for a, b in zip(got, want))
    values = dequantize(codes, scales, block=4, dtype=torch.float64)
    assert same(dequantize(*got, block=(16, 12), dtype=torch.float64), values)


@pytest.mark.parametrize("exponent", [-14, -15, -40, -120, 128])
def test_reblocking_refuses_to_lose_a_value(device, exponent):
    groups = torch.zeros(19, 5, dtype=torch.int64)
    groups[7, 2] = exponent
    codes, scales = (x.to(device) for x in expert(groups, 20))
    codes[7, 4] = 0x91  # a half and its negative: the smallest that there is
    if exponent == -14:
        e2m1_to_e4m3(codes, scales, group=4, block=(16, 12))
        return
    with pytest.raises(ValueError, match=r"^scales: \d+ of 380 values, the first at"):
        e2m1_to_e4m3(codes, scales, group=4, block=(16, 12))
    codes[7, 4:6] = 0
    if exponent < 0:
        e2m1_to_e4m3(codes, scales, group=4, block=(16, 12))


def test_reblocking_refuses_a_block_of_nan(device):
    codes, scales = (x.to(device) for x in expert(torch.full((5, 3), 128), 12))
    with pytest.raises(ValueError, match=r"^scales: .*none NaN"):
        e2m1_to_e4m3(codes, scales, group=4, block=(16, 12))


# Hadamard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("d", [1, 2, 16, 128])
def test_hadamard_has_the_bits_of_the_reference(device, d, dtype):
    x = torch.randn(2, 5, d).to(device, dtype).requires_grad_()
    got, want = (hadamard(x, backend=b) for b in ("triton", "eager"))
    dy = torch.randn(d, 5, 2).to(device, dtype).permute(2, 1, 0)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (got, want)]
    sign = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64)
    assert torch.equal(got, want) and got.dtype == gradients[0].dtype == dtype
    eps = torch.finfo(dtype).eps if dtype in HALVES else 1e-6
    torch.testing.assert_close(gradients[0].double().cpu(), dy.double().cpu() @ sign * d**-0.5, rtol=eps, atol=4 * eps)
    assert hadamard(x[:0]).shape == (0, 5, d)


# as torch sees it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_memory(monkeypatch, backend):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def layer(x):
    y = fake_quant(hadamard(x * 1.5), "e2m1", block=4) + fake_quant(x.sin(), "e4m3", block=(2, 8))
    return (y * dequantize(*quantize(x, "e4m3", block=8), block=8)).cos().sum()


@pytest.mark.parametrize("op", ["quantize", "groups", "dequantize", "fake_quant", "fold", "hadamard"])
def test_opcheck(real_memory, device, op):
    x = torch.randn(3, 8, device=device)
    byte = torch.randint(118, 122, (3, 4), device=device).to(torch.uint8)
    if op == "quantize":
        torch.library.opcheck(kernels._quantize, (x, True, 2, 4, False))
    elif op == "groups":
        torch.library.opcheck(kernels._quantize, (x, False, 1, 4, True))
    elif op == "dequantize":
        torch.library.opcheck(kernels._dequantize, (byte, byte[:, :2], False, 1, 4, True, torch.bfloat16))
    elif op == "fake_quant":
        torch.library.opcheck(kernels._fake_quant, (x, True, 1, 4, True))
        leaf = x.clone().requires_grad_()  # its gradient is the caller's own: not through opcheck's autograd test
        assert torch.equal(torch.autograd.grad(kernels._fake_quant(leaf, True, 1, 4, True), leaf, x)[0], x)
    elif op == "fold":
        torch.library.opcheck(kernels._fold, (byte, byte[:, :2], 4, 2, 8))
    else:
        torch.library.opcheck(kernels._hadamard, (x.requires_grad_(),))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(real_memory, device, dynamic):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want, got = (torch.autograd.grad(f(x), x)[0] for f in (layer, compiled))
    assert torch.equal(want, got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(device, reentrant):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    want = torch.autograd.grad(layer(x), x)[0]
    checkpoint(layer, x, use_reentrant=reentrant).backward()
    assert torch.equal(want, x.grad)


def test_twins_have_the_signature_of_the_reference():
    for name in kernels.__all__:
        assert inspect.signature(getattr(eager, name)) == inspect.signature(getattr(kernels, name)), name
