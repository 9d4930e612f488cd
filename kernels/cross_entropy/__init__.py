"""Linear layer and softmax cross-entropy in one op, chunk by chunk: the logits of all tokens never exist at once.

    l_n = W x_n,   loss_n = logsumexp(l_n) - l_n[target_n] + z logsumexp(l_n)^2
    dl_n = (1 + 2 z logsumexp(l_n)) softmax(l_n) - onehot(target_n)

With a vocabulary of 129,280 the logits of 4,096 tokens would be 2.1 GB in fp32, and their gradient as much again.

n tokens · v vocabulary · d width · c tokens of a chunk
"""

import torch
from torch import Tensor

from ..backend import implementation

__all__ = ["cross_entropy"]

REDUCTIONS = ("mean", "sum")


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean (or sum) over the valid targets of `logsumexp(W x) - (W x)[target] + z_loss logsumexp(W x)^2`.

    Logits are fp32 (fp64 for fp64 inputs), also under autocast, and so is the sum of the weight's gradient over tokens.
    The gradients of x and weight are made in the forward pass, from the logits of each chunk, and scaled in the
    backward pass. Tokens whose target is `ignore_index` are left out: whatever they hold, their gradient is zero.
    Without a valid target the loss is 0. In Triton, x and weight of one half precision are multiplied on tensor cores,
    with fp32 sums and the logits' gradient rounded to that precision; others are multiplied in fp32, as
    `torch.set_float32_matmul_precision` has it. (V4's head: B.1.4.)

    Args:
        x: `[n, d]`.
        weight: `[v, d]`, the language model head.
        targets: int64 `[n]`.
        ignore_index: the target that marks a token to leave out.
        z_loss: coefficient of the squared log-normaliser (0 in V4).
        reduction: "mean" over the valid targets, or "sum".
        chunk: tokens whose logits exist at once; None chooses by the vocabulary and the device.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a shape or dtype does not fit, or an option is not one of those allowed.
        IndexError: a target is neither `ignore_index` nor in `0..v-1` (checked for CPU tensors; in Triton, where
            looking would wait for the device, such a target makes the loss NaN).
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [tokens, d] and [vocabulary, d]"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}: expected torch.int64 [{x.shape[0]}]")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: allowed are {', '.join(REDUCTIONS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1, or None")
    _check_targets(targets, weight.shape[0], ignore_index)
    run = implementation("cross_entropy", backend, weight if weight.dtype == torch.float64 else x).cross_entropy
    return run(x, weight, targets, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction, chunk=chunk)


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Not on CUDA, where looking would wait for the device, nor in compiled code."""
    if targets.is_cuda or torch.compiler.is_compiling():
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if outside.any():
        bad = int(targets[outside][0])
        raise IndexError(f"targets contains {bad}: allowed are 0..{vocabulary - 1} and ignore_index={ignore_index}")
