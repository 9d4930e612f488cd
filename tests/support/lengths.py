"""How many kernels an op compiles over all lengths of a text: `python tests/support/lengths.py [OP ...]` as JSON.

Every op runs forward and backward on meta tensors (counting.py) at each of LENGTHS, at the widths of `small`, in half
precision, with the options that a training step takes. Nothing is compiled.

t tokens · d width · h heads
"""

import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LENGTHS = sorted(
    {*range(1, 66), *range(66, 301, 7)}
    | {n + i for n in (2**k for k in range(8, 18)) for i in (-1, 0, 1)}
    | {16 * n + i for n in (1, 3, 31, 67, 125, 517, 4095, 8191) for i in (-1, 0, 1)}
)
half, whole, ids = torch.bfloat16, torch.float32, torch.int64


def leaf(*shape: int, dtype: torch.dtype = half) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def learn(*outputs: Tensor) -> None:
    """All of the backward pass."""
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def attention(t: int) -> None:
    """A pass over the text, and what reads it: a token, a few drafts, a token of a cache that has room for more."""
    from abyssal.kernels import attention

    for new in sorted({1, 3, t}):
        past, options = (min(t, 127), {"window": 128, "scale": 0.1, "window_start": leaf(2, new, dtype=ids)})
        rows, bound = max(past, new), leaf(1, new, dtype=ids)
        for ratio, k in ((0, 0), (4, 512), (128, 0)):
            entries = leaf(2, t // ratio + 7, 128)[:, : t // ratio] if ratio else None
            picks = leaf(2, new, min(k, t // ratio), dtype=ids) if k else None
            range = {"start": bound, "end": bound} if ratio else {}
            for index in (None, picks):
                out, _ = attention(
                    leaf(2, new, 8, 128),
                    leaf(2, rows, 128),
                    entries,
                    leaf(8, dtype=whole),
                    index=index,
                    **range,
                    **options,
                )
                if new == t:
                    learn(out)


def index_topk(t: int) -> None:
    from abyssal.kernels import index_topk

    for new in {1, 3, t}:
        bound, entries = leaf(1, new, dtype=ids), leaf(2, t // 4 + 7, 64)[:, : t // 4]
        index_topk(leaf(2, new, 8, 64), leaf(2, new, 8), entries, k=512, start=bound, end=bound)


def index_loss(t: int) -> None:
    from abyssal.kernels import index_loss

    p, bound = t // 4, leaf(1, t, dtype=ids)
    student = leaf(2, t, 8, 64), leaf(2, t, 8), leaf(2, p, 64)
    teacher = leaf(2, t, 8, 128), leaf(2, p, 128), leaf(2, t, 8, dtype=whole)
    for index in (None, leaf(2, t, min(512, p), dtype=ids)) if p else ():
        learn(index_loss(*student, *teacher, scale=0.1, start=bound, end=bound, index=index)[0])


def cross_entropy(t: int) -> None:
    from abyssal.kernels import cross_entropy

    learn(cross_entropy(leaf(t, 512), leaf(260, 512), leaf(t, dtype=ids)))


def engram(t: int) -> None:
    from abyssal.kernels import engram_gate, engram_gather, engram_hash

    start, integers = leaf(2, t, dtype=ids), (leaf(3, dtype=ids), leaf(2, 3, dtype=ids), leaf(6, dtype=ids))
    rows = engram_hash(start, *integers, pad=2, start=start, history=leaf(2, 2, dtype=ids))
    engram_hash(start, *integers, pad=2)
    learn(engram_gather(leaf(999, 32), rows))
    both = leaf(2, t, 5, 512)
    learn(engram_gate(leaf(2, t, 4, 512), both[:, :, :4], both[:, :, 4], leaf(4, 512), leaf(4, 512), eps=1e-6))


def hyper(t: int) -> None:
    from abyssal.kernels import hyper_branch, hyper_collapse, hyper_head_weights, hyper_recombine

    streams, fn = leaf(1, t, 4, 512), leaf(24, 2048, dtype=whole)
    u, found, passing = hyper_branch(streams, fn, leaf(24, dtype=whole), leaf(3, dtype=whole))
    learn(hyper_recombine(u, passing, found.post, found.comb))
    head = hyper_head_weights(streams, fn[:4].detach().requires_grad_(), leaf(4, dtype=whole), leaf(1, dtype=whole))
    learn(hyper_collapse(streams, head))


def moe_experts(t: int) -> None:
    from abyssal.kernels import moe_experts, swiglu

    x, chosen, weights = leaf(t, 512), leaf(t, 4, dtype=ids), leaf(t, 4, dtype=whole)
    shared = swiglu(leaf(t, 2 * 512), 10.0)
    learn(moe_experts(x, chosen, weights, leaf(24, 320, 512), leaf(24, 512, 160), limit=10.0, shared=shared))


def moe_route(t: int) -> None:
    from abyssal.kernels import balance_loss, moe_permutation, moe_route

    scores, chosen, weights = moe_route(leaf(t, 24, dtype=whole), top_k=4, scale=1.5, bias=leaf(24, dtype=whole))
    learn(scores, weights)
    learn(moe_route(leaf(t, 24, dtype=whole), top_k=4, scale=1.5, experts=chosen).weights)
    for real in (None, torch.empty(t, dtype=torch.bool, device="meta")):
        moe_permutation(chosen, 24, real)
        learn(balance_loss(leaf(1, t, 24, dtype=whole), chosen[None], None if real is None else real[None]))


def exact_linear(t: int) -> None:
    from abyssal.kernels import exact_linear

    learn(exact_linear(leaf(t, 4096), leaf(1024, 4096, dtype=whole)))


def norm_rope(t: int) -> None:
    from abyssal.kernels import norm_rope, rms_norm, rope

    x, weight, rotation = leaf(1, t, 8, 128), leaf(128), torch.empty(1, t, 16, dtype=torch.complex64, device="meta")
    learn(rms_norm(x, weight, 1e-6), norm_rope(x, None, 1e-6, rotation), rope(x, rotation))
    learn(norm_rope(x[:, :, 0], weight, 1e-6, rotation), rope(x[:, :, 0], rotation, inverse=True))


def pool(t: int) -> None:
    from abyssal.kernels import pool

    for ratio, overlap in ((4, True), (128, False)):
        kv, gate, bias = leaf(2, t, 256), leaf(2, t, 256), leaf(ratio, 256, dtype=whole)
        entries = t // ratio
        first, follows = leaf(2, entries, dtype=ids), torch.empty(2, entries, dtype=torch.bool, device="meta")
        gathered = {"first": first, "follows": follows if overlap else None}
        for windows in ({}, gathered) if entries else ():
            learn(pool(kv, gate, bias, ratio=ratio, overlap=overlap, **windows))


def quant(t: int) -> None:
    from abyssal.kernels import dequantize, fake_quant, hadamard, quantize

    x = leaf(t, 128)
    for form, block in (("e4m3", 64), ("e2m1", 32)):
        learn(fake_quant(x, form, block=block))
        dequantize(*quantize(x, form, block=block), block=block)
    learn(hadamard(x))


OPS: dict[str, Callable[[int], None]] = {
    run.__name__: run
    for run in (
        attention,
        index_topk,
        index_loss,
        cross_entropy,
        engram,
        exact_linear,
        hyper,
        moe_experts,
        moe_route,
        norm_rope,
        pool,
        quant,
    )
}


def specialisations(op: str) -> Iterator[tuple[str, int]]:
    """Of each kernel, over all lengths."""
    from counting import gpu

    with gpu() as counted:
        for length in LENGTHS:
            OPS[op](length)
        yield from ((name, len(found)) for name, found in counted.kernels.items())


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    import counting  # noqa: F401

    print(json.dumps({op: dict(specialisations(op)) for op in sys.argv[1:] or OPS}))
