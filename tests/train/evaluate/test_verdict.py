"""Verdicts against scipy's own tests, by hand, and against resampling of seeds and questions."""

import math

import numpy as np
import pytest
from scipy import stats

from abyssal.train.evaluate.verdict import FAILS, HOLDS, UNDECIDED, by_row, half_width, holm, judge

A, B = [2.41, 2.38, 2.44, 2.40, 2.37, 2.43], [2.44, 2.39, 2.46, 2.41, 2.40, 2.44]


def test_pairs_are_scipys_paired_test():
    verdict, paired = judge(A, B, "lower"), stats.ttest_rel(A, B)
    assert verdict.p == pytest.approx(paired.pvalue, rel=1e-12)
    assert verdict.interval == pytest.approx(tuple(paired.confidence_interval(0.95)), rel=1e-9)
    assert verdict.word == HOLDS and judge(A, B, "higher").word == FAILS
    assert stats.ttest_ind(A, B, equal_var=False).pvalue > 0.05, "what the seeds share is what pairing takes out"


def test_against_a_number_it_is_the_one_sample_test():
    values = [0.4, 0.5, 0.6]
    verdict, one = judge(values, [0.7] * 3, "lower"), stats.ttest_1samp(values, 0.7)
    assert verdict.p == pytest.approx(one.pvalue) and verdict.word == UNDECIDED
    assert half_width(values) == pytest.approx(4.30265 * 0.1 / math.sqrt(3), abs=1e-5) and half_width([1.0]) is None


def test_the_word_follows_the_interval_and_the_direction():
    low, high = [1.0, 1.1, 0.9], [2.0, 2.2, 1.9]
    assert judge(high, low, "higher").word == HOLDS and judge(high, low, "lower").word == FAILS
    assert judge([1.0, 2.0, 3.0], [1.5, 2.0, 2.5], "lower").word == UNDECIDED
    single = judge([1.0], [2.0], "lower")
    assert single.word == UNDECIDED and single.interval is None and single.p is None
    same = judge([0.5, 0.5], [0.2, 0.2], "higher")
    assert same.interval == pytest.approx((0.3, 0.3)) and same.word == HOLDS
    assert judge([0.5, 0.5], [0.5, 0.5], "higher").word == UNDECIDED


@pytest.mark.parametrize("arm, other, better", [([], [1.0], "lower"), ([1.0], [math.nan], "lower"), ([1.0], [1.0], "")])
def test_what_cannot_be_judged_is_refused(arm, other, better):
    with pytest.raises(ValueError, match="allowed"):
        judge(arm, other, better)
    with pytest.raises(ValueError, match="2 values against 3"):
        judge([1.0, 2.0], [1.0, 2.0, 3.0], "lower")


def test_the_questions_noise_is_that_of_resampling_them():
    """Few questions that all seeds find equally hard: seeds alone would be far too sure."""
    draw = np.random.default_rng(0)
    hard = draw.normal(size=60)
    a, b = ((draw.normal(size=(8, 60)) + shift + scale * hard > 0) for shift, scale in ((0.4, 1.5), (0.0, -1.5)))
    verdict = judge(a.mean(1).tolist(), b.mean(1).tolist(), "higher", [(a, b)])
    seeds_alone = judge(a.mean(1).tolist(), b.mean(1).tolist(), "higher")
    wide, narrow = (v.interval[1] - v.interval[0] for v in (verdict, seeds_alone))
    assert wide > 1.5 * narrow
    d = a.astype(float) - b
    means = [
        d[draw.integers(8, size=8)][:, draw.integers(60, size=60)].mean() for _ in range(4000)
    ]  # the crossed bootstrap
    assert np.std(means) == pytest.approx(wide / 2 / stats.t.ppf(0.975, 60), rel=0.15)
    assert verdict.difference == pytest.approx(d.mean())


def test_questions_that_vary_no_more_than_chance_add_nothing():
    draw = np.random.default_rng(1)
    a, b = (draw.random((6, 4000)) < p for p in (0.5, 0.45))
    with_items = judge(a.mean(1).tolist(), b.mean(1).tolist(), "higher", [(a, b)])
    alone = judge(a.mean(1).tolist(), b.mean(1).tolist(), "higher")
    ratio = (with_items.interval[1] - with_items.interval[0]) / (alone.interval[1] - alone.interval[0])
    assert 0.9 < ratio < 1.6


