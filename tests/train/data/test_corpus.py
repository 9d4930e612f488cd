"""The corpus: which files count, and a split that never leaks."""

import os
from pathlib import Path

import pytest

from abyssal.train.data.corpus import Document, load_corpus, split


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus()


def test_stdlib_is_large_and_leaves_out_what_it_says(stdlib):
    documents = [*stdlib.train, *stdlib.held_out]
    assert len(documents) > 200
    assert sum(len(d.text) for d in documents) > 5e6
    left_out = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "__pycache__"}
    folders = {part for d in documents for part in d.name.split("/")[:-1]}
    assert not folders & left_out
    assert all(d.name.endswith(".py") for d in documents)


def test_no_document_is_on_both_sides_of_the_split(stdlib):
    for of in (lambda d: d.name, lambda d: d.text):
        train, held_out = ({of(d) for d in part} for part in (stdlib.train, stdlib.held_out))
        assert not train & held_out
    assert len({d.text for d in stdlib.train}) == len(stdlib.train)


def test_about_the_share_asked_for_is_held_out(stdlib):
    sizes = [sum(len(d.text) for d in part) for part in (stdlib.train, stdlib.held_out)]
    assert 0.045 < sizes[1] / sum(sizes) <= 0.05
    assert len(stdlib.held_out) > 10


def test_split_depends_on_names_and_lengths_only():
    documents = [Document(f"d{i}", bytes([65 + i % 20]) * (50 + i)) for i in range(60)]
    there, back = split(documents, 0.1), split(documents[::-1], 0.1)
    assert there.train == back.train and there.held_out == back.held_out
    assert there.digest == back.digest
    changed = split([*documents[1:], Document("d0", b"z" * 50)], 0.1)
    assert [d.name for d in changed.held_out] == [d.name for d in there.held_out]
    assert changed.digest != there.digest


@pytest.mark.parametrize(
    ("name", "digest", "held_out"),
    [
        ("", "870041d788c95408", ["text04.txt", "text10.txt"]),
        ("text11.txt", "2972f35e0903f78b", ["text11.txt:000002", "text11.txt:000012", "text11.txt:000015"]),
    ],
)
def test_text_is_split_as_in_the_first_release(texts, name, digest, held_out):
    corpus = load_corpus(str(texts / name), 0.2)
    assert corpus.digest[:16] == digest and [d.name for d in corpus.held_out] == held_out


def test_a_glob_names_files_as_the_folder_does(texts, monkeypatch):
    there = load_corpus(f"{texts.parent}/*/text0*.txt")
    monkeypatch.setenv("HOME", str(texts.parent))
    below = load_corpus(f"~/{texts.name}/**/text0?.*")
    named = [sorted(d.name for d in (*corpus.train, *corpus.held_out)) for corpus in (there, below)]
    assert named[1] == [f"text0{i}.txt" for i in range(10)]
    assert named[0] == [f"{texts.name}/{name}" for name in named[1]]
    with pytest.raises(
        FileNotFoundError, match=r"data\.source='.*/no\*': no such file or folder; allowed are 'stdlib'"
    ):
        load_corpus(f"{texts}/no*")


