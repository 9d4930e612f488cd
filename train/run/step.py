"""One optimizer step: passes forward and backward, clipping, update, router biases.

    gradients     of the model's own losses over a batch, in passes, by given experts where routing is anticipatory
    accumulate    of whatever loss each pass has
    update        optimizer, router biases

Between gradients and update the caller may look at losses and norm, and drop the step (`forget`). Nothing here waits
for the device: numbers stay there, learning rate and bias speed go there, and a step that is not finite changes no
weight, nor does any after it: its gradient is taken for zero, and so is the learning rate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...model import Transformer
from ...model.routing import record_routing, replay_routing
from ..data.rows import IGNORED, Batch
from ..distributed.shard import add_loads, clip_gradients, keep_gradients
from ..distributed.world import ALONE, World
from ..optim import Optimizers, set_learning_rate
from ..recipe import Recipe
from .accumulate import Pass, mean_metrics, micro_batches, passes, summed
from .observe import Blind
from .schedule import Phase

Found = TypeVar("Found")
Experts = dict[int, Tensor]  # of a pass: layer -> int64 [n, k]
Forward = Callable[[], tuple[Tensor, Found]]  # of a pass: its part of the step's loss, and what else the caller wants
BLIND = Blind()


class Outcome(NamedTuple):
    """What the passes of a step gave."""

    losses: dict[str, Tensor]  # "loss", what is learnt from, and its unweighted parts; each []
    norm: Tensor  # [] of the gradient, before clipping
    metrics: dict[str, Tensor]
    tokens: int  # targets


class Stepper:
    """Model and optimizer, one step after another; in each process of `world` with a share of the step's rows."""

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizers,
        recipe: Recipe,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.model, self.optimizer, self.recipe, self.device, self.world = model, optimizer, recipe, device, world
        self.dtype = getattr(torch, recipe.train.dtype)
        wide = torch.float64 if device.type == "cpu" else torch.float32  # fused AdamW reads a rate of this width
        self.lr, self.speed = (torch.zeros((), dtype=wide, device=device) for _ in range(2))
        self.sound = torch.ones((), dtype=torch.bool, device=device)  # all losses and norms so far were finite

    def gradients(
        self, phase: Phase, batch: Batch, experts: Sequence[Experts] | None = None, look: Blind = BLIND
    ) -> Outcome:
        """Forward and backward over `batch`, on the host; gradients are clipped then.

        experts: for each pass, those to take instead of choosing.
        """
        parts, tokens = self.passes(batch)
        return Outcome(*self.on_device(phase, parts, experts, look), tokens)

    def passes(self, batch: Batch) -> tuple[list[Pass], int]:
        """Those of a step over `batch`, on the host, and its targets, over all processes."""
        if self.device.type != "cpu":  # where the model looks for itself
            self.model.check_batch(*batch.tensors())
        tokens = int(self.world.total((batch.targets != IGNORED).sum()))
        return passes(self.recipe.model, batch, self.recipe.train.micro_batch, self.world.total), tokens

    def on_device(
        self, phase: Phase, parts: Sequence[Pass], experts: Sequence[Experts] | None = None, look: Blind = BLIND
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """What `gradients` does with its passes: losses, norm and metrics."""
        forwards = [partial(self._losses, phase, part) for part in parts]
        choices = map(self._taking, experts or [{}] * len(parts))
        found, norm = self.accumulate(phase, zip(choices, forwards, strict=True), look)
        losses, measured = zip(*found)
        sums = summed(losses, self.world.total)
        self._judge(*sums.values())
        rows = [len(part.batch.ids) for part in parts]
        return sums, norm, {name: self.world.mean(x.detach()) for name, x in mean_metrics(measured, rows).items()}

    def accumulate(
        self, phase: Phase, passes: Iterable[tuple[AbstractContextManager, Forward[Found]]], look: Blind = BLIND
    ) -> tuple[list[Found], Tensor]:
        """Adds up the gradients of the passes' losses, and clips them; what the passes found, and the norm before.

        passes: what a pass, forward and backward, runs within (`model.routing`: choices to take), and its forward pass.
        """
        self.model.train()
        self.model.attention_stage = phase.attention
        found = []
        with only_indexers(self.model) if phase.indexer_only else nullcontext():
            for choices, forward in passes:
                with choices:
                    with look.watching():
                        loss, more = forward()
                    look.backward(loss)
                    loss.backward()
                found.append(more)
        look.gradients()
        norm = clip_gradients(self.model, self.recipe.optim.grad_clip, self.world)
        self._judge(norm)
        return found, norm

    def update(self, phase: Phase, look: Blind = BLIND) -> None:
        """The optimizer's step with the gradients as they are, and the router biases'."""
        self.set_speeds(phase)
        self.update_on_device(look)

    def set_speeds(self, phase: Phase) -> None:
        """Learning rate and speed of the router biases, for the update to come."""
        self.lr.fill_(phase.lr)
        self.speed.fill_(phase.bias_speed)

    def update_on_device(self, look: Blind = BLIND) -> None:
        """What `update` does then."""
        keep_gradients(self.model, self.sound)
        set_learning_rate(self.optimizer, self.lr * self.sound)
        with look.updating():
            self.optimizer.step()
        self.optimizer.zero_grad()
        add_loads(self.model, self.world)
        self.model.update_router_bias(self.speed * self.sound)

    def _judge(self, *numbers: Tensor) -> None:
        """The step is sound while these are finite."""
        self.sound.logical_and_(torch.stack(numbers).isfinite().all())

    def forget(self) -> None:
        """Drops the gradients and loads of a step that is not made."""
        self.optimizer.zero_grad()
        for block in (*self.model.layers, *self.model.mtp):
            block.ffn.gate.counts = None

    @torch.no_grad()
    def experts(self, phase: Phase, batch: Batch) -> list[Experts]:
        """Those that the weights as they are choose in the passes of a step."""
        self.model.eval()
        self.model.attention_stage = phase.attention
        chosen = []
        for part in micro_batches(batch, self.recipe.train.micro_batch):
            with record_routing(self.model) as routes:
                self._forward(part)
            chosen.append({layer: taken[0] for layer, taken in routes.items()})
        return chosen

    def _taking(self, chosen: Experts) -> AbstractContextManager[None]:
        """A pass takes these experts, which a checkpoint has given back on the host."""
        return replay_routing(self.model, {layer: experts.to(self.device) for layer, experts in chosen.items()})

    def _losses(self, phase: Phase, part: Pass) -> tuple[Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """What the phase learns from, in a pass; that and its parts, and the model's measurements."""
        out = self._forward(part.batch, shares=part.shares)
        loss = sum(phase.weights[name] * value for name, value in out.losses.items() if name in phase.weights)
        return loss, ({"loss": loss, **out.losses}, out.metrics)

    def _forward(self, batch: Batch, **options: Any) -> Any:
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(batch.ids, targets=batch.targets, documents=batch.documents, **options)


@contextmanager
def only_indexers(model: nn.Module) -> Iterator[None]:
    """Passes within give gradients to the indexers alone, and keep nothing for others."""
    others = [p for name, p in model.named_parameters() if ".indexer." not in name and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
