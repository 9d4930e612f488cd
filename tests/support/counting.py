"""What a GPU would be asked to do, counted without one: meta tensors stand for CUDA ones, and nothing is compiled.

    with gpu() as counted:
        with torch.device("meta"):
            model = Transformer(config)
        with torch.autocast("meta", torch.bfloat16):
            model(ids, targets=ids).loss.backward()
    counted.launches, counted.aten      kernels that would run, by name: Triton's and torch's
    counted.waits                       where the host would wait for the device, and for what
    counted.kernels                     specialisations that Triton would compile
    counted.places                      (kernel of torch's, line that asked for it), with gpu(places=True)
    counted.launched, counted.traffic   each launch and each kernel of torch's, with gpu(keep=True)

    python tests/support/counting.py train small 8 2048      a training step as JSON, twice (the second is warm)
    python tests/support/counting.py decode small 1 100 140  tokens behind a prompt; --places: and where from
    python tests/support/counting.py lineage v3.2 2 600      both of V3 or V3.2, two layers deep

TRITON_INTERPRET must be unset, as Triton decides at import. Autocast is imitated: what it casts to the half precision
is `LOW`, and a weight once per context, as the real one does.
"""

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakSet

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

LOW = {F.linear, torch.einsum, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm}
LOW |= {Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
MAKES = {torch.tensor, torch.as_tensor}
READS = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::equal"}
NO_KERNEL = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
NO_KERNEL |= {"_unsafe_view", "promote_types", "result_type", "resize_", "set_", "record_stream"}
FILLS = {"zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


@dataclass
class Counted:
    """By name; `clear` begins anew, but for the specialisations, which stay compiled."""

    launches: Counter[str] = field(default_factory=Counter)
    aten: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    grids: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    kernels: dict[str, set[str]] = field(default_factory=dict)
    places: Counter[tuple[str, str]] | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)  # of JITFunction._do_compile, for each of them
    launched: list["Launched"] | None = None
    traffic: list["Work"] | None = None  # of torch's kernels

    def clear(self) -> None:
        for counts in (self.launches, self.aten, self.ops, self.waits, self.grids, self.places or {}):
            counts.clear()
        for kept in (self.launched, self.traffic):
            if kept is not None:
                kept.clear()

    @property
    def specialisations(self) -> int:
        return sum(map(len, self.kernels.values()))

    def summary(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "triton": self.launches.total(),
            "aten": self.aten.total(),
            "waits": {f"{what}: {where}": n for (what, where), n in self.waits.most_common()},
            "specialisations": self.specialisations,
            "launches": dict(self.launches.most_common()),
            "kernels": dict(self.aten.most_common()),
            "ops": dict(self.ops.most_common()),
        } | ({} if self.places is None else {"places": [f"{n} {' '.join(x)}" for x, n in self.places.most_common(60)]})


class Launched(NamedTuple):
    """`call` is that of JITFunction._do_compile for its kernel."""

    name: str
    call: tuple[Any, ...]
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


@contextlib.contextmanager
def gpu(target: str = "sm_90", places: bool = False, keep: bool = False) -> Iterator[Counted]:
    """Counts what runs inside on meta tensors as if they were on a GPU of that architecture."""
    import triton
    from dryrun import gpu as driver
    from triton.runtime.jit import JITFunction

    from abyssal.kernels import backend

    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter's functions cannot be specialised"
    counted, autocast = Counted(places=Counter() if places else None), _Autocast()
    if keep:
        counted.launched, counted.traffic = [], []

    def compile(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        counted.kernels.setdefault(self.__name__, set()).add(str(key))
        counted.calls.append((self, key, signature, device, *rest))
        kernel = self.device_caches[device][0][key] = _Kernel(self.__name__, counted, counted.calls[-1])
        return kernel

    def choose(op: str, name: str, device: str, is_double: bool) -> str:
        return "triton" if name in ("auto", "triton") and not is_double and backend._has_triton(op) else "eager"

    with contextlib.ExitStack() as stack:
        stack.enter_context(driver(target))
        stack.enter_context(patch.object(JITFunction, "_do_compile", compile))
        stack.enter_context(patch.object(backend, "_choose", choose))
        stack.enter_context(_as_on_cuda(autocast))
        stack.enter_context(_Casts(autocast))
        stack.enter_context(_Counting(counted))
        assert triton.knobs.runtime.interpret is False
        yield counted


class _Kernel:
    """Stands for a compiled one."""

    function, packed_metadata, hash, metadata = 0, (), "", None

    def __init__(self, name: str, counted: Counted, call: tuple[Any, ...]) -> None:
        self.name, self.counted, self.call = name, counted, call

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *values: Any) -> None:
        self.counted.launches[self.name] += 1
        self.counted.grids.append((self.name, (x, y, z)))
        if self.counted.launched is not None:
            names = self.call[0].arg_names
            arguments = dict(zip(names, values[-len(names) :]))
            self.counted.launched.append(Launched(self.name, self.call, (x, y, z), arguments))


# what runs on the device ---------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    """Counts kernels and waits; an operator of ours runs its own host code."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        space, _, short = name.partition("::")
        if space == "abyssal":
            self.counted.ops[short] += 1
            with self:
                return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **kwargs)
        there = any(x.is_meta for x in tensors)
        if name == "aten::_local_scalar_dense" and there:
            self._waits("item")
            return 1.0 if args[0].dtype.is_floating_point else 0
        if name in READS and there:
            self._waits(short)
            if name == "aten::equal":
                return True
            out = args[0].new_zeros(1, *([args[0].ndim] if short == "nonzero" else []), dtype=torch.int64)
            return out if short in ("nonzero", "masked_select") else (out,) * 3
        if name == "aten::index" and there and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self._waits("boolean index")
            return args[0].new_empty(3, *args[0].shape[args[1][0].ndim :])
        if name in ("aten::_to_copy", "aten::copy_"):
            source, to = (args[0], kwargs.get("device")) if short == "_to_copy" else (args[1], args[0].device)
            to = source.device if to is None else torch.device(to)
            if source.device.type != to.type:
                host = args[0] if source.is_meta and short == "copy_" else source
                asks = kwargs.get("non_blocking") or (short == "copy_" and len(args) > 2 and args[2])
                if not (asks and _is_pinned(host)):
                    self._waits("copy to the host" if source.is_meta else "copy from pageable memory")
                self.counted.aten["copy between host and device"] += 1
                if source.is_meta and short == "copy_":
                    return args[0]
                if source.is_meta:
                    return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return func(*args, **kwargs)
        known = func is torch.ops.aten.addmm.dtype_out and there  # torch 2.11 has no shapes for it
        out = kwargs["out"] if known else func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and short not in NO_KERNEL and (there or _is_meta(out)):
            self.counted.aten[short] += 1
            if self.counted.places is not None:
                self.counted.places[short, _place()] += 1
            if self.counted.traffic is not None and not (
                short == "copy_" and _place() == "autograd"
            ):  # a GPU's are taken
                self.counted.traffic.append(_work(short, args, tensors, out))
        return out

    def _waits(self, what: str) -> None:
        self.counted.waits[what, _place()] += 1


