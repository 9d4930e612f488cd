"""The number formats against brute force: every code decoded from its bits in float64, every value rounded by searching
all codes, every scale by searching all exponents.

Axes: v values of a probe · D channels · N x K a weight.
"""

import inspect
import itertools
import math

import pytest
import torch
from torch import Tensor

from abyssal.kernels import quant
from abyssal.kernels.quant import dequantize, e2m1_to_e4m3, eager, fake_quant, hadamard, quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOPS = {"e4m3": 448.0, "e2m1": 6.0}
FLOORS = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}
BLOCKS = [("e4m3", 64), ("e4m3", 128), ("e4m3", (128, 128)), ("e2m1", 32), ("e2m1", (3, 16))]
E8M0 = torch.float8_e8m0fnu


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of the bits sign | exponent | mantissa, without the format's NaN."""
    mantissa = code & (1 << mantissa_bits) - 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    leading = 1 if exponent else 0
    value = (leading + mantissa / 2**mantissa_bits) * 2.0 ** (max(exponent, 1) - bias)
    return -value if code >> exponent_bits + mantissa_bits else value


E4M3 = [math.nan if code & 127 == 127 else minifloat(code, 4, 3, 7) for code in range(256)]
E2M1 = [minifloat(code, 2, 1, 1) for code in range(16)]
CODES = {"e4m3": E4M3[:127], "e2m1": E2M1[:8]}  # of the values without a sign, in ascending order


def search_code(x: Tensor, format: str) -> Tensor:
    """The code of the nearest value for each of float64 [v]; of two that are equally near the even one."""
    found = []
    for part in x.split(10_000):
        distance = (part.abs()[:, None] - torch.tensor(CODES[format], dtype=torch.float64)).abs()
        nearest = distance == distance.amin(1, keepdim=True)
        odd = torch.arange(nearest.shape[1]) % 2
        found.append((nearest * (2 - odd)).argmax(1))
    sign = (len(CODES[format]) + 1 & ~1) * x.signbit()
    return torch.cat(found) + sign


def search_exponent(amax: float, format: str) -> int:
    amax = max(amax, FLOORS[format])
    return next(e for e in range(-127, 128) if amax <= math.ldexp(TOPS[format], e))


