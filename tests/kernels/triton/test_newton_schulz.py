"""The kernels of the Newton-Schulz iteration against a float64 oracle and the reference: every product, every edge."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import newton_schulz, newton_schulz_many
from abyssal.kernels.newton_schulz import HYBRID
from abyssal.kernels.newton_schulz import triton as op
from abyssal.kernels.newton_schulz.triton import launch, tiles

stock_tiles = launch.tiles_for
SHORT = HYBRID[:1] + HYBRID[-1:]


@pytest.fixture(autouse=True)
def small_blocks(emulated, monkeypatch, backend):
    """Blocks so small that a small matrix needs several, in the interpreter; the shipped ones on a GPU."""

    def use(rows=16, columns=32, inner=16, tma=False):
        blocks = tiles.Blocks(rows, columns, inner, 4, 2)
        monkeypatch.setattr(launch, "tiles_for", lambda *_: tiles.Tiles(blocks, blocks, tma=tma, group=2))

    if emulated:
        use()
        monkeypatch.setattr(launch, "PANEL", {"ROWS": 8, "COLUMNS": 16})
    return use


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def oracle(x, steps):
    """`U p(S / |S|) V^T` in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ v


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("shape", [(2, 20, 37), (37, 20), (1, 2, 17, 17), (1, 9), (1, 1), (40, 7)], ids=str)
def test_the_polynomial_of_the_singular_values(device, shape):
    x = normal(*shape, device=device)
    got = newton_schulz(x, coefficients=SHORT, compute_dtype=torch.float32)
    assert got.dtype == torch.float32 and got.shape == x.shape and got.is_contiguous()
    assert error(got, oracle(x, SHORT)) < 3e-6
    plain = newton_schulz(x, coefficients=SHORT, compute_dtype=torch.float32, backend="eager")
    assert error(got, plain) < 3e-6


def test_v4s_schedule(device):
    x = normal(18, 21, device=device)
    assert error(newton_schulz(x, compute_dtype=torch.float32), oracle(x, HYBRID)) < 5e-5


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dtypes_are_as_near_to_float64_as_the_reference(device, dtype, compute):
    x = normal(2, 33, 20, dtype=dtype, device=device)
    got, plain = (newton_schulz(x, coefficients=SHORT, compute_dtype=compute, backend=b) for b in ("triton", "eager"))
    assert got.dtype == plain.dtype == dtype
    want = oracle(x, SHORT)
    assert error(got, want) <= 1.5 * error(plain, want) + 1e-6


@pytest.mark.parametrize("blocks", [(16, 16, 16), (32, 16, 16), (16, 32, 32)], ids=str)
@pytest.mark.parametrize("tma", [False, True])
def test_tiles_of_any_shape_fill_both_triangles(small_blocks, device, emulated, blocks, tma):
    if not emulated:
        pytest.skip("the shipped blocks are what runs there")
    small_blocks(*blocks, tma=tma)
    x = normal(2, 48, 40 if tma else 37, device=device)
    gram, b = x.new_empty(2, 48, 48), x.new_empty(2, 48, 48)
    launch._symmetric(x, gram, 1.0)
    launch._symmetric(gram, b, 2.0315, gram, -4.775)
    assert torch.equal(gram, gram.mT) and torch.equal(b, b.mT)
    exact = x.double() @ x.double().mT
    assert error(gram, exact) < 1e-6 and error(b, 2.0315 * exact @ exact - 4.775 * exact) < 1e-6
    out = x.new_empty(x.shape)
    launch._product(b, x, out, 3.4445)
    assert error(out, 3.4445 * x.double() + b.double() @ x.double()) < 1e-6


def test_descriptors_change_nothing(small_blocks, device, emulated):
    if not emulated:
        pytest.skip("the shipped blocks are what runs there")
    x = normal(2, 24, 40, dtype=torch.bfloat16, device=device)
    want = newton_schulz(x, coefficients=SHORT, compute_dtype=torch.bfloat16)
    small_blocks(tma=True)
    assert torch.equal(newton_schulz(x, coefficients=SHORT, compute_dtype=torch.bfloat16), want)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_matrix_has_the_same_bits_in_any_batch_chunk_and_orientation(device, compute, monkeypatch):
    x = normal(4, 17, 21, device=device)
    options = {"coefficients": HYBRID[:1], "compute_dtype": compute}
    full = newton_schulz(x, **options)
    assert torch.equal(full[2:3], newton_schulz(x[2:3], **options))
    monkeypatch.setattr(launch, "SCRATCH", 2 * 3 * 17 * (17 + 21))
    assert torch.equal(full.mT, newton_schulz(x.mT.contiguous(), **options)), "transposed, in chunks of three"
    many = newton_schulz_many([x[0], x[1:3].mT, x[3:]], **options)
    assert torch.equal(full, torch.cat([many[0][None], many[1].mT, many[2]]))


