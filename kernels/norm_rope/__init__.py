"""RMSNorm and rotary position embedding (RoPE), alone and in one pass, with the YaRN frequencies of compressed layers.

    rms_norm(x) = weight x / sqrt(mean(x^2) + eps)
    rope(x)     = e^{i t f_j} (x_{2j} + i x_{2j+1})        for the last channels, taken as adjacent pairs

Two rotated vectors meet in a product that depends on the difference of their positions only. Attention rotates its
output back, `inverse=True`, because key and value are one vector here and the value must not keep its angle.

Axes: b batch · t positions · D channels, the last `dim` of them rotated in pairs j.
"""

import math

import torch
from torch import Tensor

from ..backend import implementation


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str | None = None) -> Tensor:
    """`weight x / sqrt(mean(x^2) + eps)` over the last axis, in float32 and rounded once.

    Args:
        x: [..., d].
        weight: [d], or None for the plain norm.
        eps: added to the mean square.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [..., d] in the dtype of `x`.

    Raises:
        ValueError: `x` is not a float tensor with channels, `weight` does not fit it, or `eps` is negative.

    Source: arXiv 1910.07467; V4 uses it with a weight on hidden states and latents, without one on query heads.
    """
    _check_norm(x, weight, eps)
    return implementation("norm_rope", backend, x).rms_norm(x, weight, eps)


def rope_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original: int = 0,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
) -> Tensor:
    """The angle per position of each pair, `f_j = theta^(-2j/dim)`; YaRN's interpolation of them where `factor` > 1.

        f_j <- f_j (1 - ramp_j) + f_j / factor * ramp_j
        ramp_j = clamp((j - low) / (high - low), 0, 1)
        low, high = max(floor(pair(beta_fast)), 0), min(ceil(pair(beta_slow)), dim - 1)
        pair(rotations) = dim ln(original / (2 pi rotations)) / (2 ln theta)

    Pairs that turn more than `beta_fast` times within the original length stay, those below `beta_slow` are slowed by
    `factor`. The logits get no temperature (YaRN's "mscale").

    Args:
        dim: rotated channels, even.
        theta: the base of the frequencies.
        factor: how much longer than `original` the context becomes; 1 leaves the frequencies alone.
        original: the context length before the extension, in tokens.
        beta_fast: rotations within `original` from which on a pair stays as it is.
        beta_slow: rotations within `original` below which a pair is slowed in full.
        truncate: whether the ramp's ends are rounded to whole pairs.

    Returns:
        float32 [dim / 2], computed in float32 like the released tables.

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2104.09864; YaRN arXiv 2309.00071; V4's released code.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim}: must be even and at least 2")
    if not theta > 1:
        raise ValueError(f"theta={theta}: must be above 1")
    if not factor >= 1:
        raise ValueError(f"factor={factor}: must be at least 1")
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if factor == 1:
        return frequencies
    if original < 1:
        raise ValueError(f"original={original}: must be at least 1 where factor={factor} turns YaRN on")
    if not 0 < beta_slow <= beta_fast:
        raise ValueError(f"beta_slow={beta_slow}: must be above 0 and not above beta_fast={beta_fast}")

    def pair(rotations: float) -> float:
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def rope_rotation(positions: Tensor, frequencies: Tensor) -> Tensor:
    """`e^{i t f}` for each position and pair; the angle is taken in float32, as in the release.

    Args:
        positions: int64 [B, T].
        frequencies: float32 [dim / 2], from `rope_frequencies`.

    Returns:
        complex64 [B, T, dim / 2].

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: V4's released code.
    """
    if positions.dtype != torch.int64 or positions.ndim != 2:
        raise ValueError(f"positions: got {positions.dtype} {list(positions.shape)}, allowed is int64 [B, T]")
    if frequencies.ndim != 1 or not frequencies.is_floating_point():
        shape = list(frequencies.shape)
        raise ValueError(f"frequencies: got {frequencies.dtype} {shape}, allowed is float32 [dim / 2]")
    angle = positions[..., None].float() * frequencies.float()
    return torch.polar(torch.ones_like(angle), angle)


def rope(x: Tensor, rotation: Tensor, *, inverse: bool = False, backend: str | None = None) -> Tensor:
    """Rotates the last `dim` channels in adjacent pairs, `(x_{2j} + i x_{2j+1}) e^{i t f_j}`, in float32.

    Args:
        x: [B, T, ..., D] with D >= dim; the axes between T and D share the rotation.
        rotation: complex [B, T, dim / 2] or [1, T, dim / 2], from `rope_rotation`. It gets no gradient.
        inverse: rotate back, by the conjugate.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        A new tensor with the shape and dtype of `x`.

    Raises:
        ValueError: `rotation` does not fit `x`.

    Source: arXiv 2104.09864; V4 2.3, partial RoPE.
    """
    _check_rotation(x, rotation)
    return implementation("norm_rope", backend, x).rope(x, rotation, inverse=inverse)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, rotation: Tensor, *, backend: str | None = None) -> Tensor:
    """`rope(rms_norm(x, weight, eps), rotation)`: what queries, keys and entries go through, one after the other.

    Eager is that composition, rounding in between as the release does; Triton reads `x` once and rounds once.

    Args:
        x: [B, T, ..., D], as for `rope`.
        weight: [D], or None for the plain norm.
        eps: added to the mean square.
        rotation: complex [B, T, dim / 2] or [1, T, dim / 2], from `rope_rotation`. It gets no gradient.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        A new tensor with the shape and dtype of `x`.

    Raises:
        ValueError: as `rms_norm` and `rope`.

    Source: V4 2.3 (queries without a weight, keys and entries with one); its released code.
    """
    _check_norm(x, weight, eps)
    _check_rotation(x, rotation)
    return implementation("norm_rope", backend, x).norm_rope(x, weight, eps, rotation)


def _check_norm(x: Tensor, weight: Tensor | None, eps: float) -> None:
    if x.ndim < 1 or not x.is_floating_point() or x.shape[-1] == 0:
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, allowed is a float tensor [..., d] with d >= 1")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: shape {list(weight.shape)}, allowed is {list(x.shape[-1:])} or None")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must not be negative")


def _check_rotation(x: Tensor, rotation: Tensor) -> None:
    if x.ndim < 3 or not x.is_floating_point():
        raise ValueError(f"x: got {x.dtype} {list(x.shape)}, allowed is a float tensor [B, T, ..., D]")
    fits = rotation.ndim == 3 and rotation.is_complex() and 2 * rotation.shape[2] <= x.shape[-1]
    if not fits or rotation.shape[1] != x.shape[1] or rotation.shape[0] not in (1, x.shape[0]):
        allowed = f"complex [{x.shape[0]} or 1, {x.shape[1]}, at most {x.shape[-1] // 2}]"
        raise ValueError(f"rotation: got {rotation.dtype} {list(rotation.shape)}, allowed is {allowed}")