def oracle(x: Tensor, format: str, block: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes, one to a value, and the bytes of the scales, int64."""
    whole = not isinstance(block, int)
    exact = x.double().flatten(0, -3) if whole and x.ndim > 2 else x.double().reshape(1, -1, x.shape[-1])
    rows, columns = block if whole else (1, block)
    codes = torch.zeros(exact.shape, dtype=torch.int64)
    scales = torch.zeros(len(exact), -(-exact.shape[1] // rows), -(-exact.shape[2] // columns), dtype=torch.int64)
    for n, i, j in itertools.product(*map(range, scales.shape)):
        at = (n, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        exponent = search_exponent(exact[at].abs().max().item(), format)
        codes[at] = search_code(exact[at].flatten() / 2.0**exponent, format).view(exact[at].shape)
        scales[n, i, j] = exponent + 127
    return codes.view(x.shape), scales.view(*(x.shape[:-2] if whole else x.shape[:-1]), *scales.shape[2 - whole :])


def unpacked(codes: Tensor) -> Tensor:
    """Stored codes as int64, one to a value."""
    if codes.dtype == torch.float8_e4m3fn:
        return codes.view(torch.uint8).long()
    pairs = [(byte % 16, byte // 16) for byte in codes.flatten().tolist()]
    return torch.tensor(pairs, dtype=torch.int64).view(*codes.shape[:-1], -1)


def packed(codes: Tensor) -> Tensor:
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def powers(exponents: Tensor) -> Tensor:
    return (exponents + 127).to(torch.uint8).view(E8M0)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bits, but for those of a NaN."""
    if left.dtype in (E8M0, torch.float8_e4m3fn):
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    nan = left.isnan()
    signs = torch.equal(left.signbit() | nan, right.signbit() | nan)
    return left.dtype == right.dtype and signs and torch.equal(left.nan_to_num(1e9), right.nan_to_num(1e9))


def follows_the_oracle(x: Tensor, format: str, block: int | tuple[int, int]) -> None:
    codes, scales = quantize(x, format, block=block)
    want_codes, want_scales = oracle(x, format, block)
    assert torch.equal(scales.view(torch.uint8).long(), want_scales)
    assert torch.equal(unpacked(codes), want_codes)


def neighbours(x: Tensor, ulps: int) -> Tensor:
    """Positive float32 or float64 [v] with the values up to `ulps` steps below and above, [v (2 ulps + 1)]."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    return (bits[:, None] + torch.arange(-ulps, ulps + 1)).clamp_min(0).flatten().to(bits.dtype).view(x.dtype)


def with_amax(probes: Tensor, amax: float, group: int) -> Tensor:
    """The probes in rows of `group`, each begun by `amax`, which sets the scale."""
    probes = torch.nn.functional.pad(probes, (0, -len(probes) % (group - 1))).view(-1, group - 1)
    return torch.cat([probes.new_full((len(probes), 1), amax), probes], 1)


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values whose rows span many magnitudes."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.linspace(-3, 3, shape[-2])[:, None]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_code_and_every_scale_decodes(dtype: torch.dtype) -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    one = powers(torch.zeros(1, dtype=torch.int64))
    got = dequantize(byte.view(torch.float8_e4m3fn), one, block=256, dtype=dtype)
    assert same(got, torch.tensor(E4M3, dtype=dtype))
    for stored in (byte, byte.view(torch.int8)):
        got = dequantize(stored, one, block=512, dtype=dtype)
        assert same(got, torch.tensor([E2M1[half] for b in range(256) for half in (b % 16, b // 16)], dtype=dtype))
    scales = byte.view(E8M0)[:, None]
    want = torch.tensor([math.ldexp(448, e - 127) for e in range(255)] + [math.nan], dtype=torch.float64)[:, None]
    assert same(
        dequantize(torch.full((256, 1), 448.0).to(torch.float8_e4m3fn), scales, block=1, dtype=dtype), want.to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format, group", [("e4m3", 64), ("e2m1", 32)])
@pytest.mark.parametrize("exponent", [0, 40, -20])
def test_rounding_on_and_around_every_boundary(format: str, group: int, exponent: int, dtype: torch.dtype) -> None:
    values = torch.tensor(CODES[format], dtype=dtype)
    boundaries = torch.cat([values, (values[1:] + values[:-1]) / 2, values[1:2] / 4])
    probes = neighbours(boundaries, 20)
    probes = probes[probes <= TOPS[format]]
    assert len(probes) > 41 * 2 * len(values) - 41 - 20
    x = with_amax(torch.cat([probes, -probes]), TOPS[format], group) * 2.0**exponent
    follows_the_oracle(x, format, group)


@pytest.mark.parametrize("format, group", [("e4m3", 64), ("e2m1", 32)])
def test_rounding_of_a_dense_scan(format: str, group: int) -> None:
    top = torch.tensor(TOPS[format]).view(torch.int32).item()
    bits = torch.linspace(0, 1, 60_000, dtype=torch.float64) * (top - (90 << 23)) + (90 << 23)
    x = with_amax(bits.to(torch.int32).view(torch.float32), TOPS[format], group)
    follows_the_oracle(x, format, group)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_around_every_power_of_two(format: str, dtype: torch.dtype) -> None:
    """amax = top 2^k is the last that takes the scale 2^k; amax = 2^k is nothing special."""
    exponents = torch.arange(-126, 120, dtype=torch.float64)
    edges = torch.cat([TOPS[format] * exponents.exp2(), exponents.exp2(), torch.tensor([FLOORS[format]])]).to(dtype)
    amax = neighbours(edges, 3)
    _, scales = quantize(torch.stack([-amax, amax / 2], 1), format, block=2)
    want = [search_exponent(value, format) + 127 for value in amax.tolist()]
    assert scales.view(torch.uint8).flatten().tolist() == want


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format, block", BLOCKS)
def test_quantise_follows_the_oracle(format: str, block: int | tuple[int, int], dtype: torch.dtype) -> None:
    shape = (2, 7, 256) if isinstance(block, int) else (2, 133, 146)
    follows_the_oracle(data(*shape, dtype=dtype), format, block)


@pytest.mark.parametrize("shape", [(1, 2), (127, 2), (128, 128), (129, 256), (300, 130)])
def test_blocks_at_the_end_may_be_smaller(shape: tuple[int, int]) -> None:
    x = data(*shape, dtype=torch.float32)
    follows_the_oracle(x, "e4m3", (128, 128))
    codes, scales = quantize(x, "e4m3", block=(128, 128))
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    spread = torch.tensor([[scales[i // 128, j // 128].item() for j in range(shape[1])] for i in range(shape[0])])
    assert same(dequantize(codes, scales, block=(128, 128)), codes.float() * spread)


@pytest.mark.parametrize("format, block", BLOCKS)
def test_what_was_quantised_quantises_to_itself(format: str, block: int | tuple[int, int]) -> None:
    """The values always; codes and scale unless the largest of a block was rounded down to half of the top."""
    x = data(260, 256)
    codes, scales = quantize(x, format, block=block)
    values = dequantize(codes, scales, block=block, dtype=torch.float64)
    again, rescaled = quantize(values, format, block=block)
    assert same(dequantize(again, rescaled, block=block, dtype=torch.float64), values)
    assert same(fake_quant(fake_quant(x, format, block=block), format, block=block), values)
    halved = rescaled.double() != scales.double()
    assert torch.equal(rescaled.double()[halved], scales.double()[halved] / 2)
    if isinstance(block, int):
        largest = values.abs().view(260, -1, block).amax(-1)
        assert torch.equal(halved, largest == scales.double() * TOPS[format] / 2)
        kept = (~halved).repeat_interleave(block, 1)
        assert torch.equal(unpacked(again)[kept], unpacked(codes)[kept]) and kept.any()


@pytest.mark.parametrize("format, relative, absolute", [("e4m3", 2.0**-4, 2.0**-10), ("e2m1", 2.0**-2, 2.0**-2)])
def test_the_error_is_bounded_and_nothing_is_clipped(format: str, relative: float, absolute: float) -> None:
    x = data(500, 64)
    codes, scales = quantize(x, format, block=32)
    scale = scales.double().repeat_interleave(32, 1)
    assert (x.abs() <= TOPS[format] * scale).all()
    error = (dequantize(codes, scales, block=32, dtype=torch.float64) - x).abs()
    assert (error <= torch.maximum(relative * x.abs() / (1 + relative), absolute * scale)).all()


@pytest.mark.parametrize("format, block, low, high", [("e4m3", 64, 0.0255, 0.0275), ("e2m1", 32, 0.112, 0.119)])
def test_the_error_on_normal_data(format: str, block: int, low: float, high: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 512)
    assert low < ((fake_quant(x, format, block=block) - x).norm() / x.norm()).item() < high


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_zeros_stay_with_their_sign(format: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype)
    x[:, ::3] = -0.0
    codes, scales = quantize(x, format, block=4)
    assert scales.double().unique().item() == {"e4m3": 2.0**-22, "e2m1": 2.0**-126}[format]
    assert same(dequantize(codes, scales, block=4, dtype=dtype), x)


def test_subnormal_values_and_the_floor() -> None:
    tiny = torch.tensor([2.0**-149, 2.0**-127, 1.5 * 2.0**-126, -(2.0**-128), 2.0**-140, 6 * 2.0**-126, 0, 2.0**-130])
    follows_the_oracle(tiny, "e2m1", 8)
    follows_the_oracle(tiny[:2], "e2m1", 2)
    assert same(fake_quant(tiny, "e4m3", block=8), torch.zeros(8).copysign(tiny))
    below = torch.tensor([9e-5, 2.0**-32, 1.01 * 2.0**-32, -(2.0**-31)])
    follows_the_oracle(below, "e4m3", 4)
    assert fake_quant(below, "e4m3", block=4)[1:].tolist() == [0, 2.0**-31, -(2.0**-31)]
    half = torch.tensor([[2.0**-24, 3 * 2.0**-24, 1000 * 2.0**-24, -65504]], dtype=torch.float16)
    follows_the_oracle(half.mT.contiguous(), "e4m3", 1)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
@pytest.mark.parametrize("block", [4, (2, 4)])
def test_a_bad_value_spoils_its_block_and_no_other(
    block: int | tuple[int, int], format: str, dtype: torch.dtype, bad: float
) -> None:
    x = data(4, 12, dtype=dtype)
    clean = fake_quant(x, format, block=block)
    x[1, 5] = bad
    codes, scales = quantize(x, format, block=block)
    got = dequantize(codes, scales, block=block, dtype=dtype)
    spoilt = torch.zeros(4, 12, dtype=torch.bool)
    spoilt[1 if block == 4 else slice(0, 2), 4:8] = True
    assert torch.equal(got.isnan(), spoilt) and same(got[~spoilt], clean[~spoilt])
    assert scales.view(torch.uint8).eq(255).sum() == 1
    assert (codes.view(torch.uint8)[1, 4:8] & 127 == 127).all() if format == "e4m3" else not codes[1, 2:4].any()
    assert same(fake_quant(x, format, block=block), got)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_the_largest_scale_and_past_it(format: str) -> None:
    limit = TOPS[format] * 2.0**127
    x = torch.tensor([[limit, -1], [math.nextafter(limit, math.inf), 1], [1e308, 1]], dtype=torch.float64)
    codes, scales = quantize(x, format, block=2)
    assert scales.view(torch.uint8).flatten().tolist() == [254, 255, 255]
    got = dequantize(codes, scales, block=2, dtype=torch.float64)
    assert got[0].tolist() == [limit, 0] and got[1:].isnan().all()
    assert dequantize(codes, scales, block=2)[0, 0] == math.inf
    rounded = fake_quant(torch.tensor([65504.0, -65504, 1, 0], dtype=torch.float16), format, block=4)
    assert rounded[:2].tolist() == [math.inf, -math.inf]


def test_layout_of_the_cached_entries() -> None:
    """584 bytes an entry of 512 channels with 64 rotary ones, one of them unused; 68 an index key (spec D.1)."""
    torch.manual_seed(0)
    entry, key = torch.randn(512).bfloat16(), torch.randn(128).bfloat16()
    parts = [*quantize(entry[:448], "e4m3", block=64), entry[448:]]
    assert sum(part.nbytes for part in parts) + 1 == 584
    assert sum(part.nbytes for part in quantize(hadamard(key), "e2m1", block=32)) == 68
    codes, _ = quantize(torch.tensor([0.5, -6, 1, 0, -0.5, 3]), "e2m1", block=6)
    assert codes.tolist() == [0xF1, 0x02, 0x59]


@pytest.mark.parametrize("format, block", BLOCKS)
def test_inputs_need_not_be_contiguous(format: str, block: int | tuple[int, int]) -> None:
    x = data(6, 128, 256, dtype=torch.float32)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for got, want in zip(quantize(strided, format, block=block), quantize(x, format, block=block)):
        assert got.is_contiguous() and same(got, want)
    codes, scales = quantize(x, format, block=block)
    strided = [part.view(torch.uint8).mT.contiguous().mT.view(part.dtype) for part in (codes, scales)]
    assert same(dequantize(*strided, block=block), dequantize(codes, scales, block=block))
    assert same(hadamard(x.mT.contiguous().mT), hadamard(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 5)])
def test_shapes_with_and_without_rows(lead: tuple[int, ...], device: str) -> None:
    for format, block, codes_shape in (("e4m3", 64, (*lead, 128)), ("e2m1", 32, (*lead, 64))):
        x = torch.zeros(*lead, 128, device=device)
        codes, scales = quantize(x, format, block=block)
        assert (codes.shape, scales.shape) == (codes_shape, (*lead, 128 // block))
        assert (codes.device.type, scales.device.type, scales.dtype) == (device, device, E8M0)
        assert dequantize(codes, scales, block=block, dtype=torch.bfloat16).shape == x.shape
        assert fake_quant(x, format, block=block).shape == hadamard(x).shape == x.shape
    rows = lead[-1] if lead else 5
    codes, scales = quantize(torch.zeros(*lead[:-1], rows, 160, device=device), "e2m1", block=32)
    codes, scales = e2m1_to_e4m3(codes, scales)
    assert codes.shape == (*lead[:-1], rows, 160) and scales.shape == (*lead[:-1], -(-rows // 128), 2)
    assert quantize(torch.zeros(3, 0, device=device), "e4m3", block=64)[1].shape == (3, 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format, block", BLOCKS)
def test_fake_quant_is_straight_through(format: str, block: int | tuple[int, int], dtype: torch.dtype) -> None:
    x = data(9, 128, dtype=dtype)
    x[0, 0], x[8, 127] = math.nan, 0
    x.requires_grad_()
    got = fake_quant(x, format, block=block)
    assert same(got.detach(), dequantize(*quantize(x, format, block=block), block=block, dtype=dtype))
    grad = torch.randn(9, 128).to(dtype)
    assert torch.equal(torch.autograd.grad(got, x, grad)[0], grad)
    assert not any(part.requires_grad for part in quantize(x, format, block=block))


def test_the_input_is_left_alone() -> None:
    x = data(4, 128, dtype=torch.float32)
    before = x.clone()
    for result in (fake_quant(x, "e4m3", block=64), hadamard(x), hadamard(x[:, :1])):
        result.zero_()
    assert torch.equal(x, before)


def expert(groups: Tensor, columns: int = 160) -> tuple[Tensor, Tensor]:
    """Random e2m1 codes [N, K / 2] under scales of the given exponents [N, K / 32]."""
    torch.manual_seed(0)
    return packed(torch.randint(16, (len(groups), columns))), powers(groups)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
@pytest.mark.parametrize("low, high", [(-127, -127), (-127, -122), (-126, -121), (-127, -113), (-9, 5), (113, 127)])
def test_reblocking_keeps_every_value(low: int, high: int, stored: torch.dtype) -> None:
    """Up to 14 powers of two in each block, down to scales that leave no room for 2^-6."""
    torch.manual_seed(0)
    groups = torch.randint(low, high + 1, (200, 5))
    codes, scales = expert(groups)
    folded, common = e2m1_to_e4m3(codes.view(stored), scales)
    assert folded.dtype == torch.float8_e4m3fn and common.shape == (2, 2)
    values = dequantize(codes, scales, block=32, dtype=torch.float64)
    assert same(dequantize(folded, common, block=(128, 128), dtype=torch.float64), values)
    for i, rows in enumerate((slice(0, 128), slice(128, 200))):
        for j, columns in enumerate((slice(0, 4), slice(4, 5))):
            assert common[i, j].double() == 2.0 ** max(groups[rows, columns].max().item() - 6, -127)


def test_reblocking_refuses_to_lose_a_value() -> None:
    groups = torch.zeros(130, 5, dtype=torch.int64)
    groups[7, 2] = -14
    codes, scales = expert(groups)
    e2m1_to_e4m3(codes, scales)
    groups[7, 2] = -15
    with pytest.raises(ValueError, match=r"^scales: \d+ of 20800 values, the first at \[7, \d+\], .*factor of 2\^14"):
        e2m1_to_e4m3(codes, powers(groups))
    codes[7, 32:48] = 0x42  # 1 and 2 are even multiples of a half, and fit at 2^-15 of the largest scale
    e2m1_to_e4m3(codes, powers(groups))
    codes[7, 32:48] = 0
    groups[7, 2] = -120
    e2m1_to_e4m3(codes, powers(groups))
    groups[129, 4] = 128
    with pytest.raises(ValueError, match=r"^scales: .*the first at \[128, 128\].*none NaN"):
        e2m1_to_e4m3(codes, powers(groups))


def test_reblocking_other_sizes() -> None:
    groups = torch.randint(10, (2, 7, 6))
    codes = packed(torch.randint(16, (2, 7, 96)))
    folded, common = e2m1_to_e4m3(codes, powers(groups), group=16, block=(3, 32))
    assert common.shape == (2, 3, 3)
    values = dequantize(codes, powers(groups), block=16)
    assert same(dequantize(folded, common, block=(3, 32)), values)


@pytest.mark.parametrize("bits", range(9))
def test_hadamard_is_the_matrix_of_signs(bits: int) -> None:
    d = 1 << bits
    sign = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)], dtype=torch.float64)
    x, other = torch.randn(2, 3, 5, d, dtype=torch.float64)
    x.requires_grad_()
    got = hadamard(x)
    torch.testing.assert_close(got, x @ sign / d**0.5, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard(got), x, rtol=0, atol=1e-13)
    torch.testing.assert_close((got * hadamard(other)).sum(-1), (x * other).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, x, other)[0], other @ sign / d**0.5, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
def test_hadamard_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 128).to(dtype).requires_grad_()
    got = hadamard(x)
    want = hadamard(x.double())
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert ((got - want).abs() <= 0.51 * eps * want.abs() + 1e-6).all()
    assert torch.autograd.grad(got.sum(), x)[0].dtype == dtype


def test_hadamard_spreads_a_channel_that_sticks_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    x[:, 3] *= 100
    plain, rotated = (fake_quant(y, "e2m1", block=32) for y in (x, hadamard(x)))
    beside = (slice(None), slice(4, 32))
    assert (plain - x)[beside].norm() > 0.9 * x[beside].norm()
    assert (hadamard(rotated) - x).norm() < 0.2 * x.norm()


def test_errors_name_the_argument() -> None:
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


@pytest.mark.parametrize("name", ["quantize", "dequantize", "fake_quant", "e2m1_to_e4m3", "hadamard"])
def test_the_reference_has_the_public_signature(name: str) -> None:
    public = dict(inspect.signature(getattr(quant, name)).parameters)
    public.pop("backend")
    twin = inspect.signature(getattr(eager, name)).parameters
    assert {k: (v.kind, v.default) for k, v in public.items()} == {k: (v.kind, v.default) for k, v in twin.items()}
