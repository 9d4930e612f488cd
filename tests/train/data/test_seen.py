"""What a run has read, byte by byte: against the rows themselves, in bytes and in trained tokens."""

from itertools import pairwise

import numpy as np
import pytest

from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.mapped import tokenised
from abyssal.train.data.rows import row_spans, train_rows
from abyssal.train.data.seen import Rows, merged, seen
from abyssal.train.data.tokenizers import ByteTokenizer, train_bpe

SIZES = (1, 40, 7, 3, 90, 64, 2, 15)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Training bytes of which each is its document's and its own place in it, as far as 256 go."""
    draw = np.random.default_rng(0)
    train = [Document(str(i), draw.integers(0, 256, size, np.uint8).tobytes()) for i, size in enumerate(SIZES)]
    return Corpus(tuple(train), (Document("held out", b"x"),))


def stream(corpus: Corpus) -> list[int]:
    return [symbol for document in corpus.train for symbol in (256, *document.text)]


@pytest.mark.parametrize("length", [1, 6, 50, 500])
@pytest.mark.parametrize("rows", [range(0), range(3), range(5, 9), range(40)], ids=str)
@pytest.mark.parametrize("stage", [0, 1])
def test_spans_hold_the_tokens_of_the_rows(corpus, length, rows, stage):
    batch, symbols = train_rows(corpus, length, 5, rows, stage) if rows else None, np.array(stream(corpus))
    spans = row_spans(corpus, length, 5, rows, stage)
    found = [symbols[start:stop].tolist() for start, stop in spans.tolist()]
    wanted = []
    for ids, targets, documents in zip(batch.ids, batch.targets, batch.documents) if batch else ():
        row = ids[documents >= 0].tolist()
        if targets[-1] >= 0:
            row.append(int(targets[-1]))  # the one token of a row that is a target only
        wanted.append(row)
    for row in wanted:
        part: list[int] = []
        while len(part) < len(row):
            part += found.pop(0)
        assert part == row or part == [*row, 256], "a bos may be what comes next"
        while found and found[0] == [256] and part == row and len(row) == length:
            part += found.pop(0)
    assert not found


def test_each_place_is_in_one_span_of_those_that_are_merged():
    draw = np.random.default_rng(1)
    for _ in range(50):
        start = draw.integers(0, 60, draw.integers(0, 12))
        spans = np.stack([start, start + draw.integers(1, 9, len(start))], 1)
        places = sorted({place for a, b in spans.tolist() for place in range(a, b)})
        joined = merged(spans).tolist()
        assert [place for a, b in joined for place in range(a, b)] == places
        assert all(b < c for (_, b), (c, _) in pairwise(joined)), "neighbours are one span"


def test_all_rows_of_an_epoch_are_the_training_text(corpus):
    whole = stream(corpus)
    for read in ([Rows(range(100), 16, 0, 3)], [Rows(range(2), 8, 0, 3), Rows(range(2), 500, 1, 3)]):
        assert seen(corpus, ByteTokenizer(), read, 10**6).tolist() == whole, "each byte once, however often it was read"


def test_a_part_has_gaps_where_it_begins_within_a_document(corpus):
    found = seen(corpus, ByteTokenizer(), [Rows(range(4), 9, 0, 1)], 10**6).tolist()
    pieces = "".join(map(chr, found)).replace(chr(256), f"{chr(257)}{chr(256)}").split(chr(257))
    whole = [chr(256) + document.text.decode("latin-1") for document in corpus.train]
    assert chr(257) in map(chr, found) and all(any(piece in text for text in whole) for piece in pieces)
    assert all(any(text.startswith(piece) for text in whole) for piece in pieces if piece.startswith(chr(256)))
    batch = train_rows(corpus, 9, 1, range(4))
    read = sum(int((part != 256).sum()) for part in batch.ids) + sum(int(row[-1] >= 0) for row in batch.targets)
    assert sum(symbol < 256 for symbol in found) == read
    assert seen(corpus, ByteTokenizer(), [Rows(range(1000), 9, 0, 1)], 36).tolist() == found[:36], "the first rows"
    assert not seen(corpus, ByteTokenizer(), [], 36).size


def test_tokens_are_spelt():
    texts = [b"the cat sat on the mat", b"a", "the öther cät \x00 sät".encode(), b"and then the rest of it all\n" * 4]
    corpus = Corpus(tuple(Document(str(i), text) for i, text in enumerate(texts)), (Document("held out", b"x"),))
    tokenizer = train_bpe(texts * 9, 300)
    tokens = tokenised(corpus, tokenizer)
    assert seen(tokens, tokenizer, [Rows(range(99), 5, 0, 0)], 10**6).tolist() == stream(corpus)
    rows = train_rows(tokens, 5, 0, range(1))
    read = [*rows.ids[0].tolist(), *rows.targets[0, -1:].tolist()]
    found = seen(tokens, tokenizer, [Rows(range(1), 5, 0, 0)], 10**6)
    spelt = tokenizer.decode_bytes(token for token in read if token not in (tokenizer.bos, -100))
    assert sorted(found[found < 256].tolist()) == sorted(spelt)
