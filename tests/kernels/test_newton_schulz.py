"""Newton-Schulz iteration against the singular value decomposition in float64: band, directions, batches, edges."""

import importlib
import math

import pytest
import torch

from abyssal.kernels import newton_schulz, newton_schulz_many
from abyssal.kernels.newton_schulz import HYBRID, eager

SHAPES = [(16, 16), (12, 40), (40, 12), (1, 9), (9, 1), (1, 1), (33, 65), (24, 512), (64, 48)]


def schedule(s, coefficients=HYBRID):
    """What the steps make of a singular value."""
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def oracle(x, coefficients=HYBRID):
    """`U p(S / |S|) V^T` in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u * schedule(s / s.norm(dim=-1, keepdim=True), coefficients)[..., None, :] @ v


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 5e-5)])
def test_the_polynomial_of_the_singular_values(shape, dtype, limit):
    x = normal(3, *shape, dtype=dtype)
    got = newton_schulz(x)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    assert error(got, oracle(x)) < limit


@pytest.mark.parametrize(("m", "n"), [(48, 64), (64, 48), (64, 64), (24, 512)])
@pytest.mark.parametrize("tail", [0.3, 1e-3])
@pytest.mark.parametrize(
    ("compute", "slack", "apart"), [(torch.float32, 1e-6, (3e-4, 3e-4)), (torch.bfloat16, 0.01, (0.01, 0.25))]
)
def test_v4s_schedule_orthogonalises(m, n, tail, compute, slack, apart):
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
    assert error(got, u @ v.T) < apart[tail < 0.1]  # in bfloat16 the directions of a small s are not those of M


def test_the_band_of_the_schedule():
    s = schedule(torch.logspace(math.log10(3e-5), 0, 200_001, dtype=torch.float64))
    assert s.min() > 1 - 1e-12 and s.max() < 1.0021
    tiny = torch.tensor(1e-9, dtype=torch.float64)
    assert abs(schedule(tiny) / tiny - 79_263) < 1
    assert len(HYBRID) == 10 and HYBRID[:8] == ((3.4445, -4.7750, 2.0315),) * 8 and HYBRID[8:] == ((2, -1.5, 0.5),) * 2


def test_other_schedules():
    x = normal(2, 9, 14, dtype=torch.float64)
    for steps in ([(3.4445, -4.775, 2.0315)] * 5, [(1.5, -0.5, 0.0)], [[2, -1.5, 0.5], [1, 0, 0]]):
        assert error(newton_schulz(x, coefficients=steps), oracle(x, steps)) < 1e-12
    assert error(newton_schulz(x, coefficients=[(1, 0, 0)]), x / x.flatten(1).norm(dim=1)[:, None, None]) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (12, 8), (1, 33), (24, 512), (33, 65), (300, 130)], ids=str)
def test_a_matrix_has_the_same_bits_in_any_batch_and_orientation(dtype, shape, monkeypatch):
    x = normal(7, *shape, dtype=dtype)
    full = newton_schulz(x)
    one = torch.stack([newton_schulz(matrix) for matrix in x])
    assert torch.equal(full, newton_schulz(x)) and torch.equal(full, one)
    assert torch.equal(full, newton_schulz(x.view(7, 1, *shape)).view_as(x))
    assert torch.equal(full.flip(0)[1:3], newton_schulz(x.flip(0)[1:3]))
    assert torch.equal(full, newton_schulz(x.mT).mT)
    monkeypatch.setattr(eager, "SCRATCH", 3 * 2 * x[0].numel())
    assert torch.equal(full, newton_schulz(x)), "in chunks"


def test_strided_inputs():
    x = normal(6, 2, 10, 14)
    spread = torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    wanted = newton_schulz(x)
    for strided, want in (
        (spread, wanted),
        (spread.permute(1, 0, 2, 3), wanted.permute(1, 0, 2, 3)),
        (x.mT.contiguous().mT, wanted),
        (x[:1].expand(3, -1, -1, -1), wanted[:1].expand(3, -1, -1, -1)),
    ):
        assert not strided.is_contiguous() and torch.equal(newton_schulz(strided), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_of_a_matrix_does_not_matter(dtype):
    """Nor does it where squares overflow or vanish, or the entries themselves have no full precision."""
    x = ((normal(4, 8, 12) * 8).round().clamp(-24, 24) / 32).to(dtype)
    want, limits = newton_schulz(x), torch.finfo(dtype)
    top = math.floor(math.log2(limits.max))
    low = round(math.log2(limits.smallest_normal * limits.eps)) + 5
    for power in (top, -3, low):
        assert torch.equal(newton_schulz(x.double().mul(2.0**power).to(dtype)), want), f"2^{power}"


def test_zero_nan_and_infinity_stay_in_their_matrix():
    x = normal(6, 10, 7)
    want = newton_schulz(x)
    x[1], x[2, 3, 4], x[3, 0, 0], x[4, 2, 2] = 0, math.nan, math.inf, -math.inf
    got = newton_schulz(x)
    assert torch.equal(got[[0, 5]], want[[0, 5]]) and not got[1].any() and got[2:5].isnan().all()
    assert torch.equal(newton_schulz(torch.zeros(4, 4, dtype=torch.bfloat16)), torch.zeros(4, 4, dtype=torch.bfloat16))


def test_rank_deficient_matrices():
    """A direction that a matrix does not have stays absent, but for rounding; the others come out at 1."""
    x = normal(3, 20, 4) @ normal(3, 4, 30, seed=1)
    s = torch.linalg.svdvals(newton_schulz(x).double())
    assert (s[:, :4] - 1).abs().max() < 3e-3 and s[:, 4:].max() < 0.1
    row = torch.zeros(5, 8)
    row[2] = torch.arange(8.0)
    got = newton_schulz(row)
    assert error(got[2], row[2] / row[2].norm()) < 1e-3 and not got[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_products(dtype):
    """In bfloat16, as V4 trains, a small s is lost; those that matter come out within a few per cent."""
    x = normal(4, 32, 64)
    got = newton_schulz(x, compute_dtype=dtype)
    assert got.dtype == torch.float32 and error(got, oracle(x)) < {torch.float16: 4e-3, torch.float32: 1e-5}.get(
        dtype, 3e-2
    )
    half = newton_schulz(x.to(dtype), compute_dtype=dtype)
    assert half.dtype == dtype and error(half, oracle(x.to(dtype))) < 4e-2


def test_autocast_and_gradients_leave_it_alone():
    x = normal(2, 6, 8)
    want = newton_schulz(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(newton_schulz(x), want)
    assert not newton_schulz(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 5), (2, 0, 0)])
def test_nothing_to_do(shape):
    assert newton_schulz(torch.zeros(shape)).shape == shape
    assert newton_schulz_many([torch.zeros(shape), torch.ones(1, 1)])[0].shape == shape


def test_many_matrices_of_any_shape():
    shapes = [(8, 12), (12, 8), (3, 8, 12), (2, 2, 12, 8), (5, 5), (1, 7), (8, 12), (12, 9)]
    matrices = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices += [normal(8, 12, dtype=torch.float64), normal(12, 8, dtype=torch.bfloat16), matrices[4].mT]
    results = newton_schulz_many(matrices)
    assert len(results) == len(matrices) and newton_schulz_many([]) == []
    for x, got in zip(matrices, results):
        assert got.dtype == x.dtype and torch.equal(got, newton_schulz(x)), x.shape


def test_many_matrices_make_few_batches_of_bounded_size(monkeypatch):
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


def test_scratch_does_not_grow_with_the_stack(monkeypatch):
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
