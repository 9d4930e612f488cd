"""The compressor's pooling: every window of m tokens becomes one entry, by a softmax over its tokens in each channel.

    c_i = sum_s softmax_s(z_s) k_s        z = gate + bias, taken separately in each channel

With overlap an entry pools 2 m slots: its own window and the one before. Each token then has twice the channels: the
first half is what it gives to the next entry, the second half what it gives to its own.

Axes: b batch · t tokens · p entries · m ratio · s slots (m, or 2 m with overlap) · D channels of an entry.
"""

import torch
from torch import Tensor

from ..backend import implementation


def pool(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    ratio: int,
    overlap: bool,
    first: Tensor | None = None,
    follows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One entry for each complete window of `ratio` tokens, `c_i = sum_s softmax_s(gate_s + bias_s) kv_s`, in float32.

    The slots of an entry are its own tokens, in channels D to 2D; with overlap also the `ratio` tokens before them, in
    channels 0 to D. `bias` is indexed by the place in the window. Slots of a missing previous window have no weight.

    Args:
        kv: the values, [B, T, c D] with c = 2 with overlap and 1 without (whose channels are 0 to D).
        gate: the logits, shaped like `kv`.
        bias: added to the logits only, [ratio, c D].
        ratio: tokens per window, m.
        overlap: whether an entry also pools the window before its own.
        first: row of the first token of each entry's window, int64 [B, P]; -1 means no entry: zeros that pass no
            gradient. None means one sequence from row 0 on: windows at 0, m, 2 m, ... and P = T // m.
        follows: bool [B, P], true where the m rows before `first` are the previous window of the same document.
            Needed where both `first` and `overlap` are given.
        backend: `auto`, `reference`, `eager` or `triton`.

    Returns:
        [B, P, D] in the dtype of `kv`.

    Raises:
        ValueError: a shape or dtype does not fit, or `first` and `follows` do not go together.
        IndexError: on a CPU, a window leaves the rows of `kv` (not looked at while compiling).

    Source: V4 eqs. 9-12 and 20-23; the released code's `Compressor`.
    """
    _check_shapes(kv, gate, bias, ratio, overlap)
    if first is not None:
        _check_windows(first, follows, kv, ratio, overlap)
    elif follows is not None:
        raise ValueError("follows: given without first, allowed is both or none")
    module = implementation("pool", backend, kv)
    return module.pool(kv, gate, bias, ratio=ratio, overlap=overlap, first=first, follows=follows)


def _check_shapes(kv: Tensor, gate: Tensor, bias: Tensor, ratio: int, overlap: bool) -> None:
    if ratio < 1:
        raise ValueError(f"ratio={ratio}: must be at least 1")
    halves = 2 if overlap else 1
    if kv.ndim != 3 or not kv.is_floating_point() or kv.shape[2] == 0 or kv.shape[2] % halves:
        channels = "an even number of channels" if overlap else "channels"
        raise ValueError(f"kv: got {kv.dtype} {list(kv.shape)}, allowed is a float tensor [B, T, C] with {channels}")
    if gate.shape != kv.shape:
        raise ValueError(f"gate: shape {list(gate.shape)}, allowed is that of kv, {list(kv.shape)}")
    if bias.shape != (ratio, kv.shape[2]):
        raise ValueError(f"bias: shape {list(bias.shape)}, allowed is [ratio, C] = {[ratio, kv.shape[2]]}")


def _check_windows(first: Tensor, follows: Tensor | None, kv: Tensor, ratio: int, overlap: bool) -> None:
    if first.dtype != torch.int64 or first.ndim != 2 or len(first) != len(kv):
        raise ValueError(f"first: got {first.dtype} {list(first.shape)}, allowed is int64 [{len(kv)}, P]")
    if overlap and follows is None:
        raise ValueError("follows: None, but windows given by first need it where overlap is on")
    if follows is not None and (follows.dtype != torch.bool or follows.shape != first.shape):
        raise ValueError(f"follows: got {follows.dtype} {list(follows.shape)}, allowed is bool {list(first.shape)}")
    if first.device.type != "cpu" or first.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in first.aminmax())
    if low < -1 or (high >= 0 and high + ratio > kv.shape[1]):
        raise IndexError(f"first: from {low} to {high}, allowed is -1 to {kv.shape[1] - ratio} ({kv.shape[1]} rows)")
    if overlap and follows is not None and bool((follows & (first >= 0) & (first < ratio)).any()):
        raise IndexError(f"follows: true where first < {ratio}, before which there is no whole window")
