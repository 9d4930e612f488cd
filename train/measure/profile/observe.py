"""Which mechanism is at work: a stack of scopes in the forward pass, one autograd node after the other in the backward.

Autograd numbers its nodes as they are made. The numbers at which the mechanism changed in the forward pass tell, in the
backward pass, which mechanism a node belongs to; a node that accumulates a gradient belongs to its parameter's.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...run.observe import Blind

REST, OPTIMIZER, MTP = "rest", "optimizer", "MTP"
OPEN = ("projections", "router", REST)  # contain parts of other mechanisms


class Observer(Blind):
    """Follows phases and mechanisms; subclasses are told of every change (`changed`) or of single nodes.

    A training step tells it its phases itself (`Blind`). Not attached to a model, it sees little else.
    """

    def __init__(self) -> None:
        self.at: str | None = None  # the phase; None: what happens now does not count
        self.stack = [REST]
        self.owners_now: Callable[[], dict[Tensor, str]] | None = None
        self.owners: dict[Tensor, str] = {}
        self.borders: list[int] = []
        self.beyond: list[str] = []

    @property
    def current(self) -> str:
        return self.stack[-1]

    def attach(self, owners_now: Callable[[], dict[Tensor, str]]) -> None:
        """owners_now: gives the mechanism of every parameter that there is when it is called."""
        self.owners_now = owners_now

    def detach(self) -> None:
        self.owners_now = None

    def phase(self, name: str | None) -> None:
        """A new phase begins; None ends the last."""
        self.at, self.stack = name, [OPTIMIZER if name == OPTIMIZER else REST]
        if name == "forward":
            self.borders, self.beyond = [0], [REST]
        self.changed()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.phase("forward")
        yield
        self.phase(None)

    def backward(self, loss: Tensor) -> None:
        self.follow(loss)
        self.phase("backward")

    def gradients(self) -> None:
        self.phase(OPTIMIZER)

    def enter(self, mechanism: str) -> None:
        """In the backward pass this is a part that is worked out again, whatever node asked for it."""
        before = self.current
        again = self.at == "backward" and len(self.stack) == 1 and before != MTP
        self.stack.append(mechanism if before in OPEN or again else before)
        self._moved(before)

    def leave(self) -> None:
        """Ends the innermost scope."""
        self._moved(self.stack.pop())

    def _moved(self, before: str) -> None:
        if self.current == before:
            return
        if self.at == "forward":
            self.borders.append(torch._C._autograd._get_sequence_nr())
            self.beyond.append(self.current)
        self.changed()

    def follow(self, loss: Tensor) -> None:
        """Watches the nodes that the backward pass of `loss` will run."""
        if self.owners_now is None:
            return
        self.owners = self.owners_now()
        seen, waiting = {loss.grad_fn}, [loss.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            self.watch(node, self._mechanism(node))
            new = [after for after, _ in node.next_functions if after is not None and after not in seen]
            seen.update(new)
            waiting += dict.fromkeys(new)

    def _mechanism(self, node: Any) -> str:
        if hasattr(node, "variable"):
            return self.owners.get(node.variable, REST)
        return self.beyond[bisect_right(self.borders, node._sequence_nr()) - 1]

    def watch(self, node: Any, mechanism: str) -> None:
        node.register_prehook(partial(self._runs, mechanism))

    def _runs(self, mechanism: str, _: Any) -> None:
        if mechanism != self.current:
            self.stack[-1] = mechanism
            self.changed()

    def changed(self) -> None:
        """The phase or the mechanism at work is another one now."""
