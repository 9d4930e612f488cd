"""The mechanisms of the model: what a step's time and memory are divided into.

A module or function stands for a mechanism with everything that it calls, but for those in `observe.OPEN`, whose parts
count for themselves. "projections" are attention's linear maps with their norms and rotations, alike in all layers; the
three attentions are what lies between: scores, softmax and sum. "MTP" is the whole block of the MTP module with its
loss.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ....model import attention as attention_module
from ....model import decode
from ....model import transformer as transformer_module
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
    return {"embed": "embedding", "head": "loss and head", "mtp": MTP}.get(path) or _MODULES.get(type(module))


@contextmanager
def attached(model: Transformer, observer: Observer) -> Iterator[None]:
    """Tells the observer, from modules' hooks and replaced functions, what is at work; all is put back at the end."""
    kind = ""

    def enters_attention(module: Attention, _: Any) -> None:
        nonlocal kind
        kind = ATTENTIONS[module.kind]

    with ExitStack() as undo:
        observer.attach(lambda: owners(model))
        undo.callback(observer.detach)
        for path, module in model.named_modules():
            mechanism = _mechanism(model, path) if path else None
            if mechanism and not isinstance(module, nn.ModuleList):
                undo.callback(module.register_forward_pre_hook(_entering(observer, mechanism)).remove)
                undo.callback(module.register_forward_hook(_leaving(observer), always_call=True).remove)
            if isinstance(module, Attention):
                undo.callback(module.register_forward_pre_hook(enters_attention).remove)
            if isinstance(module, HyperConnection):
                _replace(undo, module, "recombine", observer, "mHC")
        _replace(undo, model, "_mtp_loss", observer, MTP)
        _replace(undo, model, "_cross_entropy", observer, "loss and head")
        _replace(undo, attention_module, "attention", observer, lambda: kind)
        _replace(undo, attention_module, "index_topk", observer, "indexer")
        _replace(undo, attention_module, "index_loss", observer, "index loss")
        _replace(undo, transformer_module, "exact_linear", observer, "loss and head")
        yield


@contextmanager
def attached_to_numpy(observer: Observer) -> Iterator[None]:
    """The same for `model.decode`, which runs one token in numpy and calls no module."""
    kind = ""

    def which_attention(step: Any, *_: Any) -> None:
        nonlocal kind
        kind = "HCA attention" if step.compressor else "sliding attention"
        kind = "CSA attention" if step.indexer else kind

    with ExitStack() as undo:
        observer.attach(dict)
        undo.callback(observer.detach)
        _replace(undo, decode.CompressorStep, "__call__", observer, "compressor")
        _replace(undo, decode.IndexerStep, "__call__", observer, "indexer")
        _replace(undo, decode.AttentionStep, "__call__", observer, "projections", first=which_attention)
        _replace(undo, decode.MoEStep, "__call__", observer, "router")
        _replace(undo, decode, "attention_step", observer, lambda: kind)
        _replace(undo, decode, "moe_experts_step", observer, "experts", then="shared expert")
        _replace(undo, decode, "rms_norm_step", observer, "norms", only_in=REST)
        _replace(undo, decode, "memory", observer, "Engram")
        for name in ("hyper_step", "hyper_recombine_step", "hyper_head_step"):
            _replace(undo, decode, name, observer, "mHC")
        _replace(undo, transformer_module, "exact_linear", observer, "loss and head")
        yield


def _entering(observer: Observer, mechanism: str) -> Callable[..., None]:
    return lambda *_: observer.enter(mechanism)


def _leaving(observer: Observer) -> Callable[..., None]:
    return lambda *_: observer.leave()


def _replace(
    undo: ExitStack,
    holder: Any,
    name: str,
    observer: Observer,
    mechanism: str | Callable[[], str],
    *,
    first: Callable[..., None] | None = None,
    then: str = "",
    only_in: str = "",
) -> None:
    """The function `name` of a module, class or object, counted for a mechanism until `undo` is closed.

    first: called with its arguments before; then: what the caller goes on with afterwards; only_in: within any other
    mechanism it belongs to that one.
    """
    function, own = getattr(holder, name), name in vars(holder)

    def counted(*args: Any, **options: Any) -> Any:
        if only_in and observer.current != only_in:
            return function(*args, **options)
        if first:
            first(*args)
        observer.enter(mechanism if isinstance(mechanism, str) else mechanism())
        try:
            return function(*args, **options)
        finally:
            observer.leave(then)

    setattr(holder, name, counted)
    undo.callback(setattr, holder, name, function) if own else undo.callback(delattr, holder, name)
