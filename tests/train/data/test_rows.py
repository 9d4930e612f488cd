"""Rows of tokens: packing against a loop, batches as a pure function of the step, no byte twice, no byte leaked."""

import numpy as np
import pytest
import torch

from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.rows import BOS, IGNORED, PADDING, Stream, held_out, train_rows

LENGTHS = (1, 7, 30, 2, 2, 13, 64, 5)


def documents(first: int = 0) -> tuple[Document, ...]:
    random = np.random.default_rng(first)
    return tuple(
        Document(f"d{first + i}", random.integers(0, 256, size, np.uint8).tobytes()) for i, size in enumerate(LENGTHS)
    )


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(documents(0), documents(100))


def packed_by_hand(texts: list[bytes], length: int) -> tuple[list, list, list]:
    """Token by token, in plain Python."""
    tokens, owner = [], []
    for i, text in enumerate(texts):
        tokens += [BOS, *text]
        owner += [i] * (1 + len(text))
    ids, targets, rows = [], [], []
    for start in range(0, len(tokens), length):
        row_ids, row_targets, row_documents = [], [], []
        for p in range(start, start + length):
            if p >= len(tokens):
                row_ids, row_targets, row_documents = [*row_ids, None], [*row_targets, -100], [*row_documents, -1]
                continue
            same = p + 1 < len(tokens) and owner[p + 1] == owner[p]
            row_ids.append(tokens[p])
            row_targets.append(tokens[p + 1] if same else -100)
            row_documents.append(owner[p] - owner[start])
        ids, targets, rows = [*ids, row_ids], [*targets, row_targets], [*rows, row_documents]
    return ids, targets, rows


@pytest.mark.parametrize("length", [1, 5, 16, 132, 133, 500])
def test_packing_equals_the_loop(length):
    stream = Stream(documents(), length)
    batch = stream.batch(range(stream.rows))
    ids, targets, rows = packed_by_hand([d.text for d in documents()], length)
    assert batch.targets.tolist() == targets
    assert batch.documents.tolist() == rows
    real = [[i if i is not None else p for i, p in zip(*pair)] for pair in zip(ids, batch.ids.tolist())]
    assert batch.ids.tolist() == real
    assert ((batch.ids >= 0) & (batch.ids <= BOS)).all()
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in (batch.ids, batch.documents))


def test_every_byte_is_a_target_exactly_once_and_bos_never():
    stream = Stream(documents(), 9)
    targets = stream.batch(range(stream.rows)).targets
    kept = targets[targets != IGNORED]
    assert bytes(kept.tolist()) == b"".join(d.text for d in documents())


def test_padding_only_at_the_end_of_the_last_row():
    stream = Stream(documents(), 50)
    batch = stream.batch(range(stream.rows))
    padding = batch.documents == PADDING
    used = sum(1 + size for size in LENGTHS) - 2 * 50
    assert padding.nonzero().tolist() == [[2, p] for p in range(used, 50)]
    assert (batch.targets[padding] == IGNORED).all()


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    first = [train_rows(corpus, 12, 3, range(4 * s, 4 * s + 4)) for s in range(12)]
    again = [train_rows(Corpus(corpus.train, corpus.held_out), 12, 3, range(4 * s, 4 * s + 4)) for s in (11, 0, 5)]
    for step, batch in zip((11, 0, 5), again):
        for name in ("ids", "targets", "documents"):
            assert torch.equal(getattr(first[step], name), getattr(batch, name)), (step, name)
    other = train_rows(corpus, 12, 4, range(4))
    assert not torch.equal(first[0].ids, other.ids)


def test_an_epoch_reads_every_training_byte_once_and_the_next_in_another_order(corpus):
    rows = Stream(corpus.train, 12).rows
    wanted = sorted(b"".join(d.text for d in corpus.train))
    epochs = []
    for epoch in range(2):
        batches = [train_rows(corpus, 12, 0, range(i, i + 1)) for i in range(epoch * rows, (epoch + 1) * rows)]
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        epochs.append(targets[targets != IGNORED].tolist())
        assert sorted(epochs[-1]) == wanted
    assert epochs[0] != epochs[1]


def test_a_batch_can_reach_over_the_end_of_an_epoch(corpus):
    rows = Stream(corpus.train, 12).rows
    wide = train_rows(corpus, 12, 0, range(3 * rows))
    single = [train_rows(corpus, 12, 0, range(i, i + 1)).ids for i in range(3 * rows)]
    assert torch.equal(wide.ids, torch.cat(single))


def test_nothing_held_out_is_ever_trained_on():
    train = tuple(Document(f"t{i}", bytes([i]) * 40) for i in range(10))
    kept = tuple(Document(f"h{i}", bytes([200 + i]) * 40) for i in range(3))
    corpus = Corpus(train, kept)
    seen = torch.cat([train_rows(corpus, 16, 1, range(4 * s, 4 * s + 4)).ids.flatten() for s in range(30)])
    assert seen[seen != BOS].max() < 200
    evaluated = torch.cat([batch.ids.flatten() for batch in held_out(corpus, 16).batches(4)])
    assert evaluated[evaluated != BOS].min() >= 200


@pytest.mark.parametrize("rows", [0, 1, 3, 1000])
def test_held_out_rows_are_fixed_and_their_target_positions_right(corpus, rows):
    chosen = held_out(corpus, 12, rows)
    assert len(chosen.rows) == (min(rows, chosen.stream.rows) or chosen.stream.rows)
    assert len(set(chosen.rows.tolist())) == len(chosen.rows)
    targets = torch.cat([batch.targets.flatten() for batch in chosen.batches(5)])
    positions = chosen.target_positions()
    assert chosen.stream.tokens[positions].tolist() == targets[targets != IGNORED].tolist()
    assert len(set(positions.tolist())) == len(positions)


def test_a_row_that_is_not_there_is_an_error(corpus):
    stream = Stream(corpus.train, 12)
    for rows in ([stream.rows], [-1], [0, 99]):
        with pytest.raises(IndexError, match=f"rows 0 to {stream.rows - 1}"):
            stream.batch(rows)