DRAW = np.random.default_rng(0)


def of_answers(one, other):
    """The verdict on answers of some tasks [seeds, questions] against others."""
    values = [np.mean([task.mean(1) for task in tasks], 0).tolist() for tasks in (one, other)]
    return judge(*values, "higher", list(zip(one, other)))


def test_where_questions_are_alike_it_is_the_paired_t_over_seeds():
    one, other = DRAW.random((5, 1)).repeat(40, 1), DRAW.random((5, 1)).repeat(40, 1)
    found, peer = of_answers([one], [other]), stats.ttest_rel(one[:, 0], other[:, 0])
    low, high = peer.confidence_interval(0.95)
    assert (found.difference, *found.interval, found.p) == pytest.approx(
        ((one - other).mean(), low, high, peer.pvalue), rel=1e-12
    )


def test_the_variance_is_that_of_the_sums():
    tasks = [(DRAW.random((4, questions)) < 0.5).astype(float) for questions in (6, 9)]
    others = [(DRAW.random(task.shape) < 0.3) * 1.0 for task in tasks]
    for task in tasks:
        task[:, :3] = 1  # some questions are easier for one of the two
    seeds, parts, freedoms = 4, [], []
    means = [sum((a[s] - b[s]).mean() for a, b in zip(tasks, others)) / 2 for s in range(seeds)]
    mean = sum(means) / seeds
    parts.append(sum((m - mean) ** 2 for m in means) / (seeds - 1) / seeds)
    freedoms.append(seeds - 1)
    for a, b in zip(tasks, others):
        d, (rows, columns) = a - b, a.shape
        by_question = [sum(d[s, q] for s in range(rows)) / rows for q in range(columns)]
        by_seed, whole = [d[s].sum() / columns for s in range(rows)], d.sum() / rows / columns
        spread = sum((x - whole) ** 2 for x in by_question) / (columns - 1)
        rest = sum(
            (d[s, q] - by_question[q] - by_seed[s] + whole) ** 2 for s in range(rows) for q in range(columns)
        ) / ((rows - 1) * (columns - 1))
        parts.append(max(spread - rest / rows, 0) / columns / 4)
        freedoms.append(columns - 1)
    half = math.sqrt(sum(stats.t.ppf(0.975, f) ** 2 * part for part, f in zip(parts, freedoms)))
    assert min(parts) > 0
    found = of_answers(tasks, others)
    assert (found.difference, *found.interval) == pytest.approx((mean, mean - half, mean + half), rel=1e-12)
    reach = math.sqrt(sum(stats.t.isf(found.p / 2, f) ** 2 * part for part, f in zip(parts, freedoms)))
    assert reach == pytest.approx(abs(mean), rel=1e-9), "p is that of the interval that ends at 0"


def test_what_questions_add_makes_no_verdict_surer():
    """Few seeds that agree, and questions that differ a little: degrees of freedom are not to grow by that."""
    draw = np.random.default_rng(3)
    for _ in range(60):
        ease = draw.normal(0, 0.5, 200)
        one = draw.normal(0.2, 0.3, (3, 1)) + ease + draw.normal(0, 0.3, (3, 200))
        found, alone = of_answers([one], [one * 0]), judge(one.mean(1).tolist(), [0.0] * 3, "higher")
        assert found.p >= alone.p and found.interval[1] - found.interval[0] > alone.interval[1] - alone.interval[0]


def test_with_few_seeds_a_small_p_is_no_commoner_than_it_says():
    """Nothing differs; the questions' variance is a fifth of that of the seeds. Holm asks for p far below 5 %."""
    draw, runs, seeds, questions = np.random.default_rng(4), 600, 3, 400
    ps = []
    for _ in range(runs):
        d = draw.normal(size=(seeds, 1)) + draw.normal(0, math.sqrt(0.2 * questions / seeds), questions)
        ps.append(judge(d.mean(1).tolist(), [0.0] * seeds, "higher", [(d, d * 0)]).p)
    assert sum(p < 0.05 for p in ps) / runs < 0.06 and sum(p < 0.005 for p in ps) / runs < 0.01


