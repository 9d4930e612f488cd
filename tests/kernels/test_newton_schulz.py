"""Newton-Schulz iteration: its definition against the singular value decomposition, engines against the definition."""

import importlib
import math

import pytest
import torch
from oracle import distance, hold, relative_rms
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import newton_schulz, newton_schulz_many
from abyssal.kernels.newton_schulz import HYBRID, eager

SHORT = HYBRID[:1] + HYBRID[-1:]
FLOATS = {
    "eager": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture
def launch(request, monkeypatch):
    """Triton's launches, with blocks so small that a small matrix needs several; the shipped ones on a GPU."""
    pytest.importorskip("triton")
    request.getfixturevalue("by_triton")
    module = importlib.import_module("abyssal.kernels.newton_schulz.triton.launch")
    if request.getfixturevalue("emulated"):
        blocks = module.Blocks(16, 32, 16, 4, 2)
        monkeypatch.setattr(module, "tiles_for", lambda *_: module.Tiles(blocks, blocks, group=2))
        monkeypatch.setattr(module, "PANEL", {"ROWS": 8, "COLUMNS": 16})
    return module


@pytest.fixture
def steps(engine):
    """V4's schedule, in the interpreter two steps of it."""
    return HYBRID if engine == "eager" else SHORT


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device, dtype)


def schedule(s, steps=HYBRID):
    """What the steps make of a singular value."""
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return s


def iterated(compute, steps=HYBRID):
    """The op with products in `compute`; the definition of it, in float64."""

    def op(x, backend):
        dtype = None if x.dtype == torch.float64 else compute
        return newton_schulz(x, coefficients=steps, compute_dtype=dtype, backend=backend)

    return op


