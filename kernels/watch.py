"""Watching what runs: watchers are told when a call begins and when it ends.

    ops, engine by engine        as the name of their function, at their one door (`backend.implementation`)
    whatever is made with `told` as what its maker says it is

While nobody watches, it costs one look at an empty list. Compiled graphs are not watched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch


class Watcher(Protocol):
    """Every `begins` is followed by its `ends`, also where the call raises; calls lie within each other."""

    def begins(self, what: Any) -> None: ...

    def ends(self, what: Any) -> None: ...


_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tells the watcher of all that runs within, in this process."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def is_watched() -> bool:
    """Whether anybody watches now."""
    return len(_watchers) > 0 and not torch.compiler.is_compiling()


def told(call: Callable[..., Any], what: Any) -> Callable[..., Any]:
    """The same call, of which watchers are told as `what`; the very same if nobody watches now."""
    if not is_watched():
        return call

    def told_call(*args: Any, **options: Any) -> Any:
        watchers = tuple(_watchers)
        for watcher in watchers:
            watcher.begins(what)
        try:
            return call(*args, **options)
        finally:
            for watcher in reversed(watchers):
                watcher.ends(what)

    return told_call


class ToldEngine(ModuleType):
    """An engine of an op, each of whose functions is told."""

    def __init__(self, engine: ModuleType) -> None:
        super().__init__(engine.__name__)
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return told(getattr(self._engine, name), name)
