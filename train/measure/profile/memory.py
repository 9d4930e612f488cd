"""Memory by mechanism: what lives between forward and backward, and the most that lives at any time.

A storage belongs to the mechanism that saves it for the backward pass first, or, if none does, to the one that made it.
Parameters, gradients and optimizer states are counted by themselves.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .observe import Observer


class Memory(Observer):
    """Bytes of all tensors that operators return while `counting`; those of `known` tensors are not counted.

    What one operator needs within itself is not seen. kept: by mechanism, at the end of the forward pass; peak: the
    most in the step, and `peak_at` the phase and mechanism at work then.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {_key(t): None for t in known}
        self.size: dict[int, int] = {}
        self.holder: dict[int, str] = {}
        self.saved: set[int] = set()
        self.now = self.peak = 0
        self.peak_at: tuple[str, str] | None = None
        self.kept: dict[str, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a step."""
        with _Storages(self), torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def phase(self, name: str | None) -> None:
        if self.at == "forward" and name is None:
            found = Counter[str]()
            for key, holder in self.holder.items():
                found[holder] += self.size[key]
            self.kept = dict(found)
        super().phase(name)

    def _save(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key in self.size and key not in self.saved:
            self.saved.add(key)
            self.holder[key] = self.current
        return tensor.detach()  # an operator's own output would otherwise hold the operator that holds it

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self._end(key))
        self.size[key], self.holder[key] = storage.nbytes(), self.current
        self.now += self.size[key]
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, (self.at or "", self.current)

    def _end(self, key: int) -> None:
        self.now -= self.size.pop(key)
        del self.seen[key], self.holder[key]
        self.saved.discard(key)


class _Storages(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.memory.add(tensor.untyped_storage())
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