def test_the_folder_of_the_name_stdlib_is_not_meant(tmp_path, monkeypatch, stdlib):
    (tmp_path / "stdlib").write_text("a line\n" * 100, "utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_corpus().digest == stdlib.digest


def test_one_large_document_cannot_take_the_held_out_share_alone():
    documents = [Document(f"d{i}", b"x" * 100) for i in range(40)] + [Document("large", b"y" * 5000)]
    corpus = split(documents, 0.1)
    assert "large" in {d.name for d in corpus.train}
    assert 1 <= len(corpus.held_out) <= 9


def test_folder_leaves_out_empty_binary_hidden_and_copied_files(tmp_path: Path):
    files = {"a.txt": b"one", "b.txt": b"two", "c.txt": b"one", "d.bin": b"x\0y", "e": b"", ".f": b"no"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden", "utf-8")
    corpus = load_corpus(str(tmp_path))
    assert {d.name for d in (*corpus.train, *corpus.held_out)} == {"a.txt", "b.txt"}


def test_one_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path):
    text = b"".join(b"line %d of the file\n" % i for i in range(5000)) + b"no newline at the end"
    (tmp_path / "book.txt").write_bytes(text)
    corpus = load_corpus(str(tmp_path / "book.txt"))
    pieces = sorted((*corpus.train, *corpus.held_out), key=lambda d: d.name)
    assert b"".join(d.text for d in pieces) == text
    assert all(d.text.endswith(b"\n") for d in pieces[:-1])
    assert 1 <= len(corpus.held_out) < len(corpus.train)


@pytest.mark.parametrize("content", [None, b"", b"a single line"])
def test_too_little_text_is_one_clear_error(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "only.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.source=.*at least 2"):
        load_corpus(str(tmp_path))


def test_missing_path_names_the_value():
    with pytest.raises(FileNotFoundError, match=r"data\.source='nowhere/at/all'.*'stdlib'"):
        load_corpus("nowhere/at/all")


@pytest.mark.parametrize("name", [b"a b", b"a\nb", b"\xff\xfe", b"-rf", b"~", b"caf\xc3\xa9", b"%s{}", b"n" * 255])
@pytest.mark.parametrize("of", ["file", "folder"])
def test_any_name_will_do(tmp_path: Path, name, of):
    path = tmp_path / os.fsdecode(name)
    if of == "folder":
        path.mkdir()
        for i in range(3):
            (path / f"{i}{os.fsdecode(name)[:200]}").write_text(f"text {i}\n", "utf-8")
    else:
        path.write_bytes(b"a line of text\n\xff\xfe\n" * 50)
    read, named = (load_corpus(str(path) + "/" * (of == "folder"), in_memory=memory) for memory in (True, False))
    assert read.digest == named.digest and len(read.train) + len(read.held_out) >= 3


@pytest.mark.parametrize("kind", ["pipe", "/dev/null", "/dev/zero", "a\0b", "n" * 300, "file/below"])
def test_what_is_no_text_is_named_and_never_waited_for(tmp_path: Path, kind):
    (tmp_path / "file").touch()
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises((OSError, ValueError)) as error:
        load_corpus(str(path))
    assert repr(str(path)) in str(error.value)


def test_pipes_and_links_to_nowhere_in_a_folder_are_left_out(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text of {name}\n", "utf-8")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    corpus = load_corpus(str(tmp_path))
    assert {d.name for d in (*corpus.train, *corpus.held_out)} == {"a", "b"}


def test_a_glob_follows_no_links(tmp_path):
    (tmp_path / "f").mkdir()
    for name in "ab":
        (tmp_path / "f" / f"{name}.txt").write_text(name * 20, "utf-8")
    (tmp_path / "f" / "loop").symlink_to(tmp_path / "f")
    whole, globbed = load_corpus(str(tmp_path / "f")), load_corpus(str(tmp_path / "f" / "**" / "*.txt"))
    assert globbed.digest == whole.digest == load_corpus(str(tmp_path / "f" / "**")).digest


@pytest.mark.parametrize("blank", [" ", ""])
def test_a_long_line_is_cut(tmp_path, blank):
    text = blank.join(f"w{i}" for i in range(9000))
    (tmp_path / "one.txt").write_text(text, "utf-8")
    corpus = load_corpus(str(tmp_path / "one.txt"))
    documents = sorted((*corpus.train, *corpus.held_out), key=lambda document: document.name)
    assert b"".join(document.text for document in documents) == text.encode() and len(documents) > 2
    assert all(document.text.endswith(b" ") for document in documents[:-1]) == bool(blank)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "one.txt").write_text(text, "utf-8")
    assert load_corpus(str(tmp_path / "alone")).digest == corpus.digest, "a folder of one text is that text"
