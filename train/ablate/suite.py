"""What an ablation suite is: arms that differ in one thing, measures of their runs, and claims about the measures.

    recipe of a run = the suite's recipe + the suite's changes + size (quick or full) + the arm's changes + seed
    model  of a run = the recipe's model, after the arm's variant

All arms of a suite take the same number of steps, rows and tokens at the same learning rate, and a seed means the same
data in all of them. The first arm is the baseline. Arms of equal time take as many steps as fit into the baseline's
time, by the measured seconds of a step (`clock.py`).

A suite is registered before its first run: claims, measures and seeds stand in a file that is committed, and the page
of results takes no run of uncommitted code.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...model import Transformer
from ...model.config import read_recipe
from .. import own
from ..recipe import Recipe, apply, own_code
from .variants import VARIANTS

Probe = Callable[[Transformer, Recipe], dict[str, float]]
SIZES = ("quick", "full")


@dataclass(frozen=True)
class Arm:
    """One way to build and train the model: recipe keys that are set or left out, then a variant of the model: the name
    of one of ours, or a function of one's own at the top of a file, which changes the model as soon as it is built.
    """

    name: str
    label: str
    set: tuple[str, ...] = ()
    without: tuple[str, ...] = ()  # keys or tables taken out of the recipe, as "model.engram"
    variant: str | Callable[[Transformer], None] = "as configured"
    equal_time: bool = False  # trains as long as the baseline, not as many steps

    def __post_init__(self) -> None:
        if callable(self.variant):
            object.__setattr__(self, "variant", own.named(self.variant))
        elif self.variant not in VARIANTS:
            known = f"{', '.join(VARIANTS)}, or a function"
            raise ValueError(f"arm {self.name!r}: variant={self.variant!r}: allowed are {known}")

    def in_equal_time(self) -> "Arm":
        """The same arm, trained as long as the baseline, under a name of its own."""
        return replace(self, name=f"{self.name}-time", label=f"{self.label}, equal time", equal_time=True)


@dataclass(frozen=True)
class Measure:
    """A number of a run: its name in the results, what it is called, and which direction is better ("" = neither)."""

    name: str
    label: str
    better: str = ""
    percent: bool = False

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"


@dataclass(frozen=True)
class Claim:
    """`arm` does better than `than` in `measure`: what a verdict is given on."""

    text: str
    measure: str
    arm: str
    than: str | float  # another arm, another measure of the same arm, or a number


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: "bars" of measures, the "curve" of a score over steps, or measures over "distance"."""

    kind: str
    title: str
    measures: tuple[str, ...] = ()  # of bars and distance; of a curve its one score
    axis: str = ""


@dataclass(frozen=True)
class Suite:
    """A named experiment. `caveat` is what an experiment of this size cannot tell, `seeds` the runs of each arm."""

    name: str
    title: str
    question: str
    caveat: str
    recipe: str
    arms: tuple[Arm, ...]
    measures: tuple[Measure, ...]
    claims: tuple[Claim, ...]
    panels: tuple[Panel, ...]
    set: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    full: tuple[str, ...] = ()  # what --full changes
    probes: tuple[str | Probe, ...] = ()  # measured on each trained model, by name or one's own, see `probes.py`
    reach: str = ""  # a falling score: measures when an arm reaches the baseline's final one, as "reach"
    seeds: int = 8

    def __post_init__(self) -> None:
        probes = tuple(own.named(probe) if callable(probe) else probe for probe in self.probes)
        object.__setattr__(self, "probes", probes)
        if not self.panels:
            raise ValueError(f"suite {self.name!r}: panels is empty: at least one is needed")
        arms, measures = [arm.name for arm in self.arms], {measure.name: measure for measure in self.measures}
        for claim in self.claims:
            for name, known in ((claim.arm, arms), (claim.than, [*arms, *measures])):
                if isinstance(name, str) and name not in known:
                    raise ValueError(f"suite {self.name!r}: claim {claim.text!r}: arm {name!r}: allowed are {arms}")
            if claim.measure not in measures or not measures[claim.measure].better:
                raise ValueError(f"suite {self.name!r}: claim {claim.text!r}: no direction for {claim.measure!r}")

    def measure(self, name: str) -> Measure:
        return next(measure for measure in self.measures if measure.name == name)


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed. Jobs of the same key are the same run, also those of different suites."""

    arm: str
    seed: int
    recipe: Recipe
    variant: str
    probes: tuple[str, ...]

    @property
    def key(self) -> str:
        return key_of(self.recipe, self.variant)


def key_of(recipe: Recipe, variant: str) -> str:
    """A digest of a run's recipe, variant and whatever code of one's own they name. Files keep recipes beside keys, so
    that a setting that is new, at the default that it has there, makes no other run of an old one.
    """
    names = [variant, *own_code(recipe.with_absolute_paths().to_dict())]
    code = [own.digest(name) for name in names if own.is_own(name)]
    text = json.dumps([recipe.to_dict() | {"name": ""}, variant, *code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def jobs(
    suite: Suite,
    seeds: Sequence[int],
    size: str = "quick",
    overrides: Sequence[str] = (),
    steps: Mapping[str, int] | None = None,
) -> list[Job]:
    """The runs of a suite, seed by seed, so that whole comparisons are done first.

    Args:
        steps: of the arms of equal time, by name; None = as many as the baseline's.

    Raises:
        ValueError: a size that is not "quick" or "full", fewer than one seed, or what `Recipe` refuses.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: allowed are {' and '.join(SIZES)}")
    if not seeds:
        raise ValueError("seeds is empty: at least one is needed")
    return [_job(suite, arm, seed, size, overrides, steps or {}) for seed in seeds for arm in suite.arms]


def _job(suite: Suite, arm: Arm, seed: int, size: str, overrides: Sequence[str], steps: Mapping[str, int]) -> Job:
    last = [f"train.steps={steps[arm.name]}"] if arm.equal_time and arm.name in steps else []
    recipe = recipe_of(suite, arm, seed, size, [*overrides, *last])
    return Job(arm.name, seed, recipe, str(arm.variant), tuple(map(str, suite.probes)))


def recipe_of(suite: Suite, arm: Arm, seed: int, size: str, overrides: Sequence[str]) -> Recipe:
    values = {"name": f"{suite.name} {arm.name}", **read_recipe(suite.recipe)}
    for key in suite.without:
        values = _without(values, key)
    common = [*suite.set, *(suite.full if size == "full" else ())]
    values = apply(values, common)
    for key in arm.without:
        values = _without(values, key)
    values = apply(values, [*overrides, *arm.set, f"train.seed={seed}"])
    own.allow(*own_code(values))  # the suite is of whoever runs it
    return Recipe.from_dict(values)


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A copy without that key. One that is not there is an error: the arm would silently equal the baseline."""
    first, _, rest = key.partition(".")
    if first not in values:
        raise ValueError(f"{key!r} is not in the recipe: nothing to leave out")
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    return {**values, first: _without(values[first], rest)}
