"""Generated problems whose answer can be checked, each with the working that leads to it.

addition-N   347+586         7+6=13;4+8+1=13;3+5+1=9       933       two numbers of N digits, column by column
sorting-N    sort dbca       d,bd,bcd,abcd                 abcd      N letters, insertion by insertion

A problem is a pure function of (seed, stage, number). One question in eight is held out: whether a question is depends
on itself alone, never on a seed, so that no training run has seen a question of any examination. Sums count as the same
question in both orders; the same letters in two orders are two questions.
"""

import hashlib
import random
import string
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import arithmetic

HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Problem:
    """`task` is the name with its difficulty; `identity` is equal for questions that count as the same."""

    task: str
    question: str
    working: str
    answer: str
    identity: str

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.identity.encode()).digest()[0] % HELD_OUT_ONE_IN == 0

    def accepts(self, answer: str) -> bool:
        """Whether it is right, to the letter."""
        return arithmetic.reaches(self.question, answer) if self.task.startswith(EXPRESSIONS) else answer == self.answer


def _addition(digits: int, draw: random.Random) -> tuple[str, str, str, str]:
    """Columns from the units up; a carry of 1 is written where there is one."""
    a, b = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    columns, carry = [], 0
    for x, y in zip(str(a)[::-1], str(b)[::-1]):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{a}+{b}", ";".join(columns), str(a + b), f"{min(a, b)}+{max(a, b)}"


def _sorting(letters: int, draw: random.Random) -> tuple[str, str, str, str]:
    """The sorted list after each letter."""
    unsorted = "".join(draw.choices(string.ascii_lowercase, k=letters))
    done: list[str] = []
    lists = []
    for letter in unsorted:
        insort(done, letter)
        lists.append("".join(done))
    return f"sort {unsorted}", ",".join(lists), lists[-1], unsorted


KINDS: dict[str, Callable[[int, random.Random], tuple[str, str, str, str]]] = {
    "addition": _addition,
    "sorting": _sorting,
    "draw": arithmetic.draw,
    "countdown": arithmetic.countdown,
    "terms": arithmetic.terms,
    "multiplication": arithmetic.multiplication,
}
EXPRESSIONS = ("draw", "countdown")  # whose answers are expressions, of which more than one is right


def check_task(name: str) -> tuple[str, int]:
    """The kind and the difficulty that a task's name means. Raises ValueError for another name."""
    kind, dash, size = name.partition("-")
    if kind not in KINDS or not dash or not size.isdecimal() or int(size) < 1:
        known = " and ".join(f"{known}-N" for known in KINDS)
        raise ValueError(f"task {name!r}: allowed are {known} with N from 1, for example addition-3")
    return kind, int(size)


def problem(tasks: Sequence[str], seed: int, stage: int, number: int, held_out: bool = False) -> Problem:
    """Problem `number` of a stage: tasks take turns, and questions on the other side of the split are drawn again."""
    task = tasks[number % len(tasks)]
    kind, size = check_task(task)
    draw = random.Random(f"problem {seed} {stage} {number} {held_out}")
    while True:
        question, working, answer, identity = KINDS[kind](size, draw)
        found = Problem(task, question, working, answer, identity)
        if found.held_out == held_out:
            return found
