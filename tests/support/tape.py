"""CUDA graphs without CUDA: what a region does to tensors is put on a tape, and played again into the same storages.

    with emulated():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids)                    recorded; as on a GPU, nothing of it has happened afterwards
        ids.copy_(others)
        graph.replay()                          now it happens: `out` is that of the others

As on a GPU, addresses are fixed and what the host decided while it was recorded stays decided, so that a number that
was baked in shows as a wrong result; reading a tensor on the host is refused. Results of the recording are NaN (or the
most negative integer) until the first replay. Forward and backward pass may both be recorded.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # its tables are made when it is imported: not under a patch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
READS |= {"aten::is_nonzero", "aten::unique_consecutive", "aten::is_pinned"}


class Tape(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor], bool]] = []
        self._own: dict[int, Tensor] = {}  # storages that the region made, kept alive: an address is not used twice
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # of other storages that it changes, what was in them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, schema = func._schema.name, func._schema
        if name in READS or (name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            raise RuntimeError(f"{name} reads a tensor on the host: not allowed while a graph is captured")
        for argument, value in zip(schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        for argument in schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(kwargs[argument.name])
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = not any(r.alias_info for r in schema.returns) and not _addresses(made) & _addresses((args, kwargs))
        if fresh:
            self._own |= {x.untyped_storage().data_ptr(): x for x in made}
        self.calls.append((func, args, kwargs, made, fresh))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made, fresh in self.calls:
                again = func(*args, **kwargs)
                if fresh and not func._schema.name.startswith("aten::empty"):
                    for old, new in zip(made, (x for x in tree_leaves(again) if isinstance(x, Tensor)), strict=True):
                        old.detach().copy_(new)

    @contextlib.contextmanager
    def recording(self, *_: Any, **__: Any) -> Iterator[None]:
        with self, patch.object(torch.compiler, "is_compiling", lambda: True):  # no checks of values, as on a GPU
            yield
        with torch.no_grad():
            for now, before in self._before.values():
                now.detach().copy_(before)
            for x in self._own.values():
                _spoil(x)

    def _keep(self, values: Any) -> None:
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and (place := x.untyped_storage().data_ptr()) not in self._own:
                whole = x.detach().new_empty(0).set_(x.untyped_storage())
                self._before.setdefault(place, (whole, whole.clone()))


def _addresses(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)} - {0}


def _spoil(x: Tensor) -> None:
    if x.dtype.is_floating_point or x.dtype.is_complex:
        x.detach().fill_(float("nan"))
    elif x.dtype != torch.bool:
        x.detach().fill_(torch.iinfo(x.dtype).min)


class _Stream:
    def wait_stream(self, _: Any) -> None: ...


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """`torch.cuda`'s graphs and streams, for CPU tensors."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("CUDAGraph", Tape),
            ("graph", lambda tape, **_: tape.recording()),
            ("Stream", _Stream),
            ("stream", lambda _: contextlib.nullcontext()),
            ("current_stream", lambda *_: _Stream()),
            ("synchronize", lambda *_: None),
            ("graph_pool_handle", lambda: (0, 0)),
        ):
            stack.enter_context(patch.object(torch.cuda, name, value))
        yield
