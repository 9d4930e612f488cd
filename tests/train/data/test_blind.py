"""Blind readers against loops that follow their definitions one question at a time, and the floors of what ships."""

from collections import Counter

import numpy as np
import pytest

from abyssal.train.data.planted import TASKS
from abyssal.train.data.planted.blind import RANKS, octaves, right
from abyssal.train.data.planted.source import Labels
from abyssal.train.data.rows import IGNORED
from abyssal.train.recipe import load_recipe
from abyssal.train.settings import PlantedConfig
from abyssal.train.start import open_source

SMALL = {
    "recall": {"fill": 0.1, "nearest": 6},
    "selective_copy": {"nearest": 5},
    "induction": {"order": 2, "nearest": 3},
    "mqar": {"keys": 40, "density": 0.2},
}


def guessed(row, candidates: list[int], nearest: int) -> dict[str, list[list[int]]]:
    """The readers as `blind.py` words them; -1 where there is no candidate."""
    ids, asked = row.ids.tolist(), row.asked.tolist()
    leasts = sorted({nearest, *(2**k for k in range(len(ids).bit_length()))})
    found = {"recency": [], "unasked": [], "frequency": [], "left": [], "position": []}
    gone: set[int] = set()
    for position in asked:
        behind = {n: [p for p in candidates if position - p >= n][::-1] for n in leasts}
        found["recency"].append(
            [ids[some[r]] if r < len(some) else -1 for some in behind.values() for r in range(RANKS)]
        )
        left = [[p for p in some if p not in gone] for some in behind.values()]
        found["unasked"].append([ids[some[0]] if some else -1 for some in left])
        for reader, without in (("frequency", set()), ("left", gone)):
            counts = Counter(ids[p] for p in candidates if p < position and p not in without)
            most = max(counts.values(), default=0)
            found[reader].append([min((v for v, n in counts.items() if n == most), default=-1)])
        found["position"].append([ids[candidates[r]] if r < len(candidates) else -1 for r in range(RANKS)])
        gone.add(position - int(row.distances[position]))
    return found


def candidates_of(name: str, row, task) -> list[int]:
    """Read off the row by each task's rules: where a token stands that can be an answer."""
    ids = row.ids.tolist()
    if name == "induction":
        return list(range(1, len(ids)))
    values = [p for p, token in enumerate(ids) if token >= task.first_value]
    return [p for p in values if row.targets[p - 1] != ids[p]] if name == "selective_copy" else values


@pytest.mark.parametrize("name", SMALL)
def test_readers_guess_what_their_definitions_say(name):
    task = TASKS[name](PlantedConfig(values=12 if name != "induction" else 60, **SMALL[name]))
    for seed in range(6):
        row = task.row(np.random.default_rng(seed), 120)
        candidates = candidates_of(name, row, task)
        slow = guessed(row, candidates, task.config.nearest)
        fast = task.blind(row)
        assert fast.keys() == slow.keys()
        for reader, guesses in slow.items():
            assert fast[reader].tolist() == guesses, (reader, seed)


def test_octaves():
    assert octaves(np.array([0, 1, 2, 3, 4, 255, 256, 2**40])).tolist() == [0, 1, 2, 2, 4, 128, 256, 2**40]


def test_a_reader_is_fitted_on_other_rows_by_octave():
    task = TASKS["recall"](PlantedConfig(values=4, nearest=8, fill=0.5))
    other, scored = ([task.row(np.random.default_rng([kind, i]), 90) for i in range(30)] for kind in (1, 2))
    found = right(task, other, scored)

    def graded(rows):
        return [
            (row, i, p, int(row.targets[p]), int(row.distances[p])) for row in rows for i, p in enumerate(row.asked)
        ]

    for reader in ("recency", "unasked", "frequency", "left", "position"):
        wins: dict[int, Counter] = {}
        for row, i, _, answer, distance in graded(other):
            wins.setdefault(distance.bit_length(), Counter()).update(
                {g: int(guess == answer) for g, guess in enumerate(task.blind(row)[reader][i].tolist())}
            )
        best = {octave: max(hits, key=lambda g: (hits[g], -g)) for octave, hits in wins.items()}
        slow = [task.blind(row)[reader][i][best[d.bit_length()]] == answer for row, i, _, answer, d in graded(scored)]
        assert found[reader][1].tolist() == slow, reader
        overall = Counter()
        for hits in wins.values():
            overall.update(hits)
        one = max(overall, key=lambda g: (overall[g], -g))
        plain = [task.blind(row)[reader][i][one] == answer for row, i, _, answer, _ in graded(scored)]
        assert found[reader][0].tolist() == plain, reader
    common = Counter(answer for *_, answer, _ in graded(other))
    likeliest = min(common, key=lambda answer: (-common[answer], answer))
    assert found["likeliest"][0].tolist() == [answer == likeliest for *_, answer, _ in graded(scored)]


