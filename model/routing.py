"""Which experts a pass chose, kept, and a later pass made with them: only indices are of the past, weights are not.

    chosen = recorded        w = scale s[chosen] / sum s[chosen]        s from the parameters as they are now

Two uses: anticipatory routing (V4 4.2.3: the indices of step t are those of the parameters of step t - d) and
keep-routing in reinforcement learning (V3.2: the update sees the experts that the rollout saw). Hash-routed layers
record and replay like the others; theirs is the same choice again.

n tokens of a pass, flattened · k experts per token
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from .moe import Gate

if TYPE_CHECKING:
    from .transformer import Transformer

Routes = dict[int, list[Tensor]]  # layer -> int64 [n, k] of each pass, in order; the MTP block is layer L


@contextmanager
def record_routing(model: "Transformer") -> Iterator[Routes]:
    """Collects the experts that each layer chooses in the passes within; decoding takes the torch path meanwhile."""
    routes: Routes = {}
    hooks = []
    for layer, gate in _gates(model).items():
        passes = routes.setdefault(layer, [])
        hooks.append(gate.register_forward_hook(lambda _, __, routing, passes=passes: passes.append(routing.experts)))
    try:
        yield routes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replay_routing(model: "Transformer", experts: Mapping[int, Tensor]) -> Iterator[None]:
    """Every pass within takes `experts[layer]`, int64 [n, k], in the layers that are named; others choose.

    The backward pass of a model that recomputes layers belongs within, too.

    Raises:
        ValueError: a layer that the model does not have; in the pass, experts of another shape.
        IndexError: in the pass, an expert that does not exist.
    """
    gates = _gates(model)
    for layer in experts:
        if layer not in gates:
            raise ValueError(f"experts names layer {layer}: allowed are {min(gates)} to {max(gates)}")
    before = {layer: gates[layer].replayed for layer in experts}
    try:
        for layer, chosen in experts.items():
            gates[layer].replayed = chosen
        yield
    finally:
        for layer, chosen in before.items():
            gates[layer].replayed = chosen


def _gates(model: "Transformer") -> dict[int, Gate]:
    return {layer: block.ffn.gate for layer, block in enumerate((*model.layers, *model.mtp))}
