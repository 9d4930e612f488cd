"""What the studies ask: chains of runs, and the claims that are made about them before any is run.

    arm      a recipe with changes, from new weights or from another arm's run of the same seed
    claim    one side answers more questions right than the other, or a number of its runs is larger
    side     "ARM MODE", over all tasks; "ARM MODE TASK"; or "ARM NUMBER", one of the looks of `record`

A seed means the same first weights, questions and draws in every arm. What starts from another arm's run has data of
its own: its training seed is 1000 further, so that more fine-tuning reads other problems than the one before it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ...model.config import read_recipe
from ...model.fields import did_you_mean
from ..recipe import Recipe, apply

FURTHER = 1000  # training seeds between an arm and what starts from its run
UNSEEN = ("countdown-3", "multiplication-2")
QUIET = ("train.eval_every=0", "train.checkpoint_every=20", "train.keep=1", "train.sample_tokens=0")


@dataclass(frozen=True)
class Arm:
    """A run of each seed: `after` names the arm that it starts from, `teacher` the one that it is taught by."""

    name: str
    label: str
    recipe: str
    set: tuple[str, ...] = ()
    after: str = ""
    teacher: str = ""
    tasks: tuple[str, ...] = ()  # that it is examined in; () = those of its recipe


@dataclass(frozen=True)
class Claim:
    text: str
    one: str
    other: str


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    question: str
    caveat: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...]


ARMS = {
    arm.name: arm
    for arm in (
        Arm("sft", "fine-tuned", "reason-sft"),
        Arm("more", "as much more of it", "reason-sft", ("train.steps=400",), after="sft"),
        Arm("grpo", "then rewards", "reason-grpo", after="sft"),
        Arm("routing", "rewards, picks anew", "reason-grpo", ("grpo.keep_picks=false",), "sft"),
        Arm("free", "rewards, all anew", "reason-grpo", ("grpo.keep_routing=false", "grpo.keep_picks=false"), "sft"),
        Arm("teacher", "the teacher", "reason-sft", ("model.hidden_size=160", "train.steps=800")),
        Arm("distil", "then the teacher's policy", "reason-distil", after="sft", teacher="teacher"),
        Arm("facts", "facts alone", "reason-facts", tasks=UNSEEN),
        Arm("more-facts", "as much more of them", "reason-facts", ("train.steps=400",), "facts", tasks=UNSEEN),
        Arm("zero", "then rewards alone", "reason-zero", after="facts"),
    )
}


def _both(text: str, one: str, other: str) -> tuple[Claim, ...]:
    """A claim in each mode."""
    return tuple(
        Claim(f"{text}, {said}", f"{one} {mode}", f"{other} {mode}")
        for mode, said in (("thinking", "thinking"), ("chat", "answering at once"))
    )


STUDIES = {
    study.name: study
    for study in (
        Study(
            "control",
            "Rewards against as much more fine-tuning",
            "After the same fine-tuning, do rewards do more than going on with examples for about as long?",
            "Fine-tuning stops early, where examples still teach much. How much more of it there is was chosen to take"
            " the wall-clock time of the rewards on another machine; minutes and tokens of both stand in the table of"
            " runs. One learning rate each, tuned on other seeds.",
            ("sft", "more", "grpo"),
            (
                Claim("visible working helps after fine-tuning", "sft thinking", "sft chat"),
                *_both("rewards help", "grpo", "sft"),
                *_both("more fine-tuning helps", "more", "sft"),
                *_both("rewards help more than as much more fine-tuning", "grpo", "more"),
            ),
        ),
        Study(
            "zero",
            "Rewards alone, from facts of arithmetic",
            "From a model that was shown arithmetic but no solution of the tasks, do rewards alone teach them?",
            "Shown are: V4's prompt format; expressions of given numbers, drawn at random, with their values, in which"
            " the last try is the answer (`draw`); sums of products of a digit, or of tens, by a digit (`terms`). Not"
            " shown are: a number to reach, a choice among tries, a factor of two digits such as 47, that it is 40 and"
            " 7. As the format is known, the reward is for right answers alone. The facts may have held an expression"
            " that answers a held-out question, as one of many.",
            ("facts", "more-facts", "zero"),
            tuple(
                claim
                for task, said in (("countdown-3", "countdown"), ("multiplication-2", "multiplication"))
                for mode in ("thinking", "chat")
                for claim in (
                    Claim(f"rewards teach {said}, {mode}", f"zero {mode} {task}", f"facts {mode} {task}"),
                    Claim(
                        f"rewards teach {said} better than more facts, {mode}",
                        f"zero {mode} {task}",
                        f"more-facts {mode} {task}",
                    ),
                )
            ),
        ),
        Study(
            "distil",
            "On-policy distillation from a larger teacher",
            "After the same fine-tuning, does the policy of a larger model, learnt on the student's own writing, teach"
            " more than examples or rewards for about as long?",
            "The teacher's own training is not in the time. It learnt from the same kind of examples, for longer: what"
            " distillation adds over more fine-tuning is the way, not the source, of what is taught.",
            ("sft", "more", "grpo", "teacher", "distil"),
            (
                *_both("distillation helps", "distil", "sft"),
                *_both("distillation helps more than as much more fine-tuning", "distil", "more"),
                *_both("distillation helps more than rewards", "distil", "grpo"),
            ),
        ),
        Study(
            "replay",
            "Replaying the experts and entries that a rollout chose",
            "Does it matter that updates take the experts and the compressed entries of the rollout?",
            "Two updates a step, from float32 rollouts: what flips, flips as the first update has moved the weights."
            " Rollouts in lower precision, or of another engine, differ before any update. The arms' weights have"
            " drifted apart by then: what keeping brings within one run is kl_free less kl_kept.",
            ("sft", "grpo", "routing", "free"),
            (
                Claim("keeping experts brings an update nearer to the rollout", "free kl_kept", "routing kl_kept"),
                Claim("keeping picks, too, brings it nearer still", "routing kl_kept", "grpo kl_kept"),
                *_both("rewards help more where choices are kept", "grpo", "free"),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """An arm with a seed. `key` is its run's folder: it says of which recipe, and after which other runs, it is."""

    arm: Arm
    seed: int
    recipe: Recipe  # without what it starts from
    after: "Job | None" = None
    teacher: "Job | None" = None

    @property
    def needs(self) -> list["Job"]:
        return [job for job in (self.after, self.teacher) if job]

    @property
    def key(self) -> str:
        values = [self.recipe.to_dict(), *(job.key for job in self.needs)]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"{self.arm.name}-{self.seed}-{digest[:8]}"


