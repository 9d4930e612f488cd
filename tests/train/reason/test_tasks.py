"""Generated problems against plain arithmetic; conversations in V4's format; packed rows; the reward."""

import re

import pytest
import torch

from abyssal.model.text.chat import parse_message_from_completion_text
from abyssal.train.data.packed import pack
from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.reason.conversations import conversation, prompt
from abyssal.train.reason.reward import judge
from abyssal.train.reason.source import ReasonSource, packed_row
from abyssal.train.reason.tasks import check_task, problem
from abyssal.train.recipe import load_recipe

TOKENIZER = ByteTokenizer()
TASKS = ("addition-1", "addition-3", "sorting-1", "sorting-7")


def many(task, count=300, **where):
    return [problem((task,), where.pop("seed", 3), 0, n, **where) for n in range(count)]


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_sums_are_right_and_their_columns_too(digits):
    carries = 0
    for found in many(f"addition-{digits}"):
        a, b = found.question.split("+")
        assert len(a) == len(b) == digits and (digits == 1 or "0" not in (a[0], b[0]))
        assert found.answer == str(int(a) + int(b))
        columns, carry, written = found.working.split(";"), 0, ""
        assert len(columns) == digits
        for place, column in enumerate(columns):
            terms, total = column.split("=")
            assert terms.split("+") == [a[-1 - place], b[-1 - place]] + ["1"] * carry
            assert int(total) == sum(map(int, terms.split("+")))
            written, carry = str(int(total) % 10) + written, int(total) // 10
            carries += carry
        assert ("1" if carry else "") + written == found.answer
    assert carries


@pytest.mark.parametrize("letters", [1, 6])
def test_lists_are_sorted_after_each_letter(letters):
    repeated = False
    for found in many(f"sorting-{letters}"):
        word = found.question.removeprefix("sort ")
        assert re.fullmatch(f"[a-z]{{{letters}}}", word)
        assert found.working.split(",") == ["".join(sorted(word[:n])) for n in range(1, letters + 1)]
        assert found.answer == "".join(sorted(word))
        repeated |= len(set(word)) < letters
    assert repeated == (letters > 1)


def test_a_problem_is_a_function_of_its_numbers_and_each_matters():
    at = [problem(TASKS, *where) for where in ((1, 0, 5), (1, 0, 5), (2, 0, 5), (1, 1, 5), (1, 0, 9))]
    assert at[0] == at[1]
    assert len({found.question for found in at}) == 4
    assert [problem(TASKS, 0, 0, n).task for n in range(5)] == [*TASKS, TASKS[0]]


def test_held_out_questions_are_never_trained_on():
    trained = {(p.task, p.identity) for task in TASKS[1:2] for p in many(task, 2000)}
    asked = many(TASKS[1], 500, held_out=True, seed=9)
    assert not trained & {(p.task, p.identity) for p in asked}
    assert all(p.held_out for p in asked) and not any(p.held_out for p in many(TASKS[1]))
    flipped = {f"{b}+{a}" for a, b in (p.question.split("+") for p in asked)}
    assert not flipped & {p.question for p in many(TASKS[1], 2000)}


def test_about_one_question_in_eight_is_held_out():
    import random

    from abyssal.train.reason.tasks import KINDS, Problem

    draw = random.Random(0)
    held = [Problem("", *KINDS["sorting"](6, draw)).held_out for _ in range(4000)]
    assert 0.10 < sum(held) / len(held) < 0.15


@pytest.mark.parametrize("name", ["addition", "addition-", "addition-0", "addition-x", "division-2", ""])
def test_an_unknown_task_is_named(name):
    with pytest.raises(ValueError, match=re.escape(f"task {name!r}: allowed are addition-N and sorting-N")):
        check_task(name)


def test_conversations_are_in_the_format_of_v4():
    found = problem(("addition-2",), 0, 0, 0)
    for mode, opening, completion in (
        ("thinking", "<think>", f"{found.working}</think>{found.answer}"),
        ("chat", "</think>", found.answer),
    ):
        talk = conversation(found, mode, TOKENIZER)
        text = TOKENIZER.decode(talk.prompt, special=True)
        assert text == f"<｜begin▁of▁sentence｜><｜User｜>{found.question}<｜Assistant｜>{opening}"
        assert prompt(found, mode, TOKENIZER) == talk.prompt
        assert talk.prompt[0] == TOKENIZER.bos and talk.prompt[-1] == TOKENIZER.special[opening]
        assert talk.completion[-1] == TOKENIZER.eos
        assert TOKENIZER.decode(talk.completion, special=True) == completion + "<｜end▁of▁sentence｜>"
        message = parse_message_from_completion_text(completion + "<｜end▁of▁sentence｜>", mode)
        assert message["content"] == found.answer


