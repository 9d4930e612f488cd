"""Panels of curves.png for runs on conversations: answers, accuracy, reward, distance, entropy, length, steps taken.

Fine-tuning keeps the panels of any training but the first, whose place held-out answers or their accuracy take.
"""

import math
from typing import Any

from .style import BLUE, GREEN, GREY, ORANGE, PINK, draw_line, series, smooth

Records = list[dict[str, Any]]
STEPS = 10  # of a running mean: a step asks few questions
MODES = {"thinking": (BLUE, "thinking"), "chat": (ORANGE, "answer at once")}


def accuracy(axis: Any, records: Records) -> None:
    for mode, (colour, label) in MODES.items():
        steps, right = series(records, f"accuracy_{mode}")
        if steps:
            axis.plot(
                steps, right, color=colour, marker="o", markersize=4, label=f"{label}: {right[-1]:.3f} at the end"
            )
    planted = [record for record in records if isinstance(record.get("accuracy"), float)]
    if planted:
        steps, right = series(planted, "accuracy")
        label = f"held-out answers: {right[-1]:.3f} at the end"
        axis.plot(steps, right, color=BLUE, marker="o", markersize=4, label=label)
    axis.set(title="Held-out questions answered right", ylabel="share", ylim=(0, 1))
    axis.legend(loc="upper left")


def answers(axis: Any, records: Records) -> None:
    steps, nats = series(records, "lm")
    bits = [value / math.log(2) for value in nats]
    axis.plot(steps, bits, color=BLUE, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth(bits), color=BLUE, label=f"training answers: {smooth(bits)[-1]:.3f} at the end")
    steps, held_out = series(records, "answers")
    label = f"held-out answers: {held_out[-1]:.3f} at the end"
    axis.plot(steps, held_out, color=ORANGE, marker="o", markersize=4, label=label)
    axis.set(title="What the assistant writes in conversations", ylabel="bits per token", ylim=(0, None))
    axis.legend(loc="upper right")


def reward(axis: Any, records: Records) -> None:
    for mode, (colour, label) in MODES.items():
        draw_line(axis, records, f"reward_{mode}", colour, f"reward, {label}", STEPS)
    accuracy(axis, records)
    axis.set(title="Reward of the rollouts (lines), held-out problems answered right (dots)")
    axis.legend(loc="upper left", ncols=2)


def distance(axis: Any, records: Records) -> None:
    draw_line(axis, records, "kl", PINK, "KL to the weights at the start, or to the teacher", STEPS)
    axis.set(title="Distance from the reference", ylabel="nats per token")
    axis.legend(loc="upper left")


def entropy(axis: Any, records: Records) -> None:
    draw_line(axis, records, "entropy", GREEN, "entropy", STEPS)
    axis.set(title="Entropy of the policy", ylabel="nats per token")
    axis.legend(loc="upper right")


def length(axis: Any, records: Records) -> None:
    for mode, (colour, label) in MODES.items():
        draw_line(axis, records, f"length_{mode}", colour, label, STEPS)
    axis.set(title="Length of completions", ylabel="tokens", ylim=(0, None))
    axis.legend(loc="upper right")


def limits(axis: Any, records: Records) -> None:
    draw_line(axis, records, "clip_fraction", GREY, "tokens clipped", STEPS)
    draw_line(axis, records, "off_policy", PINK, "tokens left out as off-policy", STEPS)
    draw_line(axis, records, "flipped_experts", BLUE, "experts that would be others", 1)
    draw_line(axis, records, "flipped_picks", ORANGE, "entries that would be others", 1)
    axis.set(title="What clip, mask and replay took", ylabel="share")
    if axis.lines:
        axis.legend(loc="upper left")
