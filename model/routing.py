"""Which experts and entries a pass chose, kept, and a later pass made with them: only indices are of the past.

    experts = recorded       w = scale s[experts] / sum s[experts]       s from the parameters as they are
    picks = recorded         attention over kv[picks]                    kv from the parameters as they are

Two uses: anticipatory routing (V4 4.2.3: the experts of step t are those of the parameters of step t - d) and
reinforcement learning (V3.2 keeps the experts that the rollout saw; we keep the entries that its indexer picked, too).
Hash-routed layers record and replay like the others; theirs is the same choice again. Decoding takes the torch path
meanwhile.

b batch · t tokens of a pass · n = b t · k experts per token, or picks
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .kinds import SPARSE
from .moe import Gate

if TYPE_CHECKING:
    from .attention import Attention
    from .transformer import Transformer

Routes = dict[int, list[Tensor]]  # layer -> int64 [n, k] of each pass, in order; the MTP block is layer L
Picks = dict[int, list[Tensor]]  # CSA layer -> int64 [b, t, k] of each pass, in order; -1 = none


@contextmanager
def record_routing(model: "Transformer") -> Iterator[Routes]:
    """Collects the experts that each layer chooses in the passes within."""
    routes: Routes = {}
    with ExitStack() as undo:
        for layer, gate in _gates(model).items():
            passes = routes.setdefault(layer, [])
            note = gate.register_forward_hook(lambda _, __, routing, passes=passes: passes.append(routing.experts))
            undo.callback(note.remove)
        yield routes


@contextmanager
def record_picks(model: "Transformer") -> Iterator[Picks]:
    """Collects the entries that each CSA layer reads in the passes within; in one that is not sparse, none."""
    layers = _sparse(model)
    picks: Picks = {layer: [] for layer in layers}
    with _having(layers, "recorded", picks, "picks"):
        yield picks


@contextmanager
def replay_routing(model: "Transformer", experts: Mapping[int, Tensor]) -> Iterator[None]:
    """Every pass within takes `experts[layer]`, int64 [n, k], in the layers that are named; others choose.

    The backward pass of a model that recomputes layers belongs within, too.

    Raises:
        ValueError: a layer that the model does not have; in the pass, experts of another shape.
        IndexError: in the pass, an expert that does not exist.
    """
    with _having(_gates(model), "replayed", experts, "experts"):
        yield


@contextmanager
def replay_picks(model: "Transformer", picks: Mapping[int, Tensor]) -> Iterator[None]:
    """Every pass within reads `picks[layer]`, int64 [b, t, k] and -1 = none, in the layers that are named.

    They are entries that the query may see, which is trusted; any k. Otherwise as `replay_routing`.

    Raises:
        ValueError: a layer that is no CSA layer of the model; in the pass, picks of another shape.
    """
    with _having(_sparse(model), "replayed", picks, "picks"):
        yield


@contextmanager
def _having(modules: Mapping[int, Any], name: str, values: Mapping[int, Any], said: str) -> Iterator[None]:
    """The attribute `name` of the modules of some layers is another one within; `said`: what the caller calls it."""
    for layer in values:
        if layer not in modules:
            raise ValueError(f"{said} names layer {layer}: allowed are {', '.join(map(str, modules)) or 'none'}")
    before = {layer: getattr(modules[layer], name) for layer in values}
    try:
        for layer, value in values.items():
            setattr(modules[layer], name, value)
        yield
    finally:
        for layer, value in before.items():
            setattr(modules[layer], name, value)


def _gates(model: "Transformer") -> dict[int, Gate]:
    return {layer: block.ffn.gate for layer, block in enumerate((*model.layers, *model.mtp))}


def _sparse(model: "Transformer") -> dict[int, "Attention"]:
    return {layer: block.attn for layer, block in enumerate(model.layers) if block.attn.kind == SPARSE}
