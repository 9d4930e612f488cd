"""Tokenizers: exact for any bytes, special tokens apart from the text that spells them, streams cut anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.model import chat
from abyssal.train.tokenizers import SPECIAL_TOKENS, ByteTokenizer, Tokenizer, load_tokenizer

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

TOKENIZERS: list[Tokenizer] = [ByteTokenizer()]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: tokenizer.name)


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
@given(data=st.one_of(st.binary(), st.text().map(str.encode)))
def test_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert b"".join(map(tokenizer.token_bytes, ids)) == data
    assert all(0 <= token < tokenizer.bos for token in ids)


@each
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


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="tokenizer='words': allowed is 'bytes'"):
        load_tokenizer("words")
