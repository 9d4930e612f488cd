"""RMSNorm and RoPE of one token in numpy.

Axes: h heads · d channels.
"""

import math

import numpy as np


def rms_norm_step(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`weight x / sqrt(mean(x^2) + eps)`, x [d]."""
    y = x * (1 / math.sqrt(x.dot(x) / len(x) + eps))
    y *= weight
    return y


def head_norm_step(x: np.ndarray, eps: float) -> np.ndarray:
    """`x / sqrt(mean(x^2) + eps)` for each head, x [h, d]."""
    r = np.einsum("hd,hd->h", x, x)
    r /= x.shape[1]
    r += eps
    return x / np.sqrt(r, r)[:, None]


def rope_rotation_step(position: int, frequencies: np.ndarray) -> np.ndarray:
    """`e^{i t f}`, complex [dim / 2]; the angle is taken in the frequencies' float32."""
    angle = frequencies * frequencies.dtype.type(position)
    rotation = np.empty(len(angle), np.result_type(angle, np.complex64))
    np.cos(angle, rotation.real)
    np.sin(angle, rotation.imag)
    return rotation


def rope_step(x: np.ndarray, rotation: np.ndarray) -> None:
    """Turns the last channels of x [..., d] in place by rotation, complex [dim / 2]; its conjugate turns back."""
    pairs = x[..., x.shape[-1] - 2 * len(rotation) :].view(rotation.dtype)
    pairs *= rotation