def test_packed_rows_learn_completions_only_and_hold_each_problem_once_per_mode():
    ids, targets, documents = packed_row(("addition-2", "sorting-4"), ("thinking", "chat"), 1, 0, 7, 200, TOKENIZER)
    assert len(ids) == len(targets) == len(documents) == 200
    asked = []
    for number in range(max(documents) + 1):
        where = [t for t, document in enumerate(documents) if document == number]
        assert where == list(range(where[0], where[-1] + 1)) and ids[where[0]] == TOKENIZER.bos
        row, goal = [ids[t] for t in where], [targets[t] for t in where]
        opening = max(row.index(TOKENIZER.special["<｜Assistant｜>"]) + 1, 0)
        assert goal[:opening] == [-100] * opening and goal[opening:-1] == row[opening + 1 :] and goal[-1] == -100
        assert row[-1] == TOKENIZER.eos
        question = TOKENIZER.decode(row[2 : opening - 1])
        asked.append((question, TOKENIZER.decode(row[opening : opening + 1], special=True)))
    assert [mode for _, mode in asked] == ["<think>", "</think>"] * (len(asked) // 2)
    questions = [question for question, _ in asked]
    assert questions[::2] == questions[1::2] and len(set(questions)) == len(asked) // 2 >= 2
    used = sum(document >= 0 for document in documents)
    assert ids[used:] == [TOKENIZER.pad] * (200 - used) and targets[used:] == [-100] * (200 - used)


def test_a_row_takes_problems_until_the_next_does_not_fit():
    whole = packed_row(("sorting-4",), ("chat",), 1, 0, 7, 200, TOKENIZER)
    used = sum(document >= 0 for document in whole[2])
    exact = packed_row(("sorting-4",), ("chat",), 1, 0, 7, used, TOKENIZER)
    assert [column[:used] for column in whole] == list(exact)
    shorter = packed_row(("sorting-4",), ("chat",), 1, 0, 7, used - 1, TOKENIZER)
    assert max(shorter[2]) == max(exact[2]) - 1
    with pytest.raises(ValueError, match=r"data\.sequence_length=9: a row must take one problem"):
        packed_row(("sorting-4",), ("chat",), 1, 0, 7, 9, TOKENIZER)
    with pytest.raises(ValueError, match="do not fit into a row of 5"):
        pack([conversation(problem(("sorting-4",), 0, 0, 0), "chat", TOKENIZER).talk], 5, 0)


def source(*overrides):
    return ReasonSource(load_recipe("reason-sft", overrides))


def test_source_rows_depend_on_seed_stage_and_number_alone():
    data = source()
    batch = data.batch(range(3, 6), 128)
    again = source().batch(range(5, 6), 128)
    assert batch.ids.shape == batch.targets.shape == batch.documents.shape == (3, 128)
    assert torch.equal(batch.ids[2:], again.ids) and torch.equal(batch.targets[2:], again.targets)
    others = data.batch(range(5, 6), 128, stage=1), source("train.seed=1").batch(range(5, 6), 128)
    assert not any(torch.equal(again.ids, other.ids) for other in others)
    assert data.vocabulary == 288 and "addition-2" in data.describe() and "addition-2" in data.digest


def test_source_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="task 'adition-2'"):
        source("reason.tasks=['adition-2']")


def test_only_the_exact_answer_in_the_strict_format_is_rewarded():
    found = problem(("addition-3",), 0, 0, 0)

    def verdict(text, mode="thinking", end="<｜end▁of▁sentence｜>"):
        return judge(found, mode, TOKENIZER.encode(text + end, special=True), TOKENIZER)

    for right in (verdict(f"{found.working}</think>{found.answer}"), verdict(f"no</think>{found.answer}")):
        assert right.well_formed and right.right and right.reward == 1.0
    assert verdict(found.answer, "chat").reward == 1.0
    for wrong in (f" {found.answer}", f"{found.answer} ", found.answer[:-1], found.answer + "0", ""):
        missed = verdict(f"{found.working}</think>{wrong}")
        assert missed.well_formed and not missed.right and missed.reward == 0.0
    call = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    for text, mode, end in (
        (found.answer, "thinking", "<｜end▁of▁sentence｜>"),  # thinking never closed
        (f"{found.working}</think>{found.answer}", "chat", "<｜end▁of▁sentence｜>"),  # thought where none was asked for
        (f"{found.working}</think>{found.answer}", "thinking", ""),  # cut off
        (f"</think>{found.answer}</think>{found.answer}", "thinking", "<｜end▁of▁sentence｜>"),
        (f"</think>{found.answer}{call}", "thinking", "<｜end▁of▁sentence｜>"),
    ):
        bad = verdict(text, mode, end)
        assert not bad.well_formed and not bad.right and bad.reward == 0.0
    assert judge(found, "chat", [255, 254, TOKENIZER.eos], TOKENIZER).reward == 0.0
