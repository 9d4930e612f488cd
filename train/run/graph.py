"""A training step as two CUDA graphs: what the host launches one by one is captured once per shape, and replayed.

    steps 1 to WARM_UP of a shape    made one by one, on the stream that captures
    the next                         captured, which computes nothing; then replayed, as is each one after it

    forward, backward, clipping  |  optimizer, router biases        the caller may look at losses and norm in between

A graph has fixed addresses and keeps whatever the host decided at capture. What differs between steps lies in tensors
that are filled before a replay: tokens, each pass' shares in the means, learning rate and bias speed. A change of
anything else (length, rows, attention stage, weights of the losses) is a new shape, for which all begins anew. The bits
are those of steps made one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...model.losses import LossShares
from ..data.rows import Batch, pinned
from ..distributed.world import World
from ..recipe import Recipe
from .accumulate import Pass
from .schedule import Phase
from .step import Outcome, Stepper

WARM_UP = 3


def check(recipe: Recipe, device: torch.device, world: World) -> None:
    """Raises ValueError for a run whose steps cannot be captured."""
    reasons = {
        f"device {device}": (device.type != "cuda", "a graph is CUDA's"),
        f"{world.size} processes": (world.size > 1, "sums over processes are not captured"),
        "[stability]": (recipe.stability is not None, "experts chosen ahead come from the host"),
        "[grpo] or [distil]": (recipe.rollouts is not None, "no two updates have the same shape"),
        "optim.engram_rows='touched'": (recipe.optim.engram_rows == "touched", "no two steps hold the same rows"),
        f"train.recompute={recipe.train.recompute}": (
            recipe.train.recompute > 0,
            "recomputing reads the random state on the host",
        ),
    }
    for what, (found, why) in reasons.items():
        if found:
            raise ValueError(f"train.graph=true with {what}: not allowed, as {why}")


class GraphStepper:
    """Makes the steps of a `Stepper`, which may go on making some itself: those that somebody watches."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.stream = stepper, torch.cuda.Stream()
        self.shape: Any = None
        self.warm = 0
        self.captured: Captured | None = None

    def gradients(self, phase: Phase, batch: Batch) -> Outcome:
        """As `Stepper.gradients`; the tensors of its outcome hold until the next step."""
        parts, tokens = self.stepper.passes(batch)
        shape = (phase.attention, tuple(phase.weights.items()), tuple(part.batch.ids.shape for part in parts))
        if shape != self.shape:
            self.shape, self.warm, self.captured = shape, 0, None
        if self.captured is None and self.warm < WARM_UP:
            self.warm += 1
            with self._aside():
                return Outcome(*self.stepper.on_device(phase, parts), tokens)
        if self.captured is None:
            self.captured = Captured(self.stepper, phase, parts, self.stream)
        self.captured.fill(parts)
        self.captured.gradients.replay()
        losses, norm, metrics = self.captured.found
        return Outcome(losses, norm, metrics, tokens)

    def update(self, phase: Phase) -> None:
        """As `Stepper.update`."""
        self.stepper.set_speeds(phase)
        if self.captured is not None:
            self.captured.update.replay()
            return
        with self._aside():
            self.stepper.update_on_device()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


class Captured:
    """The graphs of one shape, and the tensors that they read and write."""

    def __init__(self, stepper: Stepper, phase: Phase, parts: list[Pass], stream: torch.cuda.Stream) -> None:
        device, model = stepper.device, stepper.model
        wide = torch.promote_types(model.head.weight.dtype, torch.float32)  # of the losses
        self.batches = [part.batch.to(device) for part in parts]
        self.shares = torch.empty(_table(parts).shape, dtype=wide, device=device)
        fixed = [Pass(batch, _shares(row)) for batch, row in zip(self.batches, self.shares)]
        pool = torch.cuda.graph_pool_handle()

        def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                return graph, run()

        self.gradients, self.found = capture(lambda: stepper.on_device(phase, fixed))
        self.update, _ = capture(stepper.update_on_device)

    def fill(self, parts: list[Pass]) -> None:
        """What the next replay reads; nothing waits."""
        for fixed, part in zip(self.batches, parts, strict=True):
            for old, new in zip(fixed.tensors(), part.batch.tensors()):
                old.copy_(pinned(new, old.device), non_blocking=True)
        table = _table(parts).to(self.shares.dtype)
        self.shares.copy_(pinned(table, self.shares.device), non_blocking=True)


def _table(parts: list[Pass]) -> Tensor:
    """The shares of each pass as a row [4 + CSA layers], as the fields of `LossShares` come."""
    return torch.tensor([[*part.shares[:4], *part.shares.indexer] for part in parts], dtype=torch.float64)


def _shares(row: Tensor) -> LossShares:
    lm, mtp, balance, mtp_balance, *indexer = row.unbind()
    return LossShares(lm, mtp, balance, mtp_balance, tuple(indexer))
