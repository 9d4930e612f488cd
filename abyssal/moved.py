"""Names that inner modules had before 0.2: importing one gives the module where it lies now, and warns.

Only `abyssal.model`, `abyssal.kernels`, `abyssal.train` and the command line are promised to stay.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TRAIN = {
    "data": "corpus mapped planted source tokenizers",
    "run": "accumulate checkpoint diagnose loop metrics observe progress provenance schedule stability step tables",
    "evaluate": "constrained needle speculation",
    "measure": "bench cost long_context profile roofline",
    "talk": "serve terminal voice",
}
MOVED = {
    "abyssal.model.chat": "abyssal.model.text.chat",
    "abyssal.model.constrain": "abyssal.model.text.constrain",
    "abyssal.model.counts": "abyssal.model.losses",
    "abyssal.model.documents": "abyssal.model.layout",
    "abyssal.model.exact": "abyssal.model.norm",
    "abyssal.model.prefill": "abyssal.model.generation.prefill",
    "abyssal.model.rounding": "abyssal.model.quantization",
    "abyssal.model.sampling": "abyssal.model.generation.sampling",
    "abyssal.model.speculative": "abyssal.model.generation.speculative",
    "abyssal.train.bench.compressor": "abyssal.train.measure.bench.pool",
    "abyssal.train.bench.indexer": "abyssal.train.measure.bench.index_topk",
    "abyssal.train.bench.loss": "abyssal.train.measure.bench.cross_entropy",
    "abyssal.train.bench.moe": "abyssal.train.measure.bench.moe_experts",
    "abyssal.train.chatting": "abyssal.train.talk.dialogue",
    "abyssal.train.tensorboard": "abyssal.train.run.loggers",
    "abyssal.train.roofline.moe": "abyssal.train.measure.roofline.moe_experts",
    "abyssal.train.trigram": "abyssal.train.data.kneser_ney",
    **{
        f"abyssal.train.{name}": f"abyssal.train.{room}.{name}"
        for room, names in _TRAIN.items()
        for name in names.split()
    },
}


class _Finder(MetaPathFinder, Loader):
    """Asked first: a folder that an earlier version left behind, caches and all, would pass for a package."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if _now(name) else None

    def exec_module(self, module: ModuleType) -> None:
        name, now = module.__name__, _now(module.__name__)
        assert now is not None
        warnings.warn(f"{name} is now {now}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(now)


def _now(name: str) -> str | None:
    """Where a module of this name lies now, None if it never moved or is no more."""
    old = name if name in MOVED else ".".join(name.split(".")[:3])
    now = MOVED[old] + name[len(old) :] if old in MOVED else None
    return now if now and find_spec(now) else None


def install() -> None:
    sys.meta_path.insert(0, _Finder())
