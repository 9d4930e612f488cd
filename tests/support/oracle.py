"""Errors that name their tensor, for comparisons with an oracle."""

import torch


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """rms(got - want) / rms(want), in float64."""
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().clamp_min(1e-30) if want.numel() else torch.ones(())
    return float((got - want).square().mean().sqrt() / scale) if want.numel() else 0.0


def assert_same(name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = relative_rms(got, want)
    assert error <= limit, f"{name}: relative rms error {error:.2e} is above {limit:.0e}"
