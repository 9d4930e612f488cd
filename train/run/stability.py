"""Spikes of the loss: seen, gone back on, and passed with experts chosen by earlier weights (V4 4.2.3; spec C.7).

    spike at step t     lm_t - median > max(deviations · 1.4826 · MAD, least)       over the last `window` losses
    then                back to the newest checkpoint before the step; from there on, and until `anticipatory_steps`
                        after t, anticipatory routing; then as before

    anticipatory        the experts of batch t are those that the weights of step t - lag choose, bias and all; what is
                        computed with them, their weights included, is of the weights of step t

The report names the means, not the numbers; these are our choices. The median and the median absolute deviation (MAD)
do not mind a few odd losses in the window. A new stage empties it: other lengths have other losses; in an indexer
warm-up nothing is looked for, as the main model stands still. While routing is anticipatory, losses are collected but
no spike is seen, so that a batch that spikes whatever routes it is passed, and every further spike lies later.
`lag` steps ahead, one more forward pass is made in each step; the first `lag` steps after going back take the experts
that the checkpoint's weights choose.

All of this is a function of the losses: a run that is killed, or that goes back, does the same again. Window, end of
the anticipatory steps, spikes so far and the experts at hand are part of a checkpoint.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from ..settings import StabilityConfig
from .checkpoint import Memory
from .step import Experts

TO_SIGMA = 1.4826  # a normal distribution's deviation over its MAD


@dataclass(frozen=True)
class Spike:
    """A loss that was gone back on."""

    step: int  # whose loss it is, from 1
    loss: float
    median: float
    limit: float
    to: int  # the checkpoint's step


@dataclass
class Watch:
    """The memory of the detector, and of what it has seen."""

    config: StabilityConfig
    losses: list[float] = field(default_factory=list)
    stage: int = 0
    until: int = 0  # routing is anticipatory in the steps below, from 0
    spikes: list[Spike] = field(default_factory=list)

    def limit(self) -> tuple[float, float]:
        """Median of the window, and the loss above which there is a spike."""
        middle = median(self.losses)
        deviation = TO_SIGMA * median(abs(loss - middle) for loss in self.losses)
        return middle, middle + max(self.config.deviations * deviation, self.config.least)

    def sees(self, step: int, stage: int, loss: float) -> bool:
        """Whether the loss of `step`, from 0, is a spike; if not, it is remembered."""
        if stage != self.stage:
            self.losses, self.stage = [], stage
        if step >= self.until and len(self.losses) == self.config.window and loss > self.limit()[1]:
            return True
        self.losses = [*self.losses, loss][-self.config.window :]
        return False

    def went_back(self, step: int, loss: float, to: int, remembered: "Watch") -> "Watch":
        """The memory after the spike of `step`: that of the checkpoint, and what follows from the spike."""
        spike = Spike(step + 1, loss, *self.limit(), to)
        spikes = [*(old for old in self.spikes), spike]
        until = step + 1 + self.config.anticipatory_steps if self.config.anticipatory_steps else 0
        return Watch(self.config, list(remembered.losses), remembered.stage, until, spikes)

    def gone_back_to(self, step: int) -> list[dict[str, Any]]:
        """The spikes that led back to that step, for its line of the metrics."""
        return [asdict(spike) for spike in self.spikes if spike.to == step]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, exactly."""
        spikes = [asdict(spike) for spike in self.spikes]
        return {"losses": self.losses, "stage": self.stage, "until": self.until, "spikes": spikes}

    @classmethod
    def from_dict(cls, config: StabilityConfig, values: dict[str, Any]) -> "Watch":
        """From what `to_dict` gave; from {}, a new one."""
        values = {"losses": [], "stage": 0, "until": 0, "spikes": [], **values}
        spikes = [Spike(**spike) for spike in values["spikes"]]
        losses = values["losses"][-config.window :]
        return cls(config, losses, values["stage"], values["until"], spikes)


class Anticipation:
    """The experts of the steps to come, chosen ahead of them."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.chosen: dict[int, list[Experts]] = {}  # step -> experts of each of its passes

    def experts(self, step: int, until: int, choose: Callable[[int], list[Experts]]) -> list[Experts] | None:
        """Those of `step`, None from step `until` on; `choose(s)` gives those of step s by the weights as they are."""
        if step >= until:
            self.chosen = {}
            return None
        for ahead in range(step, min(step + self.lag, until - 1) + 1):
            if ahead not in self.chosen:
                self.chosen[ahead] = choose(ahead)
        return self.chosen.pop(step)

    def tensors(self) -> dict[str, Tensor]:
        """`STEP.PASS.LAYER`: what a checkpoint keeps of the steps to come."""
        return {
            f"{step}.{number}.{layer}": experts.contiguous()
            for step, several in self.chosen.items()
            for number, one in enumerate(several)
            for layer, experts in one.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Back from what `tensors` gave."""
        self.chosen = {}
        for key in sorted(tensors, key=lambda key: tuple(map(int, key.split(".")))):
            step, number, layer = map(int, key.split("."))
            several = self.chosen.setdefault(step, [])
            if number == len(several):
                several.append({})
            several[number][layer] = tensors[key]


class Stability:
    """Detector and anticipatory routing of a run."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self.load(Memory())

    def experts(self, step: int, choose: Callable[[int], list[Experts]]) -> list[Experts] | None:
        """As `Anticipation.experts`."""
        return self.anticipation.experts(step, self.watch.until, choose)

    def memory(self) -> Memory:
        """What a checkpoint keeps of this."""
        return Memory(self.watch.to_dict(), self.anticipation.tensors())

    def load(self, memory: Memory) -> None:
        """Back from what `memory` gave."""
        self.watch = Watch.from_dict(self.config, memory.values)
        self.anticipation = Anticipation(self.config.lag)
        self.anticipation.load(memory.tensors)