def extent(x: Tensor) -> int:
    """Bytes of its elements, those that an expansion repeats once."""
    return x.itemsize * math.prod(n for n, step in zip(x.shape, x.stride()) if step or not n)


class Work(NamedTuple):
    """Of an operator: bytes that it reads and writes, each tensor once (a sort: four passes); FLOPs of a product, and
    of what it multiplies."""

    name: str
    bytes: int
    flops: int
    dtype: torch.dtype | None


def _work(short: str, args: Any, tensors: list[Tensor], out: Any) -> Work:
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    read = tensors[1:] if short == "copy_" else [] if short in FILLS else tensors
    if short in ("embedding", "index", "index_select", "gather"):
        read = results
    moved = sum(map(extent, [*read, *results]))
    factors = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()][-2:]
    product = short.startswith(("mm", "bmm", "addmm", "baddbmm", "_grouped_mm"))
    flops = 2 * factors[0].numel() * factors[1].shape[-1] if product else 0
    return Work(short, 4 * moved if short == "sort" else moved, flops, factors[0].dtype if product else None)


def _place() -> str:
    """The innermost line of the project's own."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/") and "/tests/" not in name:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
    return "autograd"


def _is_meta(out: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves(out))


# what torch says of the device ---------------------------------------------------------------------------------------

_PINNED: WeakSet[Any] = WeakSet()


def _is_pinned(x: Tensor) -> bool:
    return x.untyped_storage() in _PINNED


def _pinned(x: Tensor, *_: Any) -> Tensor:
    copy = x.clone()
    _PINNED.add(copy.untyped_storage())
    return copy


class _Autocast:
    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}

    def context(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> Any:
        return self._within((dtype or torch.bfloat16) if enabled else None)

    @contextlib.contextmanager
    def _within(self, dtype: torch.dtype | None) -> Iterator[None]:
        before, outermost = self.dtype, not self.cast and self.dtype is None
        self.dtype = dtype
        try:
            yield
        finally:
            self.dtype = before
            if outermost:
                self.cast.clear()

    def low(self, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(self.low, x))
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.cast:
            self.cast[id(x)] = x, x.to(self.dtype)
        return self.cast[id(x)][1]


class _Casts(TorchFunctionMode):
    def __init__(self, autocast: _Autocast) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        if func in MAKES and str(kwargs.get("device")) == "meta" and not getattr(args[0], "is_meta", False):
            return func(*args, **kwargs | {"device": "cpu"}).to("meta")  # as on a GPU: made on the host, then copied
        if self.autocast.dtype is not None and func in LOW:
            args = tuple(map(self.autocast.low, args))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _as_on_cuda(autocast: _Autocast) -> Iterator[None]:
    """Meta tensors say that they are CUDA ones, and autocast knows their device."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("autocast", autocast.context),
            ("is_autocast_enabled", lambda *_: autocast.dtype is not None),
            ("get_autocast_dtype", lambda *_: autocast.dtype or torch.bfloat16),
        ):
            stack.enter_context(patch.object(torch, name, value))
        Tensor.is_cuda = property(lambda self: self.device.type == "meta")  # type: ignore[assignment, misc]
        stack.callback(lambda: delattr(Tensor, "is_cuda"))
        stack.enter_context(patch.object(Tensor, "pin_memory", _pinned))
        for name, value in (("is_available", True), ("is_current_stream_capturing", False)):
            stack.enter_context(patch.object(torch.cuda, name, lambda value=value: value))
        health = "_accelerator_graph_capture_health_check"  # torch built for CUDA asks a driver for the stream
        stack.enter_context(patch.object(torch.optim.Optimizer, health, lambda _: None))
        yield


