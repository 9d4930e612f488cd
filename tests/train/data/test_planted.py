"""Planted tasks: every answer against a reader of the row that knows the rules and nothing of the generator."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from abyssal.model import Transformer
from abyssal.train.data.planted import TASKS, Row
from abyssal.train.recipe import Recipe, load_recipe
from abyssal.train.settings import PlantedConfig
from abyssal.train.start import open_source, train

IGNORED, BOS, MARK = -100, 0, 1


def a_recipe(name: str, *overrides: str) -> Recipe:
    """Nano on a planted task; vocabulary, length and rows as small as they go."""
    fixed = ["model.vocab_size=260", "data.sequence_length=64", "data.batch_size=3", "data.held_out_rows=4"]
    return load_recipe("nano", [f"data.source=planted:{name}", *fixed, *overrides])


def rows(name: str, length: int, count: int = 20, **options) -> list[Row]:
    task = TASKS[name](PlantedConfig(**options))
    return [task.row(np.random.default_rng(seed), length) for seed in range(count)]


def answers_of(row: Row) -> list[tuple[int, int, int]]:
    """(position, answer, distance); targets and distances mark the same positions."""
    assert ((row.targets != IGNORED) == (row.distances != -1)).all()
    return [(p, int(row.targets[p]), int(row.distances[p])) for p in np.flatnonzero(row.targets != IGNORED).tolist()]


@pytest.mark.parametrize(
    ("length", "nearest", "farthest", "fill", "keys", "octaves"),
    [
        (64, 8, 0, 0.5, 40, {8, 16, 32}),
        (64, 16, 40, 0.4, 40, {16}),
        (1024, 33, 0, 1.0, 400, {64, 128, 256, 512}),
        (1025, 100, 511, 0.6, 24, {128, 256}),
    ],
)
def test_recall(length, nearest, farthest, fill, keys, octaves):
    values, fillers, questions = 30, 3, 7
    first_key, first_value = 2 + fillers, 2 + fillers + keys
    options = {"nearest": nearest, "farthest": farthest, "keys": keys, "values": values, "fillers": fillers}
    found, seen = rows("recall", length, 40, questions=questions, fill=fill, **options), set()
    for row in found:
        ids, asked = row.ids.tolist(), answers_of(row)
        octave = 1 << (asked[0][2].bit_length() - 1)
        seen.add(octave)
        starts = [p for p, token in enumerate(ids) if first_key <= token < first_value and ids[p - 1] != MARK]
        room = octave // 2 - octave // 4 + 1  # cells of the octave, but for those that the last questions leave out
        assert len(starts) in {min(keys, round(fill * cells)) for cells in (room - 1, room)}
        assert len(asked) == ids.count(MARK) == min(len(starts), questions, octave // 4)
        assert len({ids[p] for p in starts}) == len(starts), "a key has one pair"
        assert len({p % 2 for p in starts} | {(p - 1) % 2 for p, _, _ in asked}) == 1, "one grid of cells"
        each = Counter(ids[p + 1] for p in starts)
        assert max(each.values()) - min(each[v] for v in range(first_value, first_value + values)) <= 1
        assert sum(token >= first_value for token in ids) == len(starts)
        assert len({ids[p] for p, _, _ in asked}) == len(asked), "a key is asked for once"
        for position, answer, distance in asked:
            pair = next(p for p in starts if ids[p] == ids[position])
            assert first_value <= answer == ids[pair + 1] < first_value + values
            assert distance == position - (pair + 1) and ids[position - 1] == MARK
            assert all(octave <= position - (p + 1) < 2 * octave for p in starts), "every pair could be the answer"
            assert nearest <= octave and (not farthest or distance <= farthest)
        assert max(ids) < first_value + values and ids[0] == BOS and ids.count(BOS) == 1
    assert seen == octaves and len({tuple(row.ids.tolist()) for row in found}) == len(found)
    assert len({row.ids.tolist().index(MARK) % 2 for row in found}) == 2
    used = {token for row in found for token in row.ids.tolist() if token >= first_value}
    assert len(used) > values // 2, "few pairs have any of the values"


def test_distances_are_octaves_equally_often_and_uniform_within():
    task = TASKS["induction"](PlantedConfig(nearest=48))
    far = task.distances(np.random.default_rng(0), 1023, 40_000)
    assert far.min() == 48 and far.max() == 1023
    halves = {
        (n, half): ((far >= n + half) & (far < n + half + n // 2)).mean()
        for n in (64, 128, 512)
        for half in (0, n // 2)
    }
    whole = 0.5 / np.log2(1024 / 48)
    assert all(share == pytest.approx(whole, rel=0.05) for share in halves.values()), halves
    assert (far < 64).mean() == pytest.approx(np.log2(64 / 48) / np.log2(1024 / 48), rel=0.05)


@pytest.mark.parametrize(("nearest", "farthest", "density"), [(1, 0, 0.06), (20, 60, 0.06), (30, 0, 0.25), (4, 7, 0.5)])
def test_selective_copy(nearest, farthest, density):
    fillers, values = 2, 20
    options = {"nearest": nearest, "farthest": farthest, "density": density, "values": values, "fillers": fillers}
    for row in rows("selective_copy", 300, **options):
        ids, asked = row.ids.tolist(), {p: (a, d) for p, a, d in answers_of(row)}
        items: list[int] = []
        position, answered = 1, 0
        while position < len(ids):
            if ids[position] >= 2 + fillers:
                items.append(position)
            if ids[position] == MARK:
                for i, item in enumerate(items):
                    answer, distance = asked[position + i]
                    assert answer == ids[item] and distance == position + i - item
                    assert nearest <= distance <= (farthest or len(ids))
                    assert i == 0 or ids[position + i] == ids[items[i - 1]]
                answered += len(items)
                position, items = position + len(items) - 1, []
            position += 1
        assert answered == len(asked) > 0 and not items
        assert max(ids) < 2 + fillers + values and ids[0] == BOS


def test_selective_copy_has_episodes_up_to_the_end():
    ends = [int(np.flatnonzero(row.targets != IGNORED)[-1]) for row in rows("selective_copy", 400, nearest=8)]
    assert min(ends) > 400 - 8 - 4
    assert any(row.ids.tolist().count(MARK) > 3 for row in rows("selective_copy", 400, nearest=8))


@pytest.mark.parametrize(
    ("order", "nearest", "farthest", "values", "length", "density"),
    [
        *((1, 1, 0, 400, 256, 0.0625), (2, 1, 0, 60, 256, 0.0625), (2, 40, 90, 60, 256, 0.0625)),
        *((3, 10, 0, 60, 256, 0.0625), (3, 1, 3, 4, 40, 0.07)),  # the last: copies that almost meet what they copy
    ],
)
def test_induction(order, nearest, farthest, values, length, density):
    options = {"order": order, "nearest": nearest, "farthest": farthest, "values": values, "density": density}
    for row in rows("induction", length, **options):
        ids = row.ids.tolist()
        assert len(answers_of(row)) == round(density * length)
        for position, answer, distance in answers_of(row):
            context = ids[position - order + 1 : position + 1]
            ends = [end for end in range(order, position) if ids[end - order + 1 : end + 1] == context]
            assert len(ends) == 1 and ids[ends[0] + 1] == answer
            assert distance == position - (ends[0] + 1)
            assert nearest <= distance <= (farthest or length)
        assert min(ids[1:]) >= 1 and max(ids) <= values and ids[0] == BOS


def test_answers_that_chance_repeats_are_an_error():
    with pytest.raises(ValueError, match=r"planted.density=0.2: \d+ of 51 answers stand alone .* planted.values \(8\)"):
        rows("induction", 256, 1, order=1, values=8, density=0.2)


def test_facts_without_room_are_an_error():
    with pytest.raises(ValueError, match=r"planted.density=0.5: 50 answers; allowed are 33 in a row of 100 tokens"):
        rows("ngram_facts", 100, 1, density=0.5)


def test_ngram_facts_are_one_table_for_all_rows():
    options = {"keys": 8, "values": 50, "fillers": 2, "order": 2, "facts": 40, "density": 0.2}
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for row in rows("ngram_facts", 400, 30, **options):
        ids = row.ids.tolist()
        assert len(answers_of(row)) == 80
        for position, answer, rank in answers_of(row):
            gram = (ids[position - 1], ids[position])
            assert known.setdefault(gram, (answer, rank)) == (answer, rank)
            assert all(3 <= token < 11 for token in gram) and 11 <= answer < 61
            assert position + 1 == len(ids) or 1 <= ids[position + 1] < 3
        assert max(ids) < 11, "the answers are not shown"
    ranks = sorted(rank for _, rank in known.values())
    assert ranks[:20] == list(range(1, 21)) and ranks[-1] <= 40
    assert len({answer for answer, _ in known.values()}) > 10
    again = TASKS["ngram_facts"](PlantedConfig(**{**options, "values": 51}))
    assert again.vocabulary == 3 + 8 + 51


def test_ngram_facts_are_used_by_zipf():
    task_rows = rows("ngram_facts", 3000, 10, facts=500, zipf=1.0, density=0.3)
    use = Counter(rank for row in task_rows for _, _, rank in answers_of(row))
    total, harmonic = sum(use.values()), sum(1 / r for r in range(1, 501))
    for rank in (1, 2, 4, 8):
        assert use[rank] / total == pytest.approx(1 / rank / harmonic, rel=0.15)
    flat = Counter(rank for row in rows("ngram_facts", 3000, 10, facts=500, zipf=0.0) for _, _, rank in answers_of(row))
    assert flat.most_common(1)[0][1] < 30


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_rows_by_number(name):
    source = open_source(a_recipe(name))
    whole, distances = source.graded(range(5, 9), 64)
    assert whole.ids.shape == whole.targets.shape == whole.documents.shape == distances.shape == (4, 64)
    assert {x.dtype for x in (whole.ids, whole.targets, whole.documents, distances)} == {torch.int64}
    assert (whole.documents == 0).all()
    assert int(whole.ids.max()) < source.vocabulary == source.task.vocabulary
    assert int(whole.targets.max()) < source.vocabulary
    parts = [source.batch(range(5, 7), 64), source.batch(range(7, 9), 64)]
    for field in ("ids", "targets"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    others = [
        source.batch(range(5, 9), 64, stage=1),
        source.batch(range(6, 10), 64),
        source.held_out(range(5, 9), 64)[0],
    ]
    others.append(open_source(a_recipe(name, "train.seed=1")).batch(range(5, 9), 64))
    drawn = [{tuple(row) for row in batch.ids.tolist()} for batch in (whole, others[0], others[2], others[3])]
    assert len(set.union(*drawn)) == 16
    assert torch.equal(whole.ids[1:], others[1].ids[:-1])
    held_out = open_source(a_recipe(name, "train.seed=1")).held_out(range(5, 9), 64)[0]
    assert torch.equal(held_out.ids, others[2].ids), "held-out rows do not depend on the run's seed"


class Oracle(nn.Module):
    """Knows the held-out answers that are at least `reach` away, and is sure of the token 0 elsewhere."""

    def __init__(self, source, reach: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        batch, distances = source.held_out(range(source.rows), source.eval_lengths[0])
        told = torch.where(distances >= reach, batch.targets, 0).clamp_min(0)
        self.known = {tuple(ids): row for ids, row in zip(batch.ids.tolist(), told)}
        self.vocabulary, self.modes = source.vocabulary, []

    def forward(self, ids):
        self.modes.append(self.training)
        told = torch.stack([self.known[tuple(row)] for row in ids.tolist()])
        logits = torch.zeros(*ids.shape, self.vocabulary).scatter_(2, told[..., None], math.log(self.vocabulary - 1))
        return type("Output", (), {"logits": logits})


def test_accuracy_is_counted_by_distance():
    source = open_source(a_recipe("recall", "planted.eval_length=200", "planted.nearest=5", "data.held_out_rows=7"))
    model = Oracle(source, reach=32)
    scores = source.evaluate(model, torch.float32)
    assert model.training and not any(model.modes) and len(model.modes) == 3
    distances = source.held_out(range(7), 200)[1]
    asked = distances[distances > 0]
    assert set(scores["accuracy_at"]) == {str(1 << (int(d).bit_length() - 1)) for d in asked}
    assert all(found == float(int(least) >= 32) for least, found in scores["accuracy_at"].items())
    share = float((asked >= 32).double().mean())
    assert scores["accuracy"] == pytest.approx(share)
    assert list(scores["accuracy_at"]) == sorted(scores["accuracy_at"], key=int)
    wrong = math.log(2 * (source.vocabulary - 1))
    assert scores["answer_nats"] == pytest.approx(share * math.log(2) + (1 - share) * wrong, rel=1e-5)
    shown = source.report(scores)
    assert shown["held-out answers right"] == f"{share:.1%}"
    blind = scores["floor_at"]["32"]
    assert f"32: 100% ({blind:.0%})" in shown["by tokens from the evidence to the question (blind)"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=planted:recal"], "data.source='planted:recal': allowed after 'planted:' are recall, selective"),
        (["planted.values=300"], "model.vocab_size=260: allowed is at least 367, for planted:recall"),
        (["planted.facts=7"], "planted.facts: the task recall has no such option; it reads nearest, farthest"),
        (["planted.density=0.6"], "planted.density=0.6: allowed is above 0, at most 0.5"),
        (["planted.questions=0"], "planted.questions=0: allowed is above 0"),
        (["data.held_out_rows=0"], "data.held_out_rows=0: allowed is 1 or more"),
        (["data.source=stdlib", "planted.keys=3"], r"\[planted\] is for sources that begin with 'planted:'"),
    ],
)
def test_a_bad_recipe_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        a_recipe("recall", *overrides)


def test_too_many_facts_for_the_keys():
    with pytest.raises(ValueError, match="facts=100: allowed are up to 64"):
        TASKS["ngram_facts"](PlantedConfig(keys=8, facts=100))


def test_recall_without_room_is_an_error():
    with pytest.raises(ValueError, match="nearest=500: a row of 126 tokens has no room for a whole octave"):
        rows("recall", 128, 1, nearest=500)


@pytest.mark.parametrize("name", ["selective_copy", "induction"])
def test_distances_without_room_are_an_error(name):
    task = TASKS[name](PlantedConfig(nearest=500))
    with pytest.raises(ValueError, match="nearest=500: rows of this length leave room for"):
        task.row(np.random.default_rng(0), 128)


def test_a_digest_tells_sources_apart():
    sources = [a_recipe("recall"), a_recipe("induction"), a_recipe("recall", "planted.keys=63"), a_recipe("recall")]
    digests = [open_source(recipe).digest for recipe in sources]
    assert len(set(digests)) == 3 and digests[0] == digests[3]


def test_a_recipe_round_trips():
    recipe = a_recipe("recall", "planted.nearest=7")
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.planted == PlantedConfig(nearest=7)
    assert a_recipe("recall").planted is None


def test_a_run_learns_answers_only_and_reports_them(tmp_path, capsys):
    recipe = a_recipe("recall", "train.steps=2", "train.eval_every=1", "planted.nearest=4")
    recipe = replace(recipe, train=replace(recipe.train, checkpoint_every=0))
    summary = train(recipe, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "planted recall: nearest=4, farthest=0" in shown and "held-out answers right" in shown
    assert "step 2/2  loss" in shown and "bits/byte" not in shown
    assert 0 <= summary.scores["accuracy"] <= 1 and set(summary.scores) >= {"accuracy_at", "answer_nats"}
    assert not summary.sample and not (tmp_path / "run" / "sample.txt").exists()
    source = open_source(recipe)
    assert summary.progress.tokens == sum(
        int((source.batch(range(3 * s, 3 * s + 3), 64).targets > 0).sum()) for s in (0, 1)
    )


def test_no_task_hangs_or_fails_on_short_rows():
    for task in (kind(PlantedConfig()) for kind in TASKS.values()):
        for length in (64, 65, 81) if "statements" in task.options else (16, 17, 33):
            for seed in range(20):
                assert len(answers_of(task.row(np.random.default_rng(seed), length))) > 0


def test_an_untrained_model_scores_at_chance():
    recipe = a_recipe("recall", "data.held_out_rows=2")
    torch.manual_seed(0)
    scores = open_source(recipe).evaluate(Transformer(recipe.model), torch.float32)
    assert scores["accuracy"] < 0.3 and abs(scores["answer_nats"] - math.log(260)) < 1
