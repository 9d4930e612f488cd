"""Opponents: which bytes they get and are scored on, what a compressor's bits are, and what the cache keeps."""

import lzma

import numpy as np
import pytest

from abyssal.train.data import opponents as module
from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.kneser_ney import kneser_ney
from abyssal.train.data.opponents import opponents, training_text
from abyssal.train.data.rows import held_out
from abyssal.train.data.scored import Scored

WORDS = ["the ", "cat ", "sat on ", "a mat, ", "and then ", "another ", "rat ", "ran after it\n", "until ", "its end "]


def text(seed: int, words: int) -> bytes:
    return "".join(np.random.default_rng(seed).choice(WORDS, words)).encode()


@pytest.fixture
def corpus() -> Corpus:
    train, kept = ([Document(f"{i}", text(i, 800)) for i in part] for part in (range(9), range(9, 13)))
    return Corpus(tuple(train), tuple(kept))


def test_compressors_are_charged_for_what_held_out_bytes_add(corpus):
    scored = Scored(corpus.held_out, held_out(corpus, 50, 60))
    clean = np.arange(len(scored.widths)) % 7 > 2
    train = b"".join(document.text for document in corpus.train)
    symbols = scored.stream[scored.places]
    found = opponents(training_text(corpus.train), scored, clean)
    for name, part in (("held_out", symbols), ("clean", symbols[clean])):
        added = bytes(part.tolist())
        best = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
        sizes = [len(lzma.compress(each, lzma.FORMAT_RAW, filters=best)) for each in (train, train + added)]
        assert found["xz"][name] == pytest.approx(8 * (sizes[1] - sizes[0]) / len(added))


def test_training_text_is_what_zstd_looks_back_to():
    pytest.importorskip("zstandard")
    noise = np.random.default_rng(0).integers(0, 256, 9000, np.uint8).tobytes()
    corpus = Corpus((Document("a", noise),), (Document("b", noise[3000:7000]),))
    scored = Scored(corpus.held_out, held_out(corpus, 50, 0))
    known, unknown = (
        opponents(training_text(train), scored, np.ones(4000, bool))["zstd"]["held_out"]
        for train in (corpus.train, [Document("c", noise[:1000])])
    )
    assert known < 0.1 and 8 < unknown < 8.1


def test_n_gram_models_see_every_byte_before_and_are_scored_on_some(corpus):
    scored = Scored(corpus.held_out, held_out(corpus, 50, 60))
    clean = np.arange(len(scored.widths)) % 7 > 2
    train = training_text(corpus.train)
    found = opponents(train, scored, clean)
    for order, bits in kneser_ney(train, scored.stream, (3, 5, 7)).items():
        chosen = bits[scored.places]
        assert found[f"KN-{order}"] == {"held_out": chosen.mean(), "clean": chosen[clean].mean()}


def test_without_a_clean_byte_there_is_no_such_score(corpus):
    scored = Scored(corpus.held_out, held_out(corpus, 50, 60))
    found = opponents(training_text(corpus.train), scored, np.zeros(len(scored.widths), bool))
    assert {tuple(bits) for bits in found.values()} == {("held_out",)}


def test_what_was_found_once_is_kept(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path))
    scored, train = Scored(corpus.held_out, held_out(corpus, 50, 60)), training_text(corpus.train)
    clean = np.ones(len(scored.widths), bool)
    found = opponents(train, scored, clean)
    monkeypatch.setattr(module, "_find", None)
    assert opponents(train, scored, clean) == found
    others = Scored(corpus.held_out, held_out(corpus, 50, 60))
    others.places = scored.places[::-1]
    for other in ((train[:-1], scored, clean), (train, others, clean), (train, scored, ~clean)):
        with pytest.raises(TypeError):
            opponents(*other)


def test_without_zstandard_there_is_no_zstd(corpus, monkeypatch):
    scored, train = Scored(corpus.held_out, held_out(corpus, 50, 60)), training_text(corpus.train)
    clean = np.ones(len(scored.widths), bool)
    pytest.importorskip("zstandard")
    assert "zstd" in opponents(train, scored, clean)
    monkeypatch.setattr(module, "zstandard", None)
    assert [*opponents(train, scored, clean)] == ["KN-3", "KN-5", "KN-7", "xz"]


def test_of_a_large_corpus_they_get_the_beginning(corpus, monkeypatch):
    sizes = [document.size for document in corpus.train]
    for size, count in ((0, 1), (sizes[0] + sizes[1], 2), (sizes[0] + sizes[1] - 1, 1), (10**9, len(sizes))):
        monkeypatch.setattr(module, "MOST", size)
        assert (training_text(corpus.train) == 256).sum() == count