def test_single_answers_add_up_to_the_shares():
    labels = Labels(np.array([32, 64, 32, 64]), np.array(["a", "b", "b", "b"]), np.array([9, 9, 9, 9]), np.arange(4))
    right = np.array([True, False, False, True])
    found, shares = labels.answers(right), labels.shares(right)
    assert found == {"accuracy_at.32": "10", "accuracy_at.64": "01", "accuracy_of.a.9": "1", "accuracy_of.b.9": "001"}
    assert shares["accuracy_of"]["b"]["9"] == found["accuracy_of.b.9"].count("1") / 3
    assert shares["accuracy_at"]["32"] == 0.5


def test_every_answer_knows_its_row():
    source = open_source(load_recipe("ruler", ["data.held_out_rows=10", "planted.eval_lengths=[128, 256]"]))
    found, wanted = source.rows_of_answers(), {}
    for number, (row, length) in enumerate((row, length) for length in (128, 256) for row in range(10)):
        batch, distances = source.held_out(range(row, row + 1), length)
        for octave in octaves(distances[batch.targets != IGNORED].numpy()).tolist():
            wanted.setdefault(f"accuracy_at.{octave}", []).append(number)
    assert {name: some.tolist() for name, some in found.items() if name in wanted} == wanted
    assert sum(len(some) for name, some in found.items() if name.startswith("accuracy_of.")) == sum(
        map(len, wanted.values())
    )
    assert found["accuracy_of.single.256"].min() >= 10 > found["accuracy_of.single.128"].max()


@pytest.mark.parametrize("overrides", [[], ["data.held_out_rows=600"]], ids=["scored rows", "many like them"])
@pytest.mark.parametrize("name", ["indexer", "recall"])
def test_no_blind_reader_passes_chance_by_two_points_in_the_recipes_of_recall(name, overrides):
    recipe = load_recipe(name, overrides)
    floor = open_source(recipe).floor()
    bar = 1 / recipe.planted.values + 0.02
    assert floor["floor"] < bar and all(share < bar for share in floor["floor_at"].values()), floor
    assert list(floor["floor_at"]) == ["512", "1024", "2048"]


def test_who_counts_what_was_not_asked_for_is_the_best_reader_of_mqar():
    """Every pair is asked for once: with r pairs left, the commonest value of these is right with its share of r."""
    source = open_source(load_recipe("mqar"))
    expected = []
    for number in range(source.rows):
        row = source._row(source.scored, (1, number), source.eval_lengths[0])
        left = Counter(row.targets[row.asked].tolist())
        for answer in row.targets[row.asked].tolist():
            expected.append(max(left.values()) / left.total())
            left[answer] -= 1
    floor = source.floor()
    assert floor["floor_reader"] == "left" and floor["floor"] == pytest.approx(np.mean(expected), abs=0.01)
    assert floor["floor"] > 0.02 + max(found["accuracy"] for name, found in source.floors().items() if name != "left")


def test_the_floor_is_the_best_readers():
    source = open_source(load_recipe("indexer", ["data.held_out_rows=2", "planted.eval_length=2048"]))
    floor, readers = source.floor(), source.floors()
    assert floor["floor_reader"] == max(readers, key=lambda name: readers[name]["accuracy"])
    assert floor["floor"] == readers[floor["floor_reader"]]["accuracy"]
    for least, share in floor["floor_at"].items():
        assert share == max(found["accuracy_at"][least] for found in readers.values())


def test_answers_of_recall_say_nothing_of_the_next_one():
    """Each value stands as often as the others, and two answers are the same as often as those of any two pairs."""
    source = open_source(load_recipe("indexer", ["data.held_out_rows=300"]))
    same = []
    for number in range(source.rows):
        row = source._row(source.scored, (1, number), 4096)
        first, second = row.targets[row.asked][:2]
        same.append(first == second)
        stands = np.bincount(row.ids[row.ids >= source.scored.first_value])
        assert set(stands[stands > 0].tolist()) <= {1, 2} and len(row.asked) == 16
    assert 0 < np.mean(same) < 0.05  # 64 pairs, two of each value: 1 in 63
