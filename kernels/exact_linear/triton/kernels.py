"""What splits float32 numbers into three of bfloat16.

    a = a1 + a2 + a3        a1 = bf16(a), a2 = bf16(a - a1), a3 = bf16(a - a1 - a2)

r rows · c columns
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.3895313892515355e38)  # of bfloat16; a number above it does not become infinite


@triton.jit(do_not_specialize=["rows"])
def split(x, parts, rows, columns: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of x [r, c]: a1, a2, a1, a3 one below the other [4, r, c], or, BESIDE, a1, a1, a2, a3 [r, 4, c].

    The last three are all of a number. The first three of one order by those of the other, a1 a2 a1 by b1 b1 b2, are
    what counts of a product. An infinity is a1 alone; below 1e-32 the last parts are too small for bfloat16.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows.to(tl.int64) * columns
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    first = tl.where(tl.abs(a) < float("inf"), tl.minimum(tl.maximum(a, -LARGEST), LARGEST), a).to(tl.bfloat16)
    left = a - first.to(tl.float32)
    left = tl.where(tl.abs(left) < float("inf"), left, 0.0)
    second = left.to(tl.bfloat16)
    third = (left - second.to(tl.float32)).to(tl.bfloat16)
    to = parts + (at + at // columns * 3 * columns if BESIDE else at)
    step = columns if BESIDE else rows.to(tl.int64) * columns
    tl.store(to, first, mask=inside)
    tl.store(to + (2 * step if BESIDE else step), second, mask=inside)
    tl.store(to + (step if BESIDE else 2 * step), first, mask=inside)
    tl.store(to + 3 * step, third, mask=inside)
