"""The number formats on a CUDA device: the reference's bits at sizes of a model, and CUDA graphs."""

import pytest
import torch

from abyssal.kernels import dequantize, e2m1_to_e4m3, fake_quant, hadamard, quantize

pytestmark = pytest.mark.gpu
CASES = [
    ("e4m3", 128, (777, 4096)),
    ("e4m3", (1, 64), (777, 448)),
    ("e4m3", (128, 128), (1000, 3000)),
    ("e4m3", (256, 256), (1000, 3000)),
    ("e2m1", 32, (8, 96, 2048)),
    ("e2m1", (1, 32), (777, 128)),
]


@pytest.fixture(autouse=True)
def clean_memory(monkeypatch, backend):
    monkeypatch.undo()  # poisoned memory would fill gigabytes
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def same(a, b):
    """Equal bits, but for those of a NaN."""
    if a.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.equal(bits(a), bits(b))
    a, b = (x.float() if x.dtype == torch.float8_e4m3fn else x for x in (a, b))
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


def agrees(x, format, block):
    """As the reference on a CPU."""
    got, want = quantize(x, format, block=block), quantize(x.cpu(), format, block=block, backend="eager")
    assert all(same(a.cpu(), b) for a, b in zip(got, want))
    for dtype in (torch.float32, x.dtype, torch.float64):
        values = dequantize(*want, block=block, dtype=dtype, backend="eager")
        assert same(dequantize(*got, block=block, dtype=dtype).cpu(), values)
    faked = fake_quant(x.cpu(), format, block=block, backend="eager")
    assert same(fake_quant(x, format, block=block).cpu(), faked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "block", "shape"), CASES)
def test_bits_of_the_reference(format, block, shape, dtype):
    torch.manual_seed(0)
    agrees((torch.randn(shape) * 10 ** torch.randn(shape)).to("cuda", dtype), format, block)


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_all_magnitudes_with_subnormal_ones(format):
    torch.manual_seed(0)
    for width, block in ((32, 2), (26, 4), (24, 2)):
        x = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (1 << 20,)).int().view(torch.float32)
        agrees(x.cuda(), format, block)
    for dtype in (torch.bfloat16, torch.float16):
        agrees(torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).cuda(), format, 16)


def test_four_bits_to_eight_and_hadamard():
    torch.manual_seed(0)
    codes, scales = quantize(torch.randn(2, 300, 640, device="cuda"), "e2m1", block=32)
    for a, b in zip(e2m1_to_e4m3(codes, scales), e2m1_to_e4m3(codes.cpu(), scales.cpu(), backend="eager")):
        assert same(a.cpu(), b)
    scales[1, 7, 2] = 0
    codes[1, 7, 32] = 1
    with pytest.raises(ValueError, match=r"^scales"):
        e2m1_to_e4m3(codes, scales)
    for d in (1, 64, 128, 512):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(999, d, device="cuda", dtype=dtype)
            assert torch.equal(hadamard(x).cpu(), hadamard(x.cpu(), backend="eager"))


def test_a_cuda_graph_replays_other_values_and_nothing_waits():
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
