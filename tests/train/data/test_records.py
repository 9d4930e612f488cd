"""Records as documents: .jsonl, .parquet, data sets; a split that stays, memory that does not grow, what is wrong."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from abyssal.train.data.corpus import Document, load_corpus
from abyssal.train.data.mapped import tokenised
from abyssal.train.data.records import held_out_by_key
from abyssal.train.data.rows import train_rows
from abyssal.train.data.tokenizers import ByteTokenizer

TEXTS = [f"document {i}: {'naïve ' * (i % 7)}" for i in range(300)]


def lines(*records) -> str:
    return "".join(json.dumps(record, ensure_ascii=bool(i % 2)) + "\n" for i, record in enumerate(records))


def of(*texts: str, key: str = "text") -> str:
    return lines(*({"id": 7, key: text} for text in texts))


def texts_of(part) -> list[str]:
    return [document.text.decode() for document in part]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text(of(*TEXTS), "utf-8")
    return path


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_line_is_a_document(mine, in_memory):
    corpus = load_corpus(str(mine), in_memory=in_memory)
    held_out = texts_of(corpus.held_out)
    assert 5 <= len(held_out) <= 30 and corpus.held_out[-1].text == corpus.held_out[len(held_out) - 1].text
    assert [text for text in TEXTS if text not in held_out] == texts_of(corpus.train), "all, in their order"
    assert [corpus.train[0].name, corpus.train[0].size] == ["mine.jsonl:000001", len(TEXTS[0].encode())]
    assert isinstance(corpus.train[0], Document) == in_memory
    assert corpus.digest == load_corpus(str(mine), in_memory=not in_memory).digest
    with pytest.raises(IndexError):
        corpus.train[300]


def test_records_that_come_or_move_leave_the_others_on_their_side(mine):
    before = load_corpus(str(mine), 0.2)
    others = [f"another {i}" for i in range(300)]
    mine.write_text(of(*others, *TEXTS[::-1]), "utf-8")
    after = load_corpus(str(mine), 0.2)
    for part in ("train", "held_out"):
        kept = set(texts_of(getattr(after, part))) - set(others)
        assert kept == set(texts_of(getattr(before, part)))
    assert 30 < len(before.held_out) < 90
    wider = set(texts_of(load_corpus(str(mine), 0.5).held_out))
    assert set(texts_of(after.held_out)) < wider, "a larger share takes more, and drops none"


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_sides_have_some(fraction):
    for count in (2, 3, 40):
        held_out = held_out_by_key(np.arange(1, count + 1, dtype=np.uint64) << np.uint64(57), fraction)
        assert 0 < held_out.sum() < count


def test_empty_texts_blank_lines_and_copies_are_left_out(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(of("one", "two", "", "one") + "\n \n" + lines({"text": None}, {"content": "three"}), "utf-8")
    corpus = load_corpus(str(path))
    assert sorted(texts_of([*corpus.train, *corpus.held_out])) == ["one", "three", "two"]
    (tmp_path / "other.jsonl").write_text(of("two", "four"), "utf-8")
    both = load_corpus(str(tmp_path))
    assert sorted(texts_of([*both.train, *both.held_out])) == ["four", "one", "three", "two"]


def test_the_field_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text(of("one", "two", key="body"), "utf-8")
    corpus = load_corpus(str(tmp_path / "a.jsonl"), text_key="body", in_memory=False)
    assert {*texts_of(corpus.train), *texts_of(corpus.held_out)} == {"one", "two"}
    with pytest.raises(
        ValueError, match=r"a\.jsonl:1: it has 'id', 'body': allowed is text or content; data\.text_key"
    ):
        load_corpus(str(tmp_path / "a.jsonl"))


def test_a_folder_may_hold_text_and_records(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("a note", "utf-8")
    (tmp_path / "mine.jsonl").write_text(of("one"), "utf-8")
    corpus = load_corpus(str(tmp_path))
    assert texts_of(corpus.train) == ["a note"] and texts_of(corpus.held_out) == ["one"]
    (tmp_path / "mine.jsonl").write_text(of(*TEXTS), "utf-8")
    for name in "bcd":
        (tmp_path / "notes" / name).write_text(f"note {name}", "utf-8")
    named, read = load_corpus(str(tmp_path), in_memory=False), load_corpus(str(tmp_path))
    assert len(named.train) + len(named.held_out) == 304 and named.digest == read.digest
    assert texts_of(named.train[:3]) == texts_of(read.train[:3]) and named.train[-1].text == read.train[-1].text
    assert any(d.name.startswith("notes/") for d in named.held_out) and named.train[0].name.startswith("notes/")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"mine\.jsonl:301: no JSON: Expecting property name"),
        ('{"text": "a', r"mine\.jsonl:301: no JSON: Unterminated string"),
        ("[" * 100_000, r"mine\.jsonl:301: no JSON"),
        ('["text"]', r"mine\.jsonl:301: \['text'\]: allowed is a JSON object"),
        ('{"text": 5}', r"mine\.jsonl:301: text=5: allowed is text"),
        ('{"text": "\\ud800"}', r"mine\.jsonl:301: '\\ud800' is no character of Unicode"),
        ("{}", r"mine\.jsonl:301: it has nothing: allowed is text or content"),
        ('{"messages": []}', r"mine\.jsonl:301: it has 'messages'.*conversations are for abyssal train sft"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_with_its_place(mine, line, message):
    mine.write_text(mine.read_text("utf-8") + line, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_corpus(str(mine))


def test_lines_that_changed_are_an_error(mine):
    corpus = load_corpus(str(mine), in_memory=False)
    mine.write_text(of(*TEXTS[1:]), "utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl' has changed since the corpus was read"):
        _ = corpus.train[0].text


def test_memory_does_not_grow_with_the_records(tmp_path, monkeypatch):
    monkeypatch.setenv("ABYSSAL_CACHE", str(tmp_path / "cache"))
    path, size = tmp_path / "large.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        for i in range(4000):
            size += file.write(of(f"{i:6d} " + "tokens run through windows " * 150))
    tracemalloc.start()
    there = tokenised(load_corpus(str(path), in_memory=False), ByteTokenizer())
    train_rows(there, 256, 0, range(8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 16e6 and len(there.train.tokens) + len(there.held_out.tokens) > 0.98 * size
    assert peak < 3e6


# tables --------------------------------------------------------------------------------------------------------------


def written(kind: str, folder: Path, records: list[dict]) -> str:
    datasets = pytest.importorskip("datasets")
    folder.mkdir()
    data = datasets.Dataset.from_list(records)
    if kind == "parquet":
        data.to_parquet(str(folder / "part.parquet"), batch_size=64)
        return str(folder / "part.parquet")
    if kind == "one":
        data.save_to_disk(folder / "saved")
    else:
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("kind", ["parquet", "one", "several"])
def test_tables_hold_the_same_documents_as_lines(tmp_path, mine, kind):
    source = written(kind, tmp_path / "there", [{"text": text, "number": i} for i, text in enumerate(TEXTS)])
    wanted = load_corpus(str(mine), 0.2)
    for where in (source, str(tmp_path / "there"), f"{tmp_path}/th*/**"):
        found = load_corpus(where, 0.2, in_memory=False)
        assert texts_of(found.train) == texts_of(wanted.train)
        assert texts_of(found.held_out) == texts_of(wanted.held_out)
        assert found.digest == load_corpus(where, 0.2).digest
    number = TEXTS.index(found.held_out[1].text.decode()) + 1
    assert found.held_out[1].name.endswith(f":{number:06d}")


@pytest.mark.parametrize("kind", ["parquet", "one"])
def test_what_a_table_lacks_is_told(tmp_path, kind):
    source = written(kind, tmp_path / "there", [{"body": "one", "number": 1}, {"body": None, "number": 2}])
    with pytest.raises(ValueError, match=rf"{source}: it has 'body', 'number': allowed is text or content"):
        load_corpus(source)
    with pytest.raises(ValueError, match="found 1 text documents"):
        load_corpus(source, text_key="body")
    with pytest.raises(ValueError, match=rf"{source}: row 1: number=1: allowed is text"):
        load_corpus(source, text_key="number")


def test_a_broken_table_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no table at all")
    with pytest.raises(ValueError, match=r"a\.parquet: no parquet file"):
        load_corpus(str(tmp_path / "a.parquet"))


def test_a_data_set_of_the_hub_is_read_by_name(monkeypatch, mine):
    datasets = pytest.importorskip("datasets")

    def load(name, config, split):
        assert (name, config, split) == ("some/texts", "small", "train")
        return datasets.Dataset.from_list([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_corpus("hf:some/texts:small", in_memory=False)
    assert texts_of(found.train) == texts_of(load_corpus(str(mine)).train)
    assert found.train[0].name == "some/texts:small:000001"


def test_without_a_network_the_hub_is_one_line(monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"^data\.source='hf:nobody/nothing-here': .*nobody/nothing-here.*$"):
        load_corpus("hf:nobody/nothing-here")


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("hf:some/texts", "datasets")])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, tmp_path, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.parquet").touch()
    source = name if ":" in name else str(tmp_path / name)
    with pytest.raises(ModuleNotFoundError, match=rf"needs the {library} library: pip install 'abyssal\[data\]'"):
        load_corpus(source)
