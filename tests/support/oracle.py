"""An op's engines against its one definition, `backend="reference"`, which computes in float64.

    want = outcome(op, inputs, backend="reference", dtype=torch.float64)
    hold(op, inputs, engine, torch.bfloat16)         values and gradients, each within its bound

Inputs are keywords of the op. Floating tensors are leaves; those named in `kept` stay float32 where the others are of a
half precision. Results are named: of an op that returns one tensor "out", else by position or field, gradients "d" and
the input's name.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
EXACT = 1e-10  # of float64, relative to the largest element
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def outcome(
    op: Callable[..., Any],
    inputs: Inputs,
    *,
    backend: str,
    dtype: torch.dtype,
    kept: Collection[str] = (),
    fixed: Collection[str] = (),
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Results and gradients. Upstream gradients are the same normal numbers for every backend and dtype.

    fixed: floating inputs of which no gradient is asked.
    """
    leaves, given = {}, {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wide = torch.promote_types(dtype, torch.float32) if name in kept else dtype
            value = value.detach().to(device=device, dtype=wide).requires_grad_(name not in fixed)
            leaves |= {name: value} if name not in fixed else {}
        given[name] = value.to(device) if isinstance(value, Tensor) and not value.requires_grad else value
    returned = op(**given, backend=backend)
    named = returned._asdict() if hasattr(returned, "_asdict") else returned
    if isinstance(named, Tensor):
        named = {"out": named}
    elif not isinstance(named, dict):
        named = {str(i): value for i, value in enumerate(named)}
    generator, upstream, learned = torch.Generator().manual_seed(9), [], []
    for value in named.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.requires_grad:
                learned.append(value)
                upstream.append(drawn.to(value))
    found = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
    if learned:
        torch.autograd.backward(learned, upstream)
        found |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found


def hold(
    op: Callable[..., Any],
    inputs: Inputs,
    engine: str,
    dtype: torch.dtype,
    *,
    kept: Collection[str] = (),
    fixed: Collection[str] = (),
    limits: dict[str, float] | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The engine's outcome, held against the definition's on the same rounded inputs; `limits` by name where the usual
    bound of the dtype is not the right one. Integers must be equal; a gradient that one of them lacks must be zero.
    """
    rounded = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and name not in kept else value
        for name, value in inputs.items()
    }
    want = outcome(op, rounded, backend="reference", dtype=torch.float64, kept=kept, fixed=fixed)
    got = outcome(op, rounded, backend=engine, dtype=dtype, kept=kept, fixed=fixed, device=device)
    usual = ROUNDING.get(dtype, EXACT)
    for name in want.keys() | got.keys():
        a, b = got.get(name), want.get(name)
        a = torch.zeros_like(b) if a is None else a.cpu()
        b = torch.zeros_like(a) if b is None else b
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{name}: not the same integers"
            continue
        away, limit = distance(a, b), (limits or {}).get(name, usual)
        assert away <= limit, f"{name}: {away:.1e} from the definition, allowed {limit:.0e}"
    return got


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest number that is wanted; what is not finite has to be the same."""
    got, want = got.detach().double(), want.detach().double()
    sound = want.isfinite()
    if not torch.equal(got[~sound].nan_to_num(nan=0.0), want[~sound].nan_to_num(nan=0.0)) or not bool(
        got[sound].isfinite().all()
    ):
        return float("inf")
    scale = want[sound].abs().max().clamp_min(1e-30) if bool(sound.any()) else 1.0
    return float((got - want)[sound].abs().max() / scale) if bool(sound.any()) else 0.0


def relative_rms(got: Tensor, want: Tensor) -> float:
    """rms(got - want) / rms(want), in float64."""
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().clamp_min(1e-30) if want.numel() else torch.ones(())
    return float((got - want).square().mean().sqrt() / scale) if want.numel() else 0.0


def assert_same(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = relative_rms(got, want)
    assert error <= limit, f"{name}: relative rms error {error:.2e} is above {limit:.0e}"
