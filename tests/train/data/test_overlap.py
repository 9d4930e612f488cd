"""Held-out bytes that training text has too: planted copies, against a search byte by byte, and the scores without."""

import math

import numpy as np
import pytest
import torch
from uniform import Uniform

from abyssal.train.data import overlap
from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.overlap import copied, copied_of
from abyssal.train.data.scored import Scored
from abyssal.train.data.source import TextSource
from abyssal.train.data.tokenizers import BPETokenizer, ByteTokenizer, train_bpe
from abyssal.train.settings import DataConfig


def documents(*texts: bytes) -> tuple[Document, ...]:
    return tuple(Document(str(i), text) for i, text in enumerate(texts))


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def searched(held_out: list[bytes], train: list[bytes]) -> list[bool]:
    """Every stretch of 32 bytes looked for by `in`."""
    found = []
    for text in held_out:
        marks = [False] * (len(text) + 1)
        for i in range(len(text) - 31):
            if any(text[i : i + 32] in other for other in train):
                marks[i + 1 : i + 33] = [True] * 32
        found += marks
    return found


@pytest.mark.parametrize("size", [31, 32, 33, 100])
@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_a_planted_copy_counts_from_32_bytes_on(size, where):
    copy, before, behind = noise(size, 0), noise(500, 1), noise(500, 2)
    train = {"start": copy + behind, "middle": before + copy + behind, "end": before + copy}[where]
    held_out = noise(70, 3) + copy + noise(70, 4)
    marks = copied(documents(noise(40, 5), held_out), documents(noise(10, 6), train, noise(10, 7)))
    assert np.flatnonzero(marks).tolist() == (list(range(112, 112 + size)) if size >= 32 else [])


def test_windows_end_with_their_document():
    text = noise(64, 0)
    assert not copied(documents(text), documents(text[:31], text[31:62], text[62:])).any()
    assert not copied(documents(text[:31], text[31:62]), documents(text)).any()
    assert copied(documents(text[:31], text[31:63]), documents(text)).tolist() == [False] * 33 + [True] * 32
    assert not copied(documents(text[:31]), documents(text[:31])).any(), "nor with the place before it"


@pytest.mark.parametrize("block", [40, 64, 1000])
def test_equals_a_search_of_every_stretch(block, monkeypatch):
    monkeypatch.setattr(overlap, "BLOCK", block)
    random = np.random.default_rng(block)
    words = [noise(int(size), i) for i, size in enumerate(random.integers(3, 25, 12))]
    texts = [b"".join(words[int(i)] for i in random.integers(0, 12, size)) for size in random.integers(1, 60, 12)]
    held_out, train = [*texts[:4], b"a" * 40, b"ab" * 30], [*texts[4:], b"a" * 33, b"ba" * 17]
    marks = copied(documents(*held_out), documents(*train))
    assert marks.tolist() == searched(held_out, train)
    assert 0.1 < marks.mean() < 0.9


def test_a_copy_is_found_wherever_blocks_end(monkeypatch):
    monkeypatch.setattr(overlap, "BLOCK", 48)
    copy, more = noise(32, 0).replace(b"\n", b"x"), noise(120, 1).replace(b"\n", b"x")
    assert all(copied(documents(copy), documents(more[:size] + copy + more[size:])).sum() == 32 for size in range(100))


def test_no_more_is_searched_than_is_said(monkeypatch):
    text = noise(200, 0)
    train = documents(noise(1000, 1), text)
    monkeypatch.setattr(overlap, "BLOCK", 100)
    assert copied(documents(text), train).any() and overlap.searched(train) == "training text"
    monkeypatch.setattr(overlap, "SEARCHED", 1000)
    assert not copied(documents(text), train).any() and overlap.searched(train).startswith("the first 0.0 of 0.0 GB")


def test_the_cache_holds_what_was_found(monkeypatch):
    corpus = Corpus(documents(noise(300, 0)), documents(noise(50, 1), noise(300, 0)[100:200], noise(50, 2)))
    numbers = np.array([1, 2])
    first = copied_of(corpus, numbers, keep=True)
    assert first.sum() == 100 and np.array_equal(first, copied_of(corpus, numbers, keep=False))
    monkeypatch.setattr(overlap, "copied", None)
    assert np.array_equal(first, copied_of(corpus, numbers, keep=True))
    with pytest.raises(TypeError):
        copied_of(corpus, np.array([0, 2]), keep=True)


class Counting(Uniform):
    """A model that gives each token its own probability, whatever came before."""

    def forward(self, ids, documents=None):
        out = super().forward(ids, documents=documents)
        out.logits = torch.arange(out.logits.shape[-1]).float().expand_as(out.logits) / 100
        return out


TRAIN = b"the cat sat on the mat and the rat ran after the cat that sat there\n" * 6
HELD_OUT = b"a clean beginning, then: the cat sat on the mat and the rat ran after; and a clean end\n"


def test_the_clean_score_is_of_the_bytes_in_no_match():
    corpus = Corpus(documents(TRAIN), documents(HELD_OUT, b"some more"))
    source = TextSource(corpus, ByteTokenizer(), DataConfig(sequence_length=8, held_out_rows=0), 0)
    scores = source.evaluate(Counting(260), torch.float32)
    marks = searched([HELD_OUT, b"some more"], [TRAIN])
    logits = np.arange(260) / 100
    bits = [
        (np.log(np.exp(logits).sum()) - logits[byte]) / math.log(2)
        for byte, mark in zip([256, *HELD_OUT, 256, *b"some more"], marks)
        if byte != 256 and not mark
    ]
    assert scores["clean"] == pytest.approx(np.mean(bits), rel=1e-6) != pytest.approx(scores["held_out"], rel=1e-4)
    assert source.clean_bytes() == len(bits)
    assert f"({len(bits) / 96:.1%} of all" in source.report(scores)["on clean bytes alone"]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_token_is_clean_if_all_its_bytes_are(rows):
    corpus = Corpus(documents(TRAIN), documents(HELD_OUT, b"some more"))
    tokenizer = train_bpe([TRAIN], 300)
    assert isinstance(tokenizer, BPETokenizer)
    source = TextSource(corpus, tokenizer, DataConfig(tokenizer="bpe:300", sequence_length=8, held_out_rows=rows), 0)
    marks, clean, place = searched([HELD_OUT, b"some more"], [TRAIN]), [], 0
    targets = set(source.held_out.target_positions().tolist())
    for position, token in enumerate(source.held_out.stream.tokens.tolist()):
        width = 1 if token == tokenizer.bos else len(tokenizer.token_bytes(token))
        clean += [not any(marks[place : place + width])] if position in targets else []
        place += width
    assert source.clean.tolist() == clean and 0 < sum(clean) < len(clean)
    if not rows:
        assert source.clean_bytes() < sum(not marks[i] for i in source.scored.places), "some straddle the match's ends"


def test_a_token_without_bytes_is_as_clean_as_the_byte_behind_it():
    scored = object.__new__(Scored)
    scored.starts, scored.widths = np.array([1, 3, 3, 4, 5]), np.array([2, 0, 1, 0, 0])
    marked = np.array([False, False, False, True, False])
    assert scored.without(marked).tolist() == [True, False, False, True, True]


def test_held_out_text_without_a_clean_byte_has_no_such_score():
    corpus = Corpus(documents(TRAIN), documents(TRAIN[5:90]))
    source = TextSource(corpus, ByteTokenizer(), DataConfig(sequence_length=8, held_out_rows=0), 0)
    scores = source.evaluate(Counting(260), torch.float32)
    assert "clean" not in scores and source.report(scores)["on clean bytes alone"] == "no byte is"
