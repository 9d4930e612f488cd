"""The kernels of cross-entropy: a row of logits becomes its loss and, in place, its gradient; what counts, and its sum.

n tokens · c tokens of a chunk · d width · v vocabulary
"""

import triton
import triton.language as tl


@triton.jit
def loss_rows(
    logits, targets, losses, grads, v, grad_stride, ignore, z_loss, GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """loss = lse - l[target] + z lse^2 and, in the place of the logits, (1 + 2 z lse) softmax(l) - onehot(target).

    A row to a program. A target to ignore gives zeros, one outside the vocabulary NaN.
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits, grads = logits + row * v, grads + row * grad_stride
    target = tl.load(targets + row)
    if target == ignore:
        tl.store(losses + row, 0.0)
        if GRAD:
            for start in range(0, v, BLOCK):
                tl.store(grads + start + lane, tl.zeros((BLOCK,), tl.float32), mask=start + lane < v)
        return
    known = (target >= 0) & (target < v)
    picked = tl.load(logits + target, mask=known, other=float("nan"))
    top, mass = float("-inf"), 0.0
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < v, other=float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), axis=0)
        top = higher
    norm = top + tl.log(mass)
    tl.store(losses + row, tl.log(mass) - (picked - top) + z_loss * norm * norm)
    if GRAD:
        scale = tl.where(known, (1 + 2 * z_loss * norm) / mass, float("nan"))
        for start in range(0, v, BLOCK):
            at = start + lane
            x = tl.load(logits + at, mask=at < v, other=0.0)
            tl.debug_barrier()  # every thread has read its logits before any writes a gradient over them
            tl.store(grads + at, tl.exp(x - top) * scale - tl.where(at == target, 1.0, 0.0), mask=at < v)


@triton.jit
def counted_rows(x, targets, out, d, ignore, COLUMNS: tl.constexpr):
    """out [c, d] = x, zero in the rows whose target is to ignore."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    counts = tl.load(targets + row) != ignore
    values = tl.load(x + row * d + column, mask=counts & (column < d), other=0.0)
    tl.store(out + row * d + column, values, mask=column < d)


@triton.jit(do_not_specialize=["n"])
def sum_losses(losses, targets, loss, share, n, ignore, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """share = 1 / max(number of targets that count, 1), or 1 without MEAN; loss = share sum(losses), added in fp64."""
    lane = tl.arange(0, BLOCK)
    total, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + lane
        total += tl.load(losses + at, mask=at < n, other=0.0).to(tl.float64)
        counts += (tl.load(targets + at, mask=at < n, other=ignore) != ignore).to(tl.int32)
    part = 1 / tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float32) if MEAN else 1.0
    tl.store(share, part)
    tl.store(loss, tl.sum(total, axis=0) * part)
