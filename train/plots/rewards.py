"""Panels of curves.png for runs of the reasoning recipes: accuracy, reward, distance, entropy, length, steps taken.

Fine-tuning keeps the panels of any training but the first, whose place held-out accuracy takes.
"""

from typing import Any

from .style import BLUE, GREEN, GREY, ORANGE, PINK, draw_line, series

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
    axis.set(title="Held-out problems answered right, mean of the tasks", ylabel="share", ylim=(0, 1))
    axis.legend(loc="upper left")


def reward(axis: Any, records: Records) -> None:
    for mode, (colour, label) in MODES.items():
        draw_line(axis, records, f"reward_{mode}", colour, f"reward, {label}", STEPS)
    accuracy(axis, records)
    axis.set(title="Reward of the rollouts (lines), held-out problems answered right (dots)")
    axis.legend(loc="upper left", ncols=2)


def distance(axis: Any, records: Records) -> None:
    draw_line(axis, records, "kl", PINK, "KL to the weights at the start", STEPS)
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
    draw_line(axis, records, "off_policy", PINK, "completions left out as off-policy", STEPS)
    axis.set(title="What the clip and the mask took", ylabel="share")
    axis.legend(loc="upper left")
