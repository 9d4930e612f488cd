"""Problems made of one-digit numbers: facts of arithmetic to start from, and what rewards alone are to make of them.

    draw-N             3 5 9        5*3=15+9=24;9-5=4*3=12        9-5*3      N numbers, any expression of them
    countdown-N        3 5 9=24     5*3=15+9=24                   5*3+9      the same, with that value
    terms-N            40*6 7*2     40*6=240;7*2=14;240+14=254    254        the sum of up to N products
    multiplication-N   47*6         40*6=240;7*6=42;240+42=282    282        N digits by one digit

Expressions are worked out from left to right, as on a pocket calculator. Draws and terms are facts: they show how tries
and sums of products are written and what their values are, but no number to reach, and no factor of two digits that are
not a multiple of ten.
"""

import itertools
import operator
import random
from collections.abc import Sequence

Made = tuple[str, str, str, str]  # question, working, answer, identity
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
GOES_ON = 2 / 3  # chance that a draw has another try
MOST_TRIES = 6
LARGEST = 99  # number to reach; the least is 1


def draw(size: int, chance: random.Random) -> Made:
    """Some tries, of which the last is the answer."""
    numbers = _numbers(size, chance)
    tries = [_expression(numbers, chance)]
    while len(tries) < MOST_TRIES and chance.random() < GOES_ON:
        tries.append(_expression(numbers, chance))
    listed = " ".join(map(str, numbers))
    return listed, ";".join(map(chain, tries)), tries[-1], " ".join(map(str, sorted(numbers)))


def countdown(size: int, chance: random.Random) -> Made:
    """A number that a random expression has, so that there is a way."""
    while True:
        numbers = _numbers(size, chance)
        found = _expression(numbers, chance)
        if 1 <= (target := value(found)) <= LARGEST:
            break
    listed, sorted_ = (" ".join(map(str, x)) for x in (numbers, sorted(numbers)))
    return f"{listed}={target}", chain(found), found, f"{sorted_}={target}"


def terms(size: int, chance: random.Random) -> Made:
    """Products of a digit, or of tens, by a digit: up to `size`."""
    count = chance.randint(1, size)
    parts = [(chance.randint(1, 9) * chance.choice((1, 10)), chance.randint(2, 9)) for _ in range(count)]
    question = " ".join(f"{a}*{b}" for a, b in parts)
    return question, *_sum_of_products(parts), question


def multiplication(digits: int, chance: random.Random) -> Made:
    """Digit by digit, from the largest on; no digit is 0."""
    a, b = _numbers(digits, chance), chance.randint(2, 9)
    question = f"{''.join(map(str, a))}*{b}"
    parts = [(digit * 10 ** (digits - 1 - place), b) for place, digit in enumerate(a)]
    return question, *_sum_of_products(parts), question


def reaches(question: str, answer: str) -> bool:
    """Whether an expression uses each of the question's numbers once and has its value, if it asks for one."""
    listed, _, target = question.partition("=")
    numbers, operations = answer[::2], answer[1::2]
    if len(answer) % 2 == 0 or not set(operations) <= OPERATIONS.keys() or sorted(numbers) != sorted(listed.split()):
        return False
    return not target or value(answer) == int(target)


def luck(question: str) -> float:
    """Share of all expressions of the question's numbers that are right: what who cannot reckon would get."""
    numbers = question.partition("=")[0].split()
    every = [
        "".join(itertools.chain(*itertools.zip_longest(order, operations, fillvalue="")))
        for order in itertools.permutations(numbers)
        for operations in itertools.product(OPERATIONS, repeat=len(numbers) - 1)
    ]
    return sum(reaches(question, expression) for expression in every) / len(every)


def value(expression: str) -> int:
    """From left to right; numbers have one digit."""
    found = int(expression[0])
    for operation, number in zip(expression[1::2], expression[2::2]):
        found = OPERATIONS[operation](found, int(number))
    return found


def chain(expression: str) -> str:
    """With the value so far after each operation: 5*3+9 is 5*3=15+9=24."""
    steps = range(3, len(expression) + 1, 2)
    return expression[0] + "".join(f"{expression[n - 2 : n]}={value(expression[:n])}" for n in steps)


def _numbers(size: int, chance: random.Random) -> list[int]:
    return [chance.randint(1, 9) for _ in range(size)]


def _expression(numbers: Sequence[int], chance: random.Random) -> str:
    """Multiplied is what has one digit so far, so that no product of two digits by one is shown."""
    first, *others = chance.sample(numbers, len(numbers))
    found = str(first)
    for number in others:
        found += chance.choice("+-*" if value(found) in range(10) else "+-") + str(number)
    return found


def _sum_of_products(parts: Sequence[tuple[int, int]]) -> tuple[str, str]:
    """Working and answer: every product, then the running sum."""
    products = [a * b for a, b in parts]
    sums = list(itertools.accumulate(products))
    lines = [f"{a}*{b}={product}" for (a, b), product in zip(parts, products)]
    lines += [f"{before}+{product}={after}" for before, product, after in zip(sums, products[1:], sums[1:])]
    return ";".join(lines), str(sums[-1])
