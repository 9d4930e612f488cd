"""Paired differences against scipy's, against sums written out, and against what they promise of made-up runs."""

import math

import numpy as np
import pytest
from scipy import stats

from abyssal.train.study.paired import compare, holm

DRAW = np.random.default_rng(0)


def test_where_questions_are_alike_it_is_the_paired_t_over_seeds():
    one, other = DRAW.random((5, 1)).repeat(40, 1), DRAW.random((5, 1)).repeat(40, 1)
    found, peer = compare([one], [other]), stats.ttest_rel(one[:, 0], other[:, 0])
    low, high = peer.confidence_interval(0.95)
    assert (found.mean, found.low, found.high, found.p) == pytest.approx(
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
    variance = sum(parts)
    half = stats.t.ppf(0.975, variance**2 / sum(p * p / f for p, f in zip(parts, freedoms))) * math.sqrt(variance)
    assert min(parts) > 0
    found = compare(tasks, others)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-12)


def test_its_interval_holds_the_truth_as_often_as_it_says_where_questions_matter():
    draw, seeds, questions, missed, by_seeds = np.random.default_rng(1), 8, 48, 0, 0
    for _ in range(600):
        ability, ease = draw.normal(0, 0.2, (seeds, 1)), draw.normal(0, 1.2, questions)
        one, other = (draw.random((seeds, questions)) < 1 / (1 + np.exp(-x)) for x in (ability + ease, ability))
        found, peer = compare([one], [other]), stats.ttest_rel(one.mean(1), other.mean(1)).confidence_interval(0.95)
        missed += not found.low <= 0 <= found.high
        by_seeds += not peer.low <= 0 <= peer.high
    assert missed / 600 < 0.08 and by_seeds / 600 > 0.1, (missed, by_seeds)


def test_what_never_differs_is_certain_and_one_seed_says_nothing():
    same = np.ones((3, 4))
    assert compare([same], [same]).p == 1.0 and compare([same], [0 * same]).p == 0.0
    assert compare([same], [0 * same]).low == compare([same], [0 * same]).high == 1.0
    alone = compare([same[:1]], [0 * same[:1]])
    assert alone.mean == 1.0 and alone.low is None and alone.p is None


@pytest.mark.parametrize("other", [np.ones((3, 5)), np.ones((2, 4))])
def test_other_seeds_or_questions_are_refused(other):
    with pytest.raises(ValueError, match=r"answers of shapes \[\(3, 4\)\] and"):
        compare([np.ones((3, 4))], [other])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
