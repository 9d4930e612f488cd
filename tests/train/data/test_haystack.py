"""The tasks after RULER and MQAR: every answer against a reader who knows the rules and sees tokens only."""

from collections import Counter

import numpy as np
import pytest

from abyssal.train.data.planted import TASKS, PlantedSource, Row
from abyssal.train.data.planted.haystack import ASKED, KINDS
from abyssal.train.settings import DataConfig, PlantedConfig

OPTIONS = {"statements": 16, "keys": 40, "values": 30, "fillers": 3}
FIRST_KEY = 1 + len(KINDS) + 3
FIRST_VALUE = FIRST_KEY + 40


def rows(name: str, length: int = 150, count: int = 12, **options) -> list[Row]:
    task = TASKS[name](PlantedConfig(**{**OPTIONS, **options}))
    return [task.row(np.random.default_rng(seed), length) for seed in range(count)]


def told(row: Row, mark: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """The statements before the first question as (position, key, what stands after it), and the questions' places."""
    ids = row.ids.tolist()
    questions = [p for p, token in enumerate(ids) if token == mark]
    starts, p = [], 1
    while p < questions[0]:
        if ids[p] >= FIRST_KEY:
            starts.append((p, ids[p], ids[p + 1]))
            p += 1
        p += 1
    return starts, questions


def check(row: Row, expected: dict[int, tuple[int, int]]) -> None:
    """The row asks exactly this: answers and the places of their evidence by position."""
    asked = {int(p): (int(row.targets[p]), int(p - row.distances[p])) for p in row.asked}
    assert asked == expected
    assert ((row.targets >= 0) == (row.distances >= 0)).all() and row.ids[0] == 0


@pytest.mark.parametrize("name", ["single", "multikey"])
def test_needles(name):
    for row in rows(name):
        statements, questions = told(row, 1 + KINDS.index(name))
        at = {key: (value, p + 1) for p, key, value in statements}
        count = 16 if name == "multikey" else 1
        assert len(at) == len(statements) == count and all(value >= FIRST_VALUE for value, _ in at.values())
        assert len(questions) == (ASKED if name == "multikey" else 1)
        check(row, {q + 1: at[int(row.ids[q + 1])] for q in questions})
    assert len({int(row.targets.max()) for row in rows(name)}) > 5


def test_values_of_a_key_are_asked_for_in_their_order():
    for row in rows("multivalue"):
        statements, questions = told(row, 1 + KINDS.index("multivalue"))
        assert set(Counter(key for _, key, _ in statements).values()) == {4} and len(statements) == 16
        expected = {}
        for q in questions:
            found = [(value, p + 1) for p, key, value in statements if key == row.ids[q + 1]]
            expected |= {q + 1 + i: pair for i, pair in enumerate(found)}
            assert row.ids[q + 2 : q + 5].tolist() == [value for value, _ in found[:-1]]
        check(row, expected)
        assert len(expected) == ASKED


def test_variables_are_followed_to_their_value():
    seen = Counter()
    for row in rows("tracking", count=30):
        statements, questions = told(row, 1 + KINDS.index("tracking"))
        known: dict[int, tuple[int, int, int]] = {}
        for p, key, what in statements:  # in order: what a statement names has been assigned before
            known[key] = (what, p + 1, 0) if what >= FIRST_VALUE else (*known[what][:2], known[what][2] + 1)
        assert len(known) == 16 and Counter(hops for *_, hops in known.values()) == {0: 4, 1: 4, 2: 4, 3: 4}
        check(row, {q + 1: known[int(row.ids[q + 1])][:2] for q in questions})
        for q in questions:
            hops = known[int(row.ids[q + 1])][2]
            assert row.kinds[q + 1] == f"tracking-{hops}"
            seen[hops] += 1
    assert min(seen.values()) > 0.6 * max(seen.values())


@pytest.mark.parametrize("length", [64, 150, 777])
def test_common_words_are_counted(length):
    for row in rows("common", length):
        (mark,) = np.flatnonzero(row.ids == 1 + KINDS.index("common"))
        words = [(int(p), int(t)) for p, t in enumerate(row.ids[:mark]) if t >= FIRST_VALUE]
        counts = Counter(t for _, t in words).most_common()
        assert len(counts) == 16 and [n // counts[-1][1] for _, n in counts] == [8, 4, 2] + [1] * 13
        first = {t: p for p, t in reversed(words)}
        check(row, {int(mark) + i: (t, first[t]) for i, (t, _) in enumerate(counts[:3])})


def test_mqar():
    task = TASKS["mqar"](PlantedConfig(density=0.1, keys=40, values=30, fillers=3))
    gaps = []
    for row in (task.row(np.random.default_rng(seed), 300) for seed in range(40)):
        ids = row.ids.tolist()
        pairs = {ids[p]: (ids[p + 1], p + 1) for p in range(1, 61, 2)}
        assert len(pairs) == 30 and all(4 <= key < 44 <= value < 74 for key, (value, _) in pairs.items())
        asked = [p for p, token in enumerate(ids) if p > 60 and token >= 4]
        check(row, {p: pairs[ids[p]] for p in asked})
        assert len(asked) == 30 and len({ids[p] for p in asked}) == 30
        gaps += [(p - 61) // 2 for p in asked]
    share = np.mean(np.array(gaps) < 30)
    assert share > 0.5, "of 120 cells, most questions lie in the first 30"


def test_ruler_draws_every_kind_and_scores_it_apart():
    task = TASKS["ruler"](PlantedConfig(**OPTIONS))
    drawn = Counter()
    for row in (task.row(np.random.default_rng(seed), 150) for seed in range(60)):
        kinds = set(row.kinds[row.asked].tolist())
        name = {kind.split("-")[0] for kind in kinds}
        (mark,) = {int(token) for token in row.ids if 1 <= token <= len(KINDS)}
        assert name == {KINDS[mark - 1]} and (name != {"tracking"} or len(kinds) > 1)
        drawn[KINDS[mark - 1]] += 1
    assert set(drawn) == set(KINDS) and min(drawn.values()) > 4
    source = PlantedSource(
        TASKS["ruler"](PlantedConfig(eval_lengths=(100, 200), **OPTIONS)), DataConfig(held_out_rows=40), 0
    )
    floor = source.floor()
    assert set(floor["floor_of"]) == {
        "single",
        "multikey",
        "multivalue",
        "common",
        *(f"tracking-{i}" for i in range(4)),
    }
    assert all(set(found) == {"100", "200"} for found in floor["floor_of"].values())
    assert floor["floor_of"]["single"] == {"100": 1.0, "200": 1.0}
    for n in (100, 200):
        kinds = np.concatenate([source.scored.row(np.random.default_rng((1, i)), n).kinds for i in range(40)])
        count = Counter(kinds[kinds != ""].tolist())
        readers = source.floors().values()
        total = [
            sum(found["accuracy_of"][kind][str(n)] * count[kind] for kind in count) / count.total() for found in readers
        ]
        assert max(total) <= max(max(f["accuracy_of"][k][str(n)] for f in readers) for k in count)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multikey", {"statements": 80}, "planted.statements=80: allowed are 66 for multikey in a row of 150 tokens"),
        ("multikey", {"keys": 15}, "planted.keys=15: allowed are 16 or more for multikey"),
        ("common", {"values": 15}, "planted.statements=16: allowed for common is 4 to planted.values"),
        ("common", {"statements": 3}, "planted.statements=3: allowed for common is 4 to planted.values"),
    ],
)
def test_a_haystack_without_room_is_an_error(name, options, message):
    with pytest.raises(ValueError, match=message):
        rows(name, **options)


def test_mqar_without_room_is_an_error():
    task = TASKS["mqar"](PlantedConfig(density=0.3, keys=100))
    with pytest.raises(
        ValueError, match=r"planted.density=0.3: 30 pairs and as many questions in a row of 100 tokens; allowed are 24"
    ):
        task.row(np.random.default_rng(0), 100)
