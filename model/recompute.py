"""Groups of layers that are worked out again in the backward pass instead of being remembered (mHC, 2512.24880 4.3.2).

Kept are the streams at each group's first layer; one group at a time is then run again for its gradients. With L layers
in groups of g, n d numbers per token for the streams and a for all that one layer remembers, a token takes

    n d ceil(L / g) + a g        numbers, the fewest at  g = sqrt(n d L / a)

The paper, which runs the hyper-connections again but not the sublayers, has a = (n + 2) d: g = sqrt(n L / (n + 2)).
Results and gradients have the same bits; one more forward pass is the price. Side effects happen once: a router counts
its load in the first run only.

b batch · t tokens · n streams · d width
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .block import Block


def recomputed(blocks: Iterable[Block], run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`run(*arguments, **options)`, which calls `blocks`; again in the backward pass, if there is one.

    Raises:
        RuntimeError: in one compiled graph; where torch.compile may break it, Python goes on here.
    """
    if not torch.is_grad_enabled():
        return run(*arguments, **options)
    if torch.compiler.is_compiling():
        raise RuntimeError("recompute: one graph cannot work layers out again; compile without fullgraph, or set 0")

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _without_counting(blocks)

    return checkpoint(run, *arguments, use_reentrant=False, context_fn=contexts, **options)


@contextmanager
def _without_counting(blocks: Iterable[Block]) -> Iterator[None]:
    gates = [block.ffn.gate for block in blocks]
    counts = [gate.counts for gate in gates]
    try:
        yield
    finally:
        for gate, count in zip(gates, counts):
            gate.counts = count