def job(arm: Arm, seed: int, overrides: Sequence[str]) -> Job:
    """An arm's run, and those that it needs. Raises what `Recipe` refuses of the overrides, which all arms have."""
    after, teacher = (job(ARMS[name], seed, overrides) if name else None for name in (arm.after, arm.teacher))
    values = {"name": arm.recipe, **read_recipe(arm.recipe)}
    changes = [*QUIET, *arm.set, *overrides, f"train.seed={after.recipe.train.seed + FURTHER if after else seed}"]
    return Job(arm, seed, Recipe.from_dict(apply(values, changes)), after, teacher)


def jobs(names: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = ()) -> list[Job]:
    """The runs of some studies, each once: seed by seed, and study by study, so that whole comparisons are done first.

    Raises:
        ValueError: an unknown study, or no seeds.
    """
    for name in names:
        if name not in STUDIES:
            raise ValueError(f"study {name!r}: allowed are {', '.join(STUDIES)}{did_you_mean(name, STUDIES)}")
    if not seeds:
        raise ValueError("seeds is empty: at least one is needed")
    found = [job(ARMS[arm], seed, overrides) for seed in seeds for name in names for arm in STUDIES[name].arms]
    return list({each.key: each for each in found}.values())


def listed(names: Sequence[str]) -> str:
    """Studies and claims, for a terminal."""
    lines = []
    for name in names:
        study = STUDIES[name]
        lines += [f"{name}: {study.title}", f"    arms: {', '.join(study.arms)}"]
        lines += [f"    {claim.text}: {claim.one} > {claim.other}" for claim in study.claims]
    return "\n".join(lines)
