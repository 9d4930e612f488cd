"""Facts and tasks of arithmetic against Python's, and that facts hold no solution of a task."""

import itertools
import random
import re

import pytest

from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.reason import arithmetic
from abyssal.train.reason.conversations import prompt
from abyssal.train.reason.exam import questions
from abyssal.train.reason.tasks import problem

TOKENIZER = ByteTokenizer()


def many(task, count=400):
    return [problem((task,), 3, 0, n) for n in range(count)]


def left_to_right(expression: str) -> int:
    first, rest = re.fullmatch(r"(-?\d+)(.*)", expression).groups()
    for operation, number in re.findall(r"([-+*])(\d+)", rest):
        first = eval(f"({first}){operation}{number}")
    return int(first)


def test_lines_of_working_are_true():
    lines = [
        line
        for task in ("draw-3", "countdown-4", "terms-3", "multiplication-3")
        for p in many(task)
        for line in p.working.split(";")
    ]
    for line in lines:
        steps = line.split("=")
        for before, after in itertools.pairwise(steps):
            assert left_to_right(before) == int(re.match(r"-?\d+", after)[0]), line
    assert any("*" in line for line in lines) and any("=-" in line for line in lines)


@pytest.mark.parametrize("task", ["draw-3", "countdown-3"])
def test_the_last_try_is_the_answer_and_uses_the_numbers(task):
    counts = set()
    for found in many(task):
        tries = found.working.split(";")
        counts.add(len(tries))
        written = re.sub(r"=-?\d+", "", tries[-1])
        assert written == found.answer and sorted(written[::2]) == sorted(found.question.split("=")[0].split())
        assert found.accepts(found.answer)
        if "=" in found.question:
            assert left_to_right(found.answer) == int(found.question.split("=")[1]) in range(1, 100)
    assert counts == ({1} if task == "countdown-3" else set(range(1, 7)))


def test_products_and_their_sum():
    for found in many("multiplication-3"):
        a, b = found.question.split("*")
        assert "0" not in a and len(a) == 3 and found.answer == str(int(a) * int(b)) and int(b) in range(2, 10)
        assert found.working.startswith(f"{a[0]}00*{b}=") and found.working.endswith(f"={found.answer}")
    for found in many("terms-2"):
        assert found.answer == str(eval(found.question.replace(" ", "+")))


def test_facts_hold_no_question_of_a_task_and_no_product_of_two_digits_by_one():
    """What `reason-zero` asks for is not in what `reason-facts` shows: neither a number to reach, nor 47*6."""
    facts = many("draw-3", 2000) + many("terms-2", 2000)
    assert not any("=" in found.question for found in facts)
    factors = set(re.findall(r"(-?\d+)\*", " ".join(f"{found.question} {found.working}" for found in facts)))
    assert factors == {str(n) for n in range(10)} | {str(n) for n in range(10, 100, 10)}


def test_any_expression_that_gets_there_is_right():
    assert all(arithmetic.reaches("3 5 9=24", text) for text in ("3*5+9", "5*3+9"))
    wrong = ("3*5+8", "9+3*5", "3*5", "3*5+9+9", "3*5+", "24", "", "3*5/9", "3**5+9", "15+9", " 3*5+9", "(3*5)+9")
    assert not any(arithmetic.reaches("3 5 9=24", text) for text in wrong)
    assert arithmetic.reaches("3 5 9", "9-5*3") and not arithmetic.reaches("3 5 9", "9-5*5")


def test_luck_is_the_share_of_all_expressions():
    by_hand = [
        left_to_right(f"{a}{x}{b}{y}{c}") == 24
        for a, b, c in itertools.permutations("359") for x, y in itertools.product("+-*", repeat=2)
    ]  # fmt: skip
    assert arithmetic.luck("3 5 9=24") == sum(by_hand) / len(by_hand) > 0


def test_examinations_ask_no_question_twice():
    asked = questions("countdown-3", 100)
    assert len({p.identity for p in asked}) == len(asked) == 100 and all(p.held_out for p in asked)
    assert 60 < len(questions("multiplication-2", 256)) < 100  # 648 questions, of which one in eight is held out
    assert prompt(asked[0], "chat", TOKENIZER) != prompt(asked[1], "chat", TOKENIZER)


def test_draws_go_on_by_chance():
    lengths = [len(arithmetic.draw(3, random.Random(n))[1].split(";")) for n in range(3000)]
    assert sum(n == 1 for n in lengths) / 3000 == pytest.approx(1 / 3, abs=0.03)