# the definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12, 40), (2, 2, 9, 5), (7, 7), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("steps", [HYBRID, SHORT, [(1.5, -0.5, 0.0)], [(1, 0, 0)]], ids=len)
def test_the_definition_is_a_polynomial_of_the_singular_values(shape, steps):
    x = normal(*shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    want = u * schedule(s / s.norm(dim=-1, keepdim=True), steps)[..., None, :] @ v
    assert distance(newton_schulz(x, coefficients=steps, backend="reference"), want) < 1e-9


def test_the_band_of_the_schedule():
    s = schedule(torch.logspace(math.log10(3e-5), 0, 200_001, dtype=torch.float64))
    assert s.min() > 1 - 1e-12 and s.max() < 1.0021
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert abs(schedule(tiny) / tiny - 79_263) < 1
    assert len(HYBRID) == 10 and HYBRID[:8] == ((3.4445, -4.7750, 2.0315),) * 8 and HYBRID[8:] == ((2, -1.5, 0.5),) * 2


@pytest.mark.parametrize(("m", "n"), [(48, 64), (64, 48), (64, 64), (24, 512)])
@pytest.mark.parametrize("tail", [0.3, 1e-3])
@pytest.mark.parametrize(
    ("compute", "slack", "apart"), [(torch.float32, 1e-6, (3e-4, 3e-4)), (torch.bfloat16, 0.01, (0.01, 0.25))]
)
def test_v4s_schedule_orthogonalises_by_eager(m, n, tail, compute, slack, apart):
    """Singular values from 1 down to `tail`: all of them where the schedule promises, the factors those of M."""
    short = min(m, n)
    u, v = (torch.linalg.qr(normal(side, short, seed=side + i, dtype=torch.float64)).Q for i, side in enumerate((m, n)))
    x = (u * torch.logspace(0, math.log10(tail), short, dtype=torch.float64)) @ v.T
    got = newton_schulz(x.float(), compute_dtype=compute).double()
    s = torch.linalg.svdvals(got)
    assert 1 - slack < s.min() and s.max() < 1.0021 + slack, f"singular values {s.min():.5f} .. {s.max():.5f}"
    gram = got @ got.T if m <= n else got.T @ got
    away = float((gram - torch.eye(short, dtype=torch.float64)).norm() / short**0.5)
    assert away < 2.1e-3 + slack, f"orthogonality error {away:.1e}"
    assert relative_rms(got, u @ v.T) < apart[tail < 0.1]  # in bfloat16 the directions of a small s are not those of M


def test_directions_that_a_matrix_does_not_have_stay_absent():
    """But for rounding; the others come out at 1."""
    x = normal(3, 20, 4) @ normal(3, 4, 30, seed=1)
    s = torch.linalg.svdvals(newton_schulz(x, compute_dtype=torch.float32, backend="reference").double())
    assert (s[:, :4] - 1).abs().max() < 3e-3 and s[:, 4:].max() < 0.1
    row = torch.zeros(5, 8)
    row[2] = torch.arange(8.0)
    got = newton_schulz(row, compute_dtype=torch.float32, backend="reference")
    assert relative_rms(got[2], row[2] / row[2].norm()) < 1e-3 and not got[[0, 1, 3, 4]].any()


# engines -------------------------------------------------------------------------------------------------------------


def spread(x):
    """With holes of NaN between its elements."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


CASES = {
    **{
        str(shape): normal(*shape) for shape in ((2, 20, 37), (37, 20), (1, 2, 17, 17), (1, 9), (9, 1), (1, 1), (40, 7))
    },
    **{f"{shape}, nothing": normal(*shape) for shape in ((0, 4), (4, 0), (0, 4, 5), (2, 0, 0))},
    "zero": torch.zeros(2, 4, 5),
    "a row": torch.zeros(5, 8).index_fill(0, torch.tensor([2]), 3.0),
    "with holes": spread(normal(2, 2, 10, 14)),
    "axes in another order": normal(2, 3, 10, 14).permute(1, 0, 3, 2),
    "one matrix, repeated": normal(10, 14).expand(2, 3, -1, -1),
}
WIDE = [(33, 65), (24, 512), (64, 48), (300, 130)]


@pytest.mark.parametrize("name", CASES)
def test_cases(engine, steps, name, device):
    for dtype in FLOATS[engine]:
        limits = {"out": {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-3}.get(dtype, 8e-3)}
        got = hold(iterated(torch.float32, steps), {"x": CASES[name]}, engine, dtype, limits=limits, device=device)[
            "out"
        ]
        assert got.dtype == dtype and got.is_contiguous() and not got.requires_grad


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide_matrices_by_eager(shape):
    for dtype in (torch.float64, torch.float32):
        hold(iterated(torch.float32), {"x": normal(3, *shape)}, "eager", dtype, limits={"out": LIMITS[dtype]})


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_in_half_precision(engine, steps, compute, device):
    """In bfloat16, as V4 trains, a small s is lost; those that matter come out within a few per cent."""
    for dtype in (torch.float32, compute):
        op, limits = iterated(compute, steps), {"out": 3 * LIMITS[compute]}
        hold(op, {"x": normal(2, 20, 33)}, engine, dtype, limits=limits, device=device)


def test_v4s_schedule_by_triton(launch, device):
    x = {"x": normal(18, 21)}
    hold(iterated(torch.float32), x, "triton", torch.float32, limits={"out": LIMITS[torch.float32]}, device=device)


@pytest.mark.parametrize("shape", [(5, 7), (12, 8), (1, 33), (24, 512), (33, 65), (300, 130)], ids=str)
def test_a_matrix_has_the_same_bits_in_any_batch_and_orientation_by_eager(shape, monkeypatch):
    for dtype in FLOATS["eager"]:
        x = normal(7, *shape, dtype=dtype)
        full = newton_schulz(x)
        assert torch.equal(full, newton_schulz(x)) and torch.equal(full, torch.stack([newton_schulz(m) for m in x]))
        assert torch.equal(full, newton_schulz(x.view(7, 1, *shape)).view_as(x))
        assert torch.equal(full.flip(0)[1:3], newton_schulz(x.flip(0)[1:3]))
        assert torch.equal(full, newton_schulz(x.mT).mT) and torch.equal(full, newton_schulz(spread(x)))
        with monkeypatch.context() as patch:
            patch.setattr(eager, "SCRATCH", 3 * 2 * x[0].numel())
            assert torch.equal(full, newton_schulz(x)), "in chunks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_a_matrix_does_not_matter(engine, steps, device, dtype):
    """Nor does it where squares overflow or vanish, or the entries themselves have no full precision."""
    x = ((normal(9, 18) * 8).round().clamp(-24, 24) / 32).to(device, dtype)
    want, limits = newton_schulz(x, coefficients=steps, backend=engine), torch.finfo(dtype)
    top = math.floor(math.log2(limits.max))
    low = round(math.log2(limits.smallest_normal * limits.eps)) + 5
    for power in (top, -3, low):
        got = newton_schulz(x.double().mul(2.0**power).to(dtype), coefficients=steps, backend=engine)
        assert torch.equal(got, want) if device == "cpu" else relative_rms(got, want) < 1e-2, f"2^{power}"


def test_zero_nan_and_infinity_stay_in_their_matrix(engine, steps, device):
    """The sides fit no block: what lies behind a matrix must not be read as its own."""
    x = normal(7, 18, 7, device=device)
    want = newton_schulz(x, coefficients=steps, backend=engine)
    x[1], x[2, 3, 4], x[3, 17, 6], x[4, 2, 2], x[5, 0] = 0, math.nan, math.inf, -math.inf, math.nan
    for backend in (engine, "reference"):
        got = newton_schulz(x, coefficients=steps, backend=backend)
        assert not got[1].any() and got[2:6].isnan().all()
        assert torch.equal(got[[0, 6]], want[[0, 6]]) or backend == "reference"


def test_autocast_and_gradients_leave_it_alone(engine, steps, device):
    x = normal(2, 6, 8, device=device)
    for backend in (engine, "reference"):
        want = newton_schulz(x, coefficients=steps, backend=backend)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(newton_schulz(x, coefficients=steps, backend=backend), want)
        assert not newton_schulz(x.clone().requires_grad_(), backend=backend).requires_grad


def test_many_matrices_of_any_shape(engine, steps):
    shapes = [(8, 12), (12, 8), (3, 8, 12), (2, 2, 12, 8), (5, 5), (1, 7), (8, 12), (12, 9), (0, 4)]
    matrices = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices += [*(normal(12, 8, dtype=dtype) for dtype in FLOATS[engine]), matrices[4].mT]
    options = {"coefficients": steps, "backend": engine}
    results = newton_schulz_many(matrices, **options)
    assert len(results) == len(matrices) and newton_schulz_many([], **options) == []
    for x, got in zip(matrices, results):
        assert got.dtype == x.dtype and torch.equal(got, newton_schulz(x, **options)), x.shape


def test_many_matrices_make_few_batches_of_bounded_size_by_eager(monkeypatch):
    batches = []
    stock = eager.newton_schulz
    monkeypatch.setattr(eager, "newton_schulz", lambda x, **o: batches.append(tuple(x.shape)) or stock(x, **o))
    matrices = [normal(4, 6), normal(6, 4), normal(2, 4, 6), normal(3, 3), normal(4, 6)]
    newton_schulz_many(matrices)
    assert batches == [(5, 4, 6), (1, 3, 3)]
    batches.clear()
    monkeypatch.setattr(importlib.import_module("abyssal.kernels.newton_schulz"), "BATCH", 48)
    newton_schulz_many(matrices)
    assert batches == [(2, 4, 6), (2, 4, 6), (1, 3, 3), (1, 4, 6)]


def test_scratch_does_not_grow_with_the_stack_by_eager(monkeypatch):
    monkeypatch.setattr(eager, "SCRATCH", 3 * 8 * 16 * 5)
    sizes, iterate = [], eager._iterate
    monkeypatch.setattr(eager, "_iterate", lambda *a: sizes.append(a[0].numel()) or iterate(*a))
    for e in (5, 50):
        newton_schulz(normal(e, 8, 16))
    assert sizes == [5 * 8 * 16] * 11


def test_refusals_name_the_argument():
    x = torch.ones(3, 4)
    for message, call in {
        r"x is torch.float32 \(3,\)": lambda: newton_schulz(x[:, 0]),
        "x is torch.int64": lambda: newton_schulz(x.long()),
        r"coefficients=\[\]": lambda: newton_schulz(x, coefficients=[]),
        r"coefficients=\[\(1, 2\)\]": lambda: newton_schulz(x, coefficients=[(1, 2)]),
        "compute_dtype=torch.float64": lambda: newton_schulz(x, compute_dtype=torch.float64),
        "compute_dtype=torch.int8": lambda: newton_schulz(x, compute_dtype=torch.int8),
        "compute_dtype=torch.bfloat16": lambda: newton_schulz(x.double(), compute_dtype=torch.bfloat16),
        r"shape \(3,\) among matrices": lambda: newton_schulz_many([x, x[:, 0]]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# Triton --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(16, 16, 16), (32, 16, 16), (16, 32, 32)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["", "tma"])
def test_tiles_of_any_shape_fill_both_triangles(launch, device, emulated, sides, tma, monkeypatch):
    if not emulated:
        pytest.skip("the shipped blocks are what runs there")
    x, half = normal(2, 48, 40 if tma else 37, device=device), normal(2, 24, 40, dtype=torch.bfloat16, device=device)
    options = {"coefficients": SHORT, "compute_dtype": torch.bfloat16}
    want, blocks = newton_schulz(half, **options), launch.Blocks(*sides, 4, 2)
    monkeypatch.setattr(launch, "tiles_for", lambda *_: launch.Tiles(blocks, blocks, tma=tma, group=2))
    gram, b = x.new_empty(2, 48, 48), x.new_empty(2, 48, 48)
    launch._symmetric(x, gram, 1.0)
    launch._symmetric(gram, b, 2.0315, gram, -4.775)
    assert torch.equal(gram, gram.mT) and torch.equal(b, b.mT)
    exact, out = x.double() @ x.double().mT, x.new_empty(x.shape)
    assert distance(gram, exact) < 1e-6 and distance(b, 2.0315 * exact @ exact - 4.775 * exact) < 1e-6
    launch._product(b, x, out, 3.4445)
    assert distance(out, 3.4445 * x.double() + b.double() @ x.double()) < 1e-6
    if sides[2] == 16:  # what is summed at a time is the same
        assert torch.equal(newton_schulz(half, **options), want), "by descriptors, in other blocks"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_has_the_same_bits_in_any_batch_chunk_and_orientation(launch, device, compute, monkeypatch):
    x = normal(4, 17, 21, device=device)
    options = {"coefficients": HYBRID[:1], "compute_dtype": compute}
    full = newton_schulz(x, **options)
    assert torch.equal(full[2:3], newton_schulz(x[2:3], **options))
    assert torch.equal(full, newton_schulz(spread(x), **options))
    sizes, normalise = [], launch._normalise
    monkeypatch.setattr(launch, "_normalise", lambda x, out: sizes.append(len(out)) or normalise(x, out))
    monkeypatch.setattr(launch, "SCRATCH", 2 * 3 * 17 * (17 + 21))
    assert torch.equal(full.mT, newton_schulz(x.mT.contiguous(), **options)), "transposed, in chunks of three"
    assert sizes == [3, 1]
    many = newton_schulz_many([x[0], x[1:3].mT, x[3:]], **options)
    assert torch.equal(full, torch.cat([many[0][None], many[1].mT, many[2]]))


def test_a_norm_has_the_same_bits_whichever_thread_adds_what(launch, device):
    """Which has which element is the compiler's choice, by the strides: any order gives the same sum."""
    x, draw = normal(32, 8, 16, device=device), torch.Generator().manual_seed(1)
    order = torch.randperm(8 * 16, generator=draw).to(device)
    shuffled = x.flatten(1)[:, order].view(x.shape)
    out, again = torch.empty_like(x), torch.empty_like(x)
    launch._normalise(x, out)
    launch._normalise(shuffled, again)
    assert torch.equal(out.flatten(1)[:, order], again.flatten(1))


def test_a_norm_over_many_panels(launch, device, monkeypatch):
    """More panels than one pass of the sum holds; the largest entry lies in the last, in the first, everywhere."""
    monkeypatch.setattr(launch, "PARTS", 4)
    rows, columns = launch.PANEL["ROWS"], launch.PANEL["COLUMNS"]
    x = torch.ones(3, rows + 1, 5 * columns, device=device)
    x[:, :rows, :columns], x[0, -1, -1], x[1, 0, columns] = 0, 1e30, 1e30
    out = x.new_empty(x.shape)
    launch._normalise(x, out)
    assert out[0, -1, -1] == out[1, 0, columns] == 1 and not out[:, :rows, :columns].any()
    for got, matrix in zip(out, x):
        assert relative_rms(got, matrix.double() / matrix.double().norm()) < 1e-6


def test_operator_compile_and_checkpoint(launch, device, monkeypatch):
    """torch sees one operator, without a gradient of its own; fake tensors cannot be filled with NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    x = normal(2, 9, 5, device=device)
    operator = importlib.import_module("abyssal.kernels.newton_schulz.triton")._newton_schulz
    torch.library.opcheck(operator, (x, [1.5, -0.5, 0.0], torch.float32))

    def run(x):
        return newton_schulz(x.sin(), coefficients=SHORT) * x

    want = run(x)
    for dynamic in (False, True):
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x), want)
    x.requires_grad_()
    out = checkpoint(run, x, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(out, want) and torch.equal(x.grad, newton_schulz(x.sin(), coefficients=SHORT))


def test_float64_is_refused_by_name(launch, device):
    x = torch.eye(3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="float64"):
        newton_schulz(x)
    assert newton_schulz(x, backend="auto").dtype == torch.float64


def test_the_table_is_by_shape_and_dtype(shipped):
    half = torch.bfloat16
    assert shipped.tiles_for(128, 512, half) in shipped.HALF.values()
    assert shipped.tiles_for(64, 512, half) is shipped.NARROW
    for r, c, dtype in ((128, 512, torch.float32), (120, 512, half), (128, 500, half), (24, 512, half)):
        assert shipped.tiles_for(r, c, dtype) is shipped.PLAIN


# at a model's sizes --------------------------------------------------------------------------------------------------

SIZES = [(3, 2048, 4096), (2, 8192, 1024), (6, 1000, 1008), (40, 24, 16384), (64, 128, 64), (5, 129, 77), (1, 64, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_near_to_float64_as_eager(shipped, shape, compute):
    x, op = torch.randn(shape, device="cuda"), iterated(compute, HYBRID[:2] + HYBRID[-1:])
    want, got, plain = op(x.double(), "reference"), op(x, "triton"), op(x, "eager")
    assert relative_rms(got, want) <= 2 * relative_rms(plain, want) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [s for s in SIZES if max(s[1:]) >= 2 * min(s[1:])], ids=str)
def test_v4s_schedule_in_bfloat16_orthogonalises(shipped, shape):
    """Of random matrices twice as long as wide, no singular value is small."""
    got = newton_schulz(torch.randn(shape, device="cuda").bfloat16())
    assert got.dtype == torch.bfloat16
    wide = got.double() if shape[1] <= shape[2] else got.double().mT
    away = wide @ wide.mT - torch.eye(min(shape[1:]), device="cuda", dtype=torch.float64)
    assert float(away.flatten(1).norm(dim=1).max()) / min(shape[1:]) ** 0.5 < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_on_each_run_and_in_any_batch(shipped, shape, compute, monkeypatch):
    x = torch.randn(shape, device="cuda")
    full = newton_schulz(x, compute_dtype=compute)
    assert torch.equal(full, newton_schulz(x, compute_dtype=compute))
    assert torch.equal(full[-1], newton_schulz(x[-1], compute_dtype=compute))
    assert torch.equal(full.mT, newton_schulz(x.mT, compute_dtype=compute))
    parts = newton_schulz_many([x[0], x.mT, *x], compute_dtype=compute)
    assert torch.equal(full[0], parts[0]) and torch.equal(full.mT, parts[1]) and torch.equal(full[-1], parts[-1])
    monkeypatch.setattr(shipped, "SCRATCH", 1)
    assert torch.equal(full, newton_schulz(x, compute_dtype=compute)), "one by one"


@pytest.mark.gpu
def test_large_small_zero_and_nan_matrices(shipped):
    x = torch.randn(6, 200, 304, device="cuda")
    want = newton_schulz(x)
    x[1] *= 2.0**110
    x[2] *= 2.0**-110
    x[3], x[4, 7, 7] = 0, math.nan
    got = newton_schulz(x)
    assert torch.equal(got[[0, 5]], want[[0, 5]]) and not got[3].any() and got[4].isnan().all()
    assert relative_rms(got[1:3], want[1:3]) < 1e-2


@pytest.mark.gpu
def test_a_cuda_graph_and_nothing_that_waits(shipped):
    x = torch.randn(4, 256, 512, device="cuda")
    newton_schulz(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        newton_schulz(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = newton_schulz(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, newton_schulz(x))


@pytest.mark.gpu
def test_scratch_is_bounded(shipped):
    """Of 64 matrices, what is at work at once is what SCRATCH says, beside the result."""
    x = torch.randn(64, 2048, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = newton_schulz(x)
    peak = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert peak <= 2 * shipped.SCRATCH + 4_000_000
