"""Tokenizers: exact for any bytes, special tokens apart from the text that spells them, streams cut anywhere."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from abyssal.model.text import chat
from abyssal.train.data.tokenizers import (
    SPECIAL_TOKENS,
    BPETokenizer,
    ByteTokenizer,
    LibraryTokenizer,
    Tokenizer,
    bpe,
    load_tokenizer,
    train_bpe,
)

SPECIAL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜System｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
]

TEXTS = ["def é(x):\n    return x<think>", "the then there", "Größe 日本語 日本", "    \n\n\tif x: return x\n"]
DOCUMENTS = [(text * 5).encode() for text in TEXTS] + [b"\xff\xfe broken \x80" * 4]
TRAINED = train_bpe(DOCUMENTS, 320)
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), TRAINED]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)
patient = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # beside other work drawing is slow


def test_byte_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode_bytes(bytes(range(256))) == list(range(256))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (256, 257, 258, 288)
    assert list(tokenizer.special.items()) == [(string, 256 + i) for i, string in enumerate(SPECIAL)]


@each
def test_special_tokens_end_the_vocabulary(tokenizer: Tokenizer):
    assert list(tokenizer.special) == SPECIAL
    assert list(tokenizer.special.values()) == list(range(tokenizer.bos, tokenizer.bos + len(SPECIAL)))
    assert tokenizer.bos == len(tokenizer.pieces) == tokenizer.vocab_size - SPECIAL_TOKENS
    assert {tokenizer.token_bytes(token) for token in range(tokenizer.bos, tokenizer.vocab_size + 9)} == {b""}
    with pytest.raises(ValueError, match="token=-1"):
        tokenizer.token_bytes(-1)


@each
@patient
@given(
    data=st.one_of(
        st.binary(), st.text().map(str.encode), st.lists(st.sampled_from(TEXTS)).map("".join).map(str.encode)
    )
)
@example(b"\xf0\x9f\x98 \xed\xa0\x80 \xc0\x80 \xff")
def test_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert b"".join(map(tokenizer.token_bytes, ids)) == data
    assert all(0 <= token < tokenizer.bos for token in ids)


@each
@patient
@given(parts=st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL))))
def test_special_strings_are_text_unless_asked_for(tokenizer: Tokenizer, parts: list[str]):
    text = "".join(parts)
    plain = tokenizer.encode(text)
    assert max(plain, default=0) < tokenizer.bos
    assert tokenizer.decode(plain) == text == tokenizer.decode(plain, special=True)
    ids = tokenizer.encode(text, special=True)
    assert tokenizer.decode(ids, special=True) == text
    without = [token for token in ids if token < tokenizer.bos]
    assert tokenizer.decode(ids) == tokenizer.decode(without)
    names = {token: string for string, token in tokenizer.special.items()}
    assert [names[token] for token in ids if token >= tokenizer.bos] == specials_of(text)


def specials_of(text: str) -> list[str]:
    """Left to right, character by character."""
    found, at = [], 0
    while at < len(text):
        here = next((string for string in SPECIAL if text.startswith(string, at)), "")
        found += [here] if here else []
        at += len(here) or 1
    return found


@each
@patient
@given(ids=st.lists(st.integers(0, 300)), special=st.booleans())
def test_a_stream_is_the_text_in_pieces(tokenizer: Tokenizer, ids: list[int], special: bool):
    pieces = list(tokenizer.decode_stream(iter(ids), special))
    assert len(pieces) == len(ids) + 1
    assert (
        "".join(pieces)
        == tokenizer.decode(ids, special)
        == tokenizer.decode_bytes(ids, special).decode("utf-8", "replace")
    )


def test_a_character_waits_for_its_last_byte():
    tokenizer = ByteTokenizer()
    assert list(tokenizer.decode_stream("aé€".encode())) == ["a", "", "é", "", "", "€", ""]
    assert list(tokenizer.decode_stream("€".encode()[:2])) == ["", "", "\ufffd"]
    broken = [*"€".encode()[:2], tokenizer.special["<think>"], 97]
    assert list(tokenizer.decode_stream(broken, special=True))[2:] == ["\ufffd<think>", "a", ""]


def test_a_prompt_of_the_chat_format_uses_its_tokens():
    tokenizer = ByteTokenizer()
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    prompt = chat.encode_messages([
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "latest_reminder", "content": "now"},
        {"role": "user", "content": "?", "task": "action"},
    ], thinking_mode="thinking")  # fmt: skip
    ids = tokenizer.encode(prompt, special=True)
    assert tokenizer.decode(ids, special=True) == prompt
    assert ids[:4] == [tokenizer.bos, tokenizer.special[chat.USER], *"é".encode()]
    used = {chat.BOS, chat.EOS, chat.USER, chat.ASSISTANT, chat.REMINDER, chat.THINK, chat.DSML, *chat.TASKS.values()}
    assert used <= tokenizer.special.keys()


def merged_by_hand(word: list[bytes], merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The earliest learnt pair first, at its leftmost place, until none is left."""
    while True:
        pairs = [pair for pair in pairwise(word) if pair in merges]
        if not pairs:
            return word
        at = list(pairwise(word)).index(min(pairs, key=merges.index))
        word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]


