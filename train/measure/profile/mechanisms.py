"""The mechanisms of the model: what a step's time and memory are divided into.

A module or op stands for a mechanism with everything that it calls, but for those in `observe.OPEN`, whose parts
count for themselves. "projections" are attention's linear maps with their norms and rotations, alike in all layers; the
three attentions are what lies between: scores, softmax and sum. "MTP" is the whole block of the MTP module with its
loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ....model import mtp
from ....model.attention import Attention
from ....model.block import Block
from ....model.compressor import Compressor
from ....model.engram import Engram
from ....model.hyper import HyperConnection, HyperHead
from ....model.indexer import Indexer
from ....model.kinds import HEAVY, SLIDING, SPARSE
from ....model.moe import Experts, Gate, MoE, SharedExpert
from ....model.norm import RMSNorm
from ....model.transformer import Transformer
from ..follow import following
from .observe import MTP, OPEN, OPTIMIZER, REST, Observer

ATTENTIONS = {SLIDING: "sliding attention", SPARSE: "CSA attention", HEAVY: "HCA attention"}
MECHANISMS = (
    *("embedding", "Engram", "mHC", "norms", "projections", *ATTENTIONS.values(), "compressor", "indexer"),
    *("index loss", "router", "experts", "shared expert", "loss and head", MTP, OPTIMIZER, REST),
)

_MODULES: dict[type, str] = {
    Attention: "projections",
    Compressor: "compressor",
    Engram: "Engram",
    Experts: "experts",
    Gate: "router",
    HyperConnection: "mHC",
    HyperHead: "mHC",
    Indexer: "indexer",
    MoE: "router",
    SharedExpert: "shared expert",
    mtp.MTP: MTP,
}
_OPS = {
    "cross_entropy": "loss and head",
    "hyper_recombine": "mHC",
    "index_loss": "index loss",
    "index_topk": "indexer",
}


def owners(model: Transformer) -> dict[Tensor, str]:
    """The mechanism of every parameter."""
    found: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        place, path = REST, ""
        for word in name.split(".")[:-1]:
            path = f"{path}.{word}" if path else word
            inner = _mechanism(model, path)
            place = inner if inner and place in OPEN else place
        found[parameter] = place
    return found


def _mechanism(model: Transformer, path: str) -> str | None:
    """What the module at a path stands for by itself, if it does."""
    module, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if isinstance(module, RMSNorm) and isinstance(parent, Block | Transformer):
        return "norms"
    return {"embed": "embedding", "head": "loss and head"}.get(path) or _MODULES.get(type(module))


class Scopes:
    """Tells an observer the mechanisms of what begins and ends."""

    def __init__(self, model: Transformer, observer: Observer) -> None:
        found = ((module, _mechanism(model, path)) for path, module in model.named_modules() if path)
        self.modules = {module: mechanism for module, mechanism in found if mechanism}
        self.mechanisms: dict[Any, str] = {**_OPS, **self.modules}
        self.observer = observer

    def begins(self, what: Any) -> None:
        if isinstance(what, Attention):
            self.mechanisms["attention"] = ATTENTIONS[what.kind]
        if what in self.mechanisms:
            self.observer.enter(self.mechanisms[what])

    def ends(self, what: Any) -> None:
        if what in self.mechanisms:
            self.observer.leave()


@contextmanager
def attached(model: Transformer, observer: Observer, in_numpy: bool = False) -> Iterator[None]:
    """Tells the observer what is at work; `in_numpy` leaves alone the modules, which must have no hooks then."""
    scopes = Scopes(model, observer)
    observer.attach(lambda: owners(model))
    try:
        with following(scopes, () if in_numpy else scopes.modules):
            yield
    finally:
        observer.detach()
