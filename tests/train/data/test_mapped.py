"""Tokens in files: the same rows as in memory, written whole or not at all, and a corpus that is never read at once."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.model.disk import lock
from abyssal.train.data import mapped
from abyssal.train.data.corpus import Corpus, Document, load_corpus
from abyssal.train.data.mapped import cache_folder, tokenised, trained_tokenizer
from abyssal.train.data.rows import held_out, stream, train_rows
from abyssal.train.data.tokenizers import ByteTokenizer, Tokenizer


class Triples(Tokenizer):
    """Three bytes to a token where there are three left; ids are made up as they come, above 65,536."""

    name = digest = "triples"
    vocab_size = 1 << 17

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def encode_bytes(self, data: bytes) -> list[int]:
        parts = [data[i : i + 3] for i in range(0, len(data), 3)]
        return [self.known.setdefault(part, 70_000 + len(self.known)) for part in parts]

    pieces = ()

    def token_bytes(self, token: int) -> bytes:
        return next(part for part, known in self.known.items() if known == token)


def documents(first: int, count: int) -> tuple[Document, ...]:
    draw = np.random.default_rng(first)
    texts = [draw.integers(0, 256, int(draw.integers(1, 90)), np.uint8).tobytes() for _ in range(count)]
    return tuple(Document(f"d{first + i}", text) for i, text in enumerate(texts))


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(documents(0, 30), documents(100, 7))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "targets", "documents"))


@pytest.mark.parametrize("length", [1, 16, 61, 5000])
def test_bytes_in_a_file_are_cut_into_the_rows_of_those_in_memory(corpus, length):
    there = tokenised(corpus, ByteTokenizer())
    assert there.train.tokens.dtype == np.uint16 and isinstance(there.train.tokens, np.memmap)
    for seed, rows in ((0, range(3)), (0, range(120, 123)), (5, range(9, 12))):
        assert same(train_rows(corpus, length, seed, rows), train_rows(there, length, seed, rows))
    one, other = held_out(corpus, length, 4), held_out(there, length, 4)
    assert all(map(same, one.batches(3), other.batches(3)))
    assert one.target_positions().tolist() == other.target_positions().tolist()


def test_tokens_are_packed_document_by_document(corpus):
    tokenizer = Triples()
    there = tokenised(corpus, tokenizer)
    assert there.train.tokens.dtype == np.uint32
    order = np.array([4, 0, 29])
    cut = stream(there.train, 10, order)
    wanted = [[tokenizer.bos, *tokenizer.encode_bytes(corpus.train[i].text)] for i in order]
    whole = cut.batch(range(cut.rows))
    flat = whole.ids.flatten()[whole.documents.flatten() >= 0]
    assert flat.tolist() == [token for document in wanted for token in document]
    targets = whole.targets[whole.targets != -100].tolist()
    assert targets == [token for document in wanted for token in document[1:]]
    assert tokenizer.decode_bytes(targets) == b"".join(corpus.train[i].text for i in order)


def test_a_second_time_nothing_is_written(corpus, cache, monkeypatch):
    first = tokenised(corpus, ByteTokenizer())
    monkeypatch.setattr(mapped, "_write_tokens", None)
    again = tokenised(Corpus(corpus.train, corpus.held_out), ByteTokenizer())
    assert np.array_equal(first.train.tokens, again.train.tokens)
    assert np.array_equal(first.held_out.starts, again.held_out.starts)
    (folder,) = (cache / "tokens").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        *("train.tokens", "train.starts", "held_out.tokens", "held_out.starts", "contents.json")
    }


def test_corpora_and_tokenizers_do_not_share_files(corpus, cache):
    tokenised(corpus, ByteTokenizer())
    tokenised(corpus, Triples())
    tokenised(Corpus(corpus.train[1:], corpus.held_out), ByteTokenizer())
    assert len(list((cache / "tokens").iterdir())) == 3


def test_a_writer_that_fails_leaves_nothing_that_looks_finished(corpus, cache):
    class Fails(ByteTokenizer):
        def encode_bytes(self, data: bytes) -> list[int]:
            if data == corpus.held_out[-1].text:
                assert list((cache / "tokens").glob(".*/train.tokens")), "written under another name first"
                raise KeyboardInterrupt
            return super().encode_bytes(data)

    with pytest.raises(KeyboardInterrupt):
        tokenised(corpus, Fails())
    assert not list((cache / "tokens").iterdir())
    assert tokenised(corpus, ByteTokenizer()).train.tokens.size


def test_files_are_on_the_disk_before_they_get_their_name(corpus, cache, monkeypatch):
    flushed, named = [], []
    flush, rename = mapped.flush, mapped.os.rename
    monkeypatch.setattr(mapped, "flush", lambda path: flushed.append(path) or flush(path))
    monkeypatch.setattr(mapped.os, "rename", lambda a, b: named.append((list(flushed), b)) or rename(a, b))
    tokenised(corpus, ByteTokenizer())
    ((before, folder),) = named
    assert {path.name for path in before[:-1]} == {path.name for path in folder.iterdir()}
    assert before[-1] == before[0].parent != folder


def test_of_two_writers_the_first_to_finish_wins(corpus, cache):
    class Slow(ByteTokenizer):
        other = None

        def encode_bytes(self, data: bytes) -> list[int]:
            if not Slow.other:
                Slow.other = True
                Slow.other = tokenised(corpus, ByteTokenizer())
            return super().encode_bytes(data)

    mine = tokenised(corpus, Slow())
    assert np.array_equal(mine.train.tokens, Slow.other.train.tokens)
    assert len(list((cache / "tokens").iterdir())) == 1


BROKEN = {
    "cut": ("train.tokens", lambda data: data[:-2]),
    "empty": ("train.tokens", lambda data: b""),
    "longer": ("held_out.tokens", lambda data: data + b"\0\0"),
    "zeros": ("train.tokens", lambda data: bytes(len(data))),
    "one bit": ("held_out.tokens", lambda data: data[:-2] + bytes([data[-2] ^ 1, data[-1]])),
    "starts cut": ("train.starts", lambda data: data[:-8]),
    "starts of others": ("held_out.starts", lambda data: data[::-1]),
    "gone": ("held_out.starts", lambda data: None),
    "list gone": ("contents.json", lambda data: None),
    "list cut": ("contents.json", lambda data: data[:-9]),
    "list of nothing": ("contents.json", lambda data: b"[]"),
    "list too deep": ("contents.json", lambda data: b"[" * 100_000),
    "list of an earlier version": ("contents.json", lambda data: json.dumps({"corpus": "", "tokenizer": ""}).encode()),
    "list of another tokenizer": ("contents.json", lambda data: data.replace(b'"bytes"', b'"pairs"')),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_in_the_cache_is_written_anew(case, corpus, cache):
    wanted = tokenised(corpus, ByteTokenizer())
    (folder,) = (cache / "tokens").iterdir()
    name, change = BROKEN[case]
    data = change((folder / name).read_bytes())
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    found = tokenised(corpus, ByteTokenizer())
    for part in ("train", "held_out"):
        assert np.array_equal(getattr(found, part).tokens, getattr(wanted, part).tokens)
        assert np.array_equal(getattr(found, part).starts, getattr(wanted, part).starts)
    assert list((cache / "tokens").iterdir()) == [folder]


def test_a_tokenizer_that_is_broken_in_the_cache_is_trained_anew(texts, cache):
    corpus = load_corpus(str(texts))
    found = trained_tokenizer(corpus, 300)
    (file,) = (cache / "tokenizers").rglob("tokenizer.json")
    file.write_bytes(file.read_bytes()[:100])
    assert trained_tokenizer(corpus, 300).digest == found.digest


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_stay(corpus, cache):
    parent, key = cache / "tokens", "0123456789abcdef" * 2
    for name in (f".{key}.dead", f".{key}.alive", ".notes", "mine"):
        (parent / name).mkdir(parents=True)
    held = lock(parent / f".{key}.alive")
    tokenised(corpus, ByteTokenizer())
    assert {path.name for path in parent.iterdir() if len(path.name) != 32} == {f".{key}.alive", ".notes", "mine"}
    mapped.os.close(held)
    tokenised(corpus, ByteTokenizer())
    assert {path.name for path in parent.iterdir() if len(path.name) != 32} == {".notes", "mine"}


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("ABYSSAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/abyssal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "abyssal"
    monkeypatch.setenv("ABYSSAL_CACHE", "~no-such-user/x")
    with pytest.raises(FileNotFoundError, match="no such home; the environment variable ABYSSAL_CACHE names a folder"):
        cache_folder()


def test_a_tokenizer_is_trained_on_training_documents_and_once(texts, monkeypatch):
    corpus = load_corpus(str(texts))
    found = trained_tokenizer(corpus, 300)
    assert (found.vocab_size, found.name) == (300, "bpe:300")
    blind = Corpus(corpus.train, (Document("x", b"qqqqqqqqqq" * 1000),))
    assert trained_tokenizer(blind, 300).pieces == found.pieces, "held-out text has no say"
    monkeypatch.setattr(mapped, "train_bpe", None)
    assert trained_tokenizer(corpus, 300).digest == found.digest


def test_a_corpus_of_places_is_the_corpus_in_memory(texts):
    read, named = load_corpus(str(texts)), load_corpus(str(texts), in_memory=False)
    assert named.digest == read.digest and str(named) == str(read)
    assert [d.text for d in named.held_out] == [d.text for d in read.held_out]
    assert not any(isinstance(d, Document) for d in (*named.train, *named.held_out))
    assert all(isinstance(d, Document) for d in (*read.train, *read.held_out))


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_chunks_are_cut_at_line_ends(texts, size):
    for document in load_corpus(str(texts), in_memory=False).held_out:
        chunks = list(document.chunks(size))
        assert chunks == list(Document("", document.text).chunks(size))
        assert b"".join(chunks) == document.text and max(map(len, chunks)) <= size
        rest = document.text
        for chunk in chunks[:-1]:
            rest = rest[len(chunk) :]
            assert chunk.endswith(b"\n") or (len(chunk) == size and b"\n" not in chunk)


def test_a_file_that_changed_is_an_error(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(500)), "utf-8")
    named, read = load_corpus(str(path), in_memory=False), load_corpus(str(path))
    path.write_text("other" + path.read_text("utf-8")[5:], "utf-8")
    with pytest.raises(ValueError, match=r"book.txt' has changed since the corpus was read"):
        _ = named.train[0].text
    assert read.train[0].text.startswith(b"line")


def test_a_large_file_is_never_in_memory(tmp_path):
    size = 24 << 20
    line = b"the stream of tokens runs through windows and compressed entries %7d\n"
    with (tmp_path / "large.txt").open("wb") as file:
        file.writelines(line % i for i in range(size // len(line)))
    tracemalloc.start()
    corpus = load_corpus(str(tmp_path / "large.txt"), in_memory=False)
    there = tokenised(corpus, ByteTokenizer())
    train_rows(there, 256, 0, range(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(there.train.tokens) + len(there.held_out.tokens) > 0.98 * size
    assert peak < size / 2