def test_scratch_is_bounded(device, monkeypatch):
    sizes, normalise = [], launch._normalise
    monkeypatch.setattr(launch, "_normalise", lambda x, out: sizes.append(len(out)) or normalise(x, out))
    monkeypatch.setattr(launch, "SCRATCH", 2 * 2 * 4 * (4 + 6))
    newton_schulz(normal(5, 4, 6, device=device), coefficients=SHORT)
    assert sizes == [2, 2, 1]


def test_strided_inputs(device):
    x = normal(2, 2, 10, 14, device=device)
    spread = torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    want = newton_schulz(x, coefficients=SHORT)
    for strided, expected in (
        (spread, want),
        (spread.permute(1, 0, 2, 3), want.permute(1, 0, 2, 3)),
        (x[0, 0].expand(2, 3, -1, -1), want[0, 0].expand(2, 3, -1, -1)),
    ):
        assert not strided.is_contiguous() and torch.equal(newton_schulz(strided, coefficients=SHORT), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_of_a_matrix_does_not_matter(device, dtype):
    """Nor does it where squares overflow or vanish, or the entries themselves have no full precision."""
    x = ((normal(9, 18) * 8).round().clamp(-24, 24) / 32).to(device, dtype)
    want, limits = newton_schulz(x, coefficients=SHORT), torch.finfo(dtype)
    top = math.floor(math.log2(limits.max))
    low = round(math.log2(limits.smallest_normal * limits.eps)) + 5
    for power in (top, -3, low):
        got = newton_schulz(x.double().mul(2.0**power).to(dtype), coefficients=SHORT)
        assert torch.equal(got, want) if device == "cpu" else error(got, want) < 1e-2, f"2^{power}"


def test_zero_nan_and_infinity_stay_in_their_matrix(device):
    """The sides fit no block: what lies behind a matrix must not be read as its own."""
    x = normal(7, 18, 7, device=device)
    want = newton_schulz(x, coefficients=SHORT[:1])
    x[1], x[2, 3, 4], x[3, 17, 6], x[4, 2, 2], x[5, 0] = 0, math.nan, math.inf, -math.inf, math.nan
    got = newton_schulz(x, coefficients=SHORT[:1])
    assert torch.equal(got[[0, 6]], want[[0, 6]]) and not got[1].any() and got[2:6].isnan().all()


def test_a_norm_over_many_panels(device, monkeypatch):
    """More panels than one pass of the sum holds; the largest entry lies in the last, in the first, everywhere."""
    monkeypatch.setattr(launch, "PARTS", 4)
    rows, columns = launch.PANEL["ROWS"], launch.PANEL["COLUMNS"]
    x = torch.ones(3, rows + 1, 5 * columns, device=device)
    x[:, :rows, :columns], x[0, -1, -1], x[1, 0, columns] = 0, 1e30, 1e30
    out = x.new_empty(x.shape)
    launch._normalise(x, out)
    assert out[0, -1, -1] == out[1, 0, columns] == 1 and not out[:, :rows, :columns].any()
    for got, matrix in zip(out, x):
        assert error(got, matrix.double() / matrix.double().norm()) < 1e-6


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 5)])
def test_nothing_to_do(device, shape):
    assert newton_schulz(torch.zeros(shape, device=device)).shape == shape


def test_operator_compile_and_checkpoint(device, monkeypatch, backend):
    """torch sees one operator, without a gradient of its own; fake tensors cannot be filled with NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    x = normal(2, 9, 5, device=device)
    torch.library.opcheck(op._newton_schulz, (x, [1.5, -0.5, 0.0], torch.float32))

    def run(x):
        return newton_schulz(x.sin(), coefficients=SHORT) * x

    want = run(x)
    for dynamic in (False, True):
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x), want)
    x.requires_grad_()
    out = checkpoint(run, x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(out, want) and torch.equal(x.grad, newton_schulz(x.sin(), coefficients=SHORT))


def test_float64_is_refused_by_name(device):
    x = torch.eye(3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="float64"):
        newton_schulz(x)
    assert newton_schulz(x, backend="auto").dtype == torch.float64


def test_the_table_is_by_shape_and_dtype():
    half = torch.bfloat16
    assert stock_tiles(128, 512, half) in tiles.HALF.values() and stock_tiles(64, 512, half) is tiles.NARROW
    for r, c, dtype in ((128, 512, torch.float32), (120, 512, half), (128, 500, half), (24, 512, half)):
        assert stock_tiles(r, c, dtype) is tiles.PLAIN