def test_words_are_merged_in_the_order_learnt():
    spelt = bpe.SPELLING
    byte = {character: bytes([i]) for i, character in enumerate(spelt)}
    read = json.loads(TRAINED.files()["tokenizer.json"])["model"]["merges"]
    merges = [tuple(b"".join(byte[c] for c in part) for part in pair) for pair in read]
    assert list(TRAINED.pieces[:256]) == [bytes([i]) for i in range(256)]
    assert list(TRAINED.pieces[256:]) == list(dict.fromkeys(a + b for a, b in merges))
    for word in ("there", " return", "日本", "é", "thethen"):
        ids = TRAINED.encode(word)
        assert [TRAINED.token_bytes(i) for i in ids] == merged_by_hand([bytes([b]) for b in word.encode()], merges)
    assert len(TRAINED.encode("the then there")) < 8


def test_training_takes_the_commonest_pair_first():
    tokenizer = train_bpe([b"abababab ab ab", b"xyz"], 292)
    assert tokenizer.pieces[256] == b"ab" and tokenizer.vocab_size == 292 and tokenizer.bos == 260
    assert tokenizer.digest == train_bpe([b"abababab ab ab", b"xyz"], 292).digest != TRAINED.digest


def test_bytes_that_are_no_text_are_byte_tokens():
    assert TRAINED.encode_bytes(b"\xff\xfe") == [255, 254]
    assert TRAINED.encode_bytes(b"there\xe6\x97" + "日本".encode()) == [
        *TRAINED.encode("there"),
        *(0xE6, 0x97),
        *TRAINED.encode("日本"),
    ]


@pytest.mark.parametrize("data", [b"the then\n" * 40, "日本語".encode() * 30, b"\x80" * 99])
def test_long_data_is_encoded_in_pieces(data: bytes, monkeypatch):
    whole = TRAINED.encode_bytes(data)
    monkeypatch.setattr(bpe, "CHUNK", 64)
    sizes = []
    words = TRAINED._words
    monkeypatch.setattr(TRAINED, "_words", lambda text: sizes.append(len(text.encode())) or words(text))
    ids = TRAINED.encode_bytes(data)
    assert TRAINED.decode_bytes(ids) == data and max(sizes) <= 64
    assert ids == whole or b"\n" not in data


def test_a_saved_tokenizer_is_the_same(tmp_path: Path):
    TRAINED.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer.json"):
        again = load_tokenizer(path)
        assert isinstance(again, BPETokenizer) and again.digest == TRAINED.digest
        assert again.pieces == TRAINED.pieces and again.special == TRAINED.special
        assert all(again.encode(text, special=True) == TRAINED.encode(text, special=True) for text in TEXTS)
    ByteTokenizer().save(tmp_path / "bytes")
    assert isinstance(load_tokenizer(tmp_path / "bytes"), ByteTokenizer)


def test_transformers_reads_the_saved_files(tmp_path: Path):
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (TRAINED.bos, TRAINED.eos, TRAINED.pad)
    text = "<｜User｜>the then é</think>日本"
    assert theirs.encode(text, add_special_tokens=False) == TRAINED.encode(text, special=True)
    assert theirs.decode(TRAINED.encode(text)) == text


def change(contents: dict, what: str) -> str:
    if what == "order":
        vocabulary = contents["model"]["vocab"]
        vocabulary["!"], vocabulary["A"] = vocabulary["A"], vocabulary["!"]
    elif what == "special":
        contents["added_tokens"][0]["content"] = "<s>"
    elif what == "missing":
        contents["added_tokens"].pop(3)
    elif what == "gap":
        contents["added_tokens"][-1]["id"] += 1
    elif what == "spelling":
        vocabulary = contents["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary["日"] = vocabulary.pop(last)
    elif what == "kind":
        contents["model"] = {"type": "WordLevel", "vocab": {}}
    return json.dumps(contents)


@pytest.mark.parametrize("what", ["order", "special"])
def test_another_order_is_another_tokenizer(tmp_path: Path, what: str):
    text = change(json.loads(TRAINED.files()["tokenizer.json"]), what)
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer) and tokenizer.digest != TRAINED.digest
    assert all(tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data for data in DOCUMENTS)
    assert tokenizer.bos == TRAINED.bos == tokenizer.special["<s>" if what == "special" else SPECIAL[0]]


@pytest.mark.parametrize("what", ["missing", "gap", "spelling", "kind", "list", "text"])
def test_a_broken_file_is_an_error(tmp_path: Path, what: str):
    text = {"list": "[1]", "text": "{"}.get(what) or change(json.loads(TRAINED.files()["tokenizer.json"]), what)
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=f"tokenizer='{tmp_path}': "):
        load_tokenizer(tmp_path)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="vocab_size=288: allowed is above 288, bytes and special tokens"):
        train_bpe(DOCUMENTS, 288)
    with pytest.raises(ValueError, match="vocab_size=999: the documents have pairs for 289 tokens only"):
        train_bpe([b"ab"], 999)


def test_an_unknown_name_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="tokenizer='words': no such file, and no folder"):
        load_tokenizer("words")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'abyssal\[text\]'"):
        train_bpe(DOCUMENTS, 320)
    assert load_tokenizer("bytes").encode("a") == [97]