# whole steps ---------------------------------------------------------------------------------------------------------


def training_step(name: str, rows: int, length: int, places: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Forward and backward of `name` under autocast, packed documents: counts of each, in the second of two steps."""
    from abyssal.model import ModelConfig, Transformer

    with gpu(places=places) as counted:
        with torch.device("meta"):
            model = Transformer(ModelConfig.load(name)).train()
            ids = torch.zeros(rows, length, dtype=torch.int64)
        for _ in range(2):
            counted.clear()
            before = counted.specialisations
            with torch.autocast("meta", getattr(torch, dtype), enabled=dtype != "float32"):
                out = model(ids, targets=ids, documents=ids)
            forward = counted.summary()
            counted.clear()
            out.loss.backward()
            backward = counted.summary()
            counted.clear()
            model.update_router_bias()
            found = {"forward": forward, "backward": backward, "router bias": counted.summary()}
        return found | {"new specialisations": counted.specialisations - before}


def decoding(
    name: str, batch: int, prompt: int, tokens: int, places: bool = False, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Tokens one by one behind a prompt, weights in `dtype`: counts of the last one, and what was specialised; and of
    the pass that `generate(graph=True)` captures.
    """
    from abyssal.model import ModelConfig, Transformer
    from abyssal.model.cache import FixedStep

    with gpu(places=places) as counted:
        with torch.device("meta"):
            model = Transformer(ModelConfig.load(name)).to(getattr(torch, dtype)).eval()
            cache = model.new_cache(batch, prompt + tokens)
            ids = torch.zeros(batch, prompt, dtype=torch.int64)
        with torch.no_grad():
            model(ids, cache=cache, logits_to_keep=1)
            first, worst = counted.specialisations, 0
            for _ in range(tokens):
                counted.clear()
                _ = model(ids[:, :1], cache=cache).logits
                worst = max(worst, counted.waits.total())
            new, token = counted.specialisations - first, counted.summary()
            cache.fix()
            past = torch.zeros(batch, 1, dtype=torch.int64, device="meta")
            counted.clear()
            model._continue(ids[:, :1], FixedStep(past), cache, 0)
        told = {"token": token, "most waits of a token": worst, "new specialisations": new}
        return told | {"captured": counted.summary()}


def lineage(name: str, batch: int, length: int, places: bool = False) -> dict[str, Any]:
    """A warm training pass of V3 or V3.2, two layers deep, then a token behind prompts of equal and unequal lengths."""
    from dataclasses import replace

    from abyssal.model.lineage import LineageConfig, LineageTransformer

    found = {}
    with gpu(places=places) as counted:
        with torch.device("meta"):
            config = replace(LineageConfig.load(name), num_hidden_layers=2, first_k_dense_replace=1)
            model, ids = LineageTransformer(config).bfloat16(), torch.zeros(batch, length, dtype=torch.int64)
        for _ in range(2):  # frequencies are sent there once and for all
            counted.clear()
            model(ids, targets=ids, documents=ids).loss.backward()
            model.update_router_bias()
        found["train"] = counted.summary()
        for lengths in (None, range(length - batch, length)):
            cache = model.eval().new_cache(batch, length + 1)
            model(ids, cache=cache, lengths=lengths)
            counted.clear()
            model(ids[:, :1], cache=cache)
            found["token" if lengths is None else "token of uneven rows"] = counted.summary()
    return found


def main(arguments: list[str]) -> None:
    what, name, *sizes = arguments
    run = {"train": training_step, "decode": decoding, "lineage": lineage}[what]
    places = "--places" in sizes
    print(json.dumps(run(name, *(int(size) for size in sizes if size != "--places"), places=places), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