def test_the_same_small_difference_in_all_seeds_is_not_certain():
    """One answer more of fifty in each of three seeds: the chance of single answers would do that often."""
    one, other = np.zeros((3, 50)), np.zeros((3, 50))
    one[[0, 1, 2], [3, 17, 40]] = 1
    found = of_answers([one], [other])
    error = math.sqrt((1 / 50) * (49 / 50) / 3 / 50)
    assert found.word == UNDECIDED and found.p == pytest.approx(2 * stats.t.sf(0.02 / error, 2), rel=0.05)


def test_its_interval_holds_the_truth_as_often_as_it_says_where_questions_matter():
    draw, seeds, questions, missed, by_seeds = np.random.default_rng(1), 8, 48, 0, 0
    for _ in range(600):
        ability, ease = draw.normal(0, 0.2, (seeds, 1)), draw.normal(0, 1.2, questions)
        one, other = (draw.random((seeds, questions)) < 1 / (1 + np.exp(-x)) for x in (ability + ease, ability))
        found, peer = of_answers([one], [other]), stats.ttest_rel(one.mean(1), other.mean(1)).confidence_interval(0.95)
        missed += not found.interval[0] <= 0 <= found.interval[1]
        by_seeds += not peer.low <= 0 <= peer.high
    assert missed / 600 < 0.08 and by_seeds / 600 > 0.1, (missed, by_seeds)


def test_questions_of_a_row_are_no_evidence_of_their_own():
    """Nothing differs but rows, which suit one of the two or the other: eight questions of a row are nearly one."""
    draw, seeds, rows, each = np.random.default_rng(5), 6, 24, 8
    of_row, missed = np.repeat(np.arange(rows), each), {"questions": 0, "rows": 0}
    for _ in range(600):
        suits = draw.normal(0, 1.5, rows)[of_row]
        one, other = (draw.random((seeds, rows * each)) < 1 / (1 + np.exp(-sign * suits)) for sign in (1, -1))
        for name, items in (("questions", (one, other)), ("rows", (by_row(one, of_row), by_row(other, of_row)))):
            low, high = judge(one.mean(1).tolist(), other.mean(1).tolist(), "higher", [items]).interval
            missed[name] += not low <= 0 <= high
    assert missed["rows"] / 600 < 0.07 and missed["questions"] / 600 > 0.2, missed


def test_rows_of_other_lengths_are_a_ratio_of_sums():
    answers, rows = (DRAW.random((3, 7)) < 0.5).astype(float), np.array([4, 9, 4, 4, 2, 9, 4])
    found = by_row(answers, rows)
    assert found.shape == (3, 3) and found.mean(1) == pytest.approx(answers.mean(1))
    one = answers[1]
    for column, row in enumerate((2, 4, 9)):
        excess = sum(x - one.sum() / 7 for x, r in zip(one, rows) if r == row)
        assert found[1, column] == pytest.approx(one.sum() / 7 + excess * 3 / 7)
    assert by_row(answers, np.zeros(7)) == pytest.approx(answers.mean(1, keepdims=True))
    assert by_row(answers, np.arange(7)) == pytest.approx(answers)
    with pytest.raises(ValueError, match="7 answers: allowed are 6"):
        by_row(answers, rows[:6])


@pytest.mark.parametrize("other", [np.ones((3, 5)), np.ones((2, 4))])
def test_other_seeds_or_questions_are_refused(other):
    with pytest.raises(ValueError, match=r"3 values against 2|answers of shapes .*3, 4.*3, 5"):
        judge([1.0] * 3, [1.0] * len(other), "higher", [(np.ones((3, 4)), other)])


def test_holm_by_hand():
    """p 0.01, 0.04, 0.03 of three: 3 · 0.01, then 2 · 0.03, then 0.04 raised to that."""
    claims = [{"word": HOLDS, "difference": 1.0, "interval": [0, 2], "p": p} for p in (0.01, 0.04, 0.03, None)]
    found = holm(claims, ["higher", "higher", "lower", "higher"])
    assert [v["p"] for v in found] == pytest.approx([0.03, 0.06, 0.06, None])
    assert [v["word"] for v in found] == [HOLDS, UNDECIDED, UNDECIDED, HOLDS]
    assert holm([claims[0]], ["lower"])[0]["word"] == FAILS and claims[1]["word"] == HOLDS
