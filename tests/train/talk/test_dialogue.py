"""Prompts and answers in tokens, against the text format's own encoder and strict parser."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively

from abyssal.model.text.chat import encode_messages, parse_message_from_completion_text
from abyssal.model.text.marked import _mark
from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.talk.dialogue import Delta, Reader, prompt
from abyssal.train.talk.voice import Voice, random_voice

BYTES = ByteTokenizer()
SPECIAL = tuple(BYTES.special)
OPEN, CLOSE = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
CALL = (
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
)
EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module")
def voice():
    return Voice(lively(vocab_size=288, num_hidden_layers=2, compress_ratios=[0, 4]), BYTES, "tiny", 8192)


def read(completion, thinking=False, stop=(), tools=("add",)):
    """The reader after a completion, and the pieces it gave, token by token."""
    reader, pieces = Reader(BYTES, thinking, stop, tools), []
    for token in completion if isinstance(completion, list) else BYTES.encode(completion, special=True):
        pieces.append(reader.feed(token))
        if reader.ended:
            break
    return reader, [*pieces, reader.finish()]


def text_of(pieces, kind):
    return "".join(delta.text for piece in pieces for delta in piece if delta.kind == kind)


plain = st.text(max_size=20).filter(lambda text: not any(s in text for s in SPECIAL))
names = st.from_regex(r"[a-z]{1,3}", fullmatch=True)
calls = st.lists(st.dictionaries(names, plain | st.integers(), max_size=3), max_size=2)


@settings(max_examples=60, deadline=None)
@given(plain, plain, calls, st.booleans())
def test_completions_are_read_as_the_strict_parser_reads_them(content, reasoning, calls, thinking):
    tool_calls = [{"type": "function", "function": {"name": "add", "arguments": json.dumps(c)}} for c in calls]
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}
    mode, question = ("thinking" if thinking else "chat"), {"role": "user", "content": ""}
    asked = encode_messages([question], mode)
    completion = encode_messages([question, message], mode)[len(asked) :]
    want = parse_message_from_completion_text(completion, mode)
    reader, pieces = read(completion, thinking)
    answer = reader.answer
    assert answer.error is None and reader.ended
    assert (answer.content, answer.reasoning) == (want["content"], want["reasoning_content"])
    assert (text_of(pieces, "content"), text_of(pieces, "reasoning")) == (answer.content, answer.reasoning)
    assert [call["function"] for call in answer.tool_calls] == [call["function"] for call in want["tool_calls"]]
    assert len({call["id"] for call in answer.tool_calls}) == len(calls)
    assert answer.finish_reason == ("tool_calls" if calls else "stop")
    assert answer.tokens == len(BYTES.encode(completion, special=True)) - bool(calls)  # the block's end is the end
    assert answer.reasoning_tokens == (len(reasoning.encode()) + 1 if thinking else 0)


def test_pieces_end_between_characters():
    _, pieces = read([*"aé€".encode(), BYTES.eos])
    texts = ["".join(delta.text for delta in piece) for piece in pieces]
    assert texts == ["a", "", "é", "", "", "€", "", ""]


def test_half_a_character_is_a_replacement_character():
    assert read([*"é".encode()[:1], BYTES.eos])[0].answer.content == "\ufffd"
    assert read([*"a€".encode()[:3]])[0].answer.content == "a\ufffd"


@pytest.mark.parametrize(("stop", "content", "ended"), [
    (("END",), "one E EN ", True),
    (("N E", "EN "), "one E ", True),
    (("ENDED",), "one E EN END, two", False),
    (("two!",), "one E EN END, two", False),
    (("o",), "", True),
    (("D", "ND"), "one E EN E", True),
])  # fmt: skip
def test_stop_texts_end_the_answer_and_are_not_in_it(stop, content, ended):
    completion = "one E EN END, two"
    reader, pieces = read(completion, stop=stop)
    assert (text_of(pieces, "content"), reader.ended) == (content, ended)
    assert reader.answer.finish_reason == ("stop" if ended else "length")
    shown = [text_of(pieces[:i], "content") for i in range(len(pieces) + 1)]
    assert all(content.startswith(part) for part in shown)  # nothing that had to be taken back


def test_stop_texts_go_over_special_tokens_that_are_left_out():
    assert read("a b<think>c d", stop=["bc"])[0].answer.content == "a "


def test_a_special_token_within_the_opening_of_calls():
    answer = read(f"hm\n<think>{OPEN[1:]}{CALL}{CLOSE}{EOS}")[0].answer
    assert answer.tool_calls == [] and answer.error == "<think> inside the text (at character 3)"


def test_stop_texts_are_not_looked_for_in_reasoning():
    answer = read(f"so. END</think>yes. END{EOS}", thinking=True, stop=["END"])[0].answer
    assert (answer.reasoning, answer.content, answer.error) == ("so. END", "yes. ", None)


@pytest.mark.parametrize("state", ["reasoning", "content"])
@pytest.mark.parametrize("special", [s for s in SPECIAL if s != EOS])
def test_a_special_token_out_of_place_is_left_out_and_named(special, state):
    if (special, state) == ("</think>", "reasoning"):
        return
    end = f"</think>{EOS}" if state == "reasoning" else EOS
    answer = read(f"be{special}fore{end}", thinking=state == "reasoning")[0].answer
    assert getattr(answer, state) == "before" and answer.finish_reason == "stop"
    assert answer.error == f"{special} inside the text (at character 2)"


def test_ids_without_a_meaning_are_special_too():
    answer = read([97, 287, 98, 5000, BYTES.eos])[0].answer
    assert (answer.content, answer.error) == ("ab", "<token 287> inside the text (at character 1)")


@pytest.mark.parametrize(("completion", "error", "tools"), [
    (f"hm{OPEN}{CALL}{CALL[:-1]}{CLOSE}", "expected '\\n', found '<' (at character", ("add",)),
    (f"hm{OPEN}{CALL}{CLOSE[:-5]}{EOS}", "expected", ("add",)),
    (f"hm{OPEN}{CALL}", "expected", ("add",)),
    (f"hm{OPEN}{CALL.replace('1', 'x')}{CLOSE}", "is no JSON", ("add",)),
    (f"hm{OPEN}{CALL.replace('1', '<think>')}{CLOSE}", "<think> inside a tool call (at character", ("add",)),
    (f"h<think>m{OPEN}{CALL}{CLOSE}", "<think> inside the text (at character 1)", ("add",)),
    (f"hm{OPEN}{CALL}{CLOSE}", "a call of 'add', which is no tool at hand", ("sub",)),
    (f"hm{OPEN}{CALL}{CLOSE}", "｜DSML｜ inside the text (at character 5)", ()),
    (f"hm{OPEN[1:]}{CALL}{CLOSE}", "｜DSML｜ inside the text (at character 4)", ("add",)),
])  # fmt: skip
def test_calls_out_of_format_are_content(completion, error, tools):
    reader, pieces = read(completion, tools=tools)
    answer = reader.answer
    assert answer.tool_calls == [] and answer.error and error in answer.error
    assert answer.content.startswith("hm\n") and "invoke" in answer.content
    assert answer.content == text_of(pieces, "content")
    assert not any(special in answer.content for special in SPECIAL)


def test_errors_in_calls_say_where_in_the_completion():
    completion = f"two words{OPEN}{CALL}{CALL[:-1]}{CLOSE}"
    with pytest.raises(ValueError) as caught:
        parse_message_from_completion_text(completion)
    assert read(completion)[0].answer.error == str(caught.value)


def test_reasoning_without_an_end():
    answer = read(f"so it{EOS}", thinking=True)[0].answer
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("so it", "", "stop")
    assert answer.error == f"the reasoning is not ended by </think> (at character {5 + len(EOS)})"
    cut = read("so it", thinking=True)[0].answer
    assert (cut.reasoning, cut.finish_reason, cut.error) == ("so it", "length", None)


def test_an_ending_that_looked_like_calls_is_content():
    reader, pieces = read(f"a\n\n<{EOS}")
    assert reader.answer.content == text_of(pieces, "content") == "a\n\n<"


# prompts


def test_prompts_are_the_format_in_tokens(voice):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "häh?"}]
    schema = {"type": "object"}
    text = encode_messages([{**messages[0], "tools": tools, "response_format": schema}, messages[1]], "thinking")
    ids = prompt(voice, messages, thinking=True, tools=tools, schema=schema)
    assert ids == BYTES.encode(text, special=True)
    bare = encode_messages([{"role": "system", "content": "", "response_format": schema}, messages[1]])
    assert prompt(voice, messages[1:], schema=schema) == BYTES.encode(bare, special=True)
    hard = encode_messages(messages, "thinking", reasoning_effort="max")
    assert prompt(voice, messages, thinking=True, effort="max") == BYTES.encode(hard, special=True)


pieces = [*SPECIAL, "｜DSML", "｜", "<", "\ue000", "\ue000\ue000", "\ue0000\ue001", "\ue0001\ue001", "0\ue001", "x"]
nasty = st.lists(st.sampled_from(pieces), max_size=6).map("".join)


@settings(max_examples=60, deadline=None)
@given(nasty, nasty, nasty)
def test_special_strings_in_messages_are_text(voice, said, asked, value):
    arguments = json.dumps({"a": value, value + "b": 1}, ensure_ascii=True)

    def messages(said, asked, arguments):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return [
            {"role": "system", "content": said},
            {"role": "user", "content": [{"type": "text", "text": asked}]},
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": asked},
        ]

    ids = prompt(voice, messages(said, asked, arguments))
    text = encode_messages(messages(said, asked, arguments))
    assert BYTES.decode(ids, special=True) == text
    harmless = prompt(voice, messages("s", "a", json.dumps({"a": "v", "b": 1})))
    assert [t for t in ids if t >= 256] == [t for t in harmless if t >= 256]


def calling(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "3"}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}, result]


@pytest.mark.parametrize("arguments", ["", " \n", "null", " null ", "{}", None, {}])
def test_calls_without_arguments(voice, arguments):
    assert '<｜DSML｜invoke name="add">\n\n</｜DSML｜invoke>' in BYTES.decode(
        prompt(voice, calling(arguments)), special=True
    )


@pytest.mark.parametrize(("arguments", "says"), [
    ("[]", "a JSON object is needed"),
    ('"x"', "a JSON object is needed"),
    ([], "a JSON object is needed"),
    ({"a": 1, "b": {"c": "\udc80"}}, r"'\\udc80' is no character of Unicode"),
    ('{"a": "\\ud800"}', r"'\\ud800' is no character of Unicode"),
    (functools.reduce(lambda inner, _: {"a": inner}, range(100_000), {}), "nested too deeply"),
])  # fmt: skip
def test_arguments_that_are_no_part_of_a_prompt(voice, arguments, says):
    with pytest.raises(ValueError, match=says):
        prompt(voice, calling(arguments))


def test_numbers_beyond_float64_are_as_they_were_spelt(voice):
    text = BYTES.decode(prompt(voice, calling('{"a": [1e999, -1E400, 1.0]}')), special=True)
    assert '<｜DSML｜parameter name="a" string="false">[1e999, -1E400, 1.0]</｜DSML｜parameter>' in text


def test_arguments_that_are_no_json_are_one_parameter(voice):
    for arguments in ("{", '{"a": ' + "1" * 5000 + "}"):
        text = BYTES.decode(prompt(voice, calling(arguments)), special=True)
        assert f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>' in text


def test_what_cuts_special_strings_is_short_in_any_text():
    for text in ("\ue000" * 10_000, "".join(f"\ue000{n}\ue001" for n in range(10_000))):
        assert len(_mark(text)) <= 7 and _mark(text) not in text


@pytest.mark.parametrize("roles", [[], ["user", "assistant"], ["system"]])
def test_it_must_be_the_models_turn(voice, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(ValueError, match="messages: the last one must be of the user or a tool"):
        prompt(voice, messages)


def test_a_vocabulary_without_special_tokens_cannot_chat():
    small = Voice(lively(num_hidden_layers=2, compress_ratios=[0, 4]), BYTES, "small", 8192)
    with pytest.raises(ValueError, match=r"small: its vocabulary of 260 has no room .* model.vocab_size=288"):
        prompt(small, [{"role": "user", "content": "hi"}])


def test_random_voices_repeat_themselves():
    one, two, other = (random_voice("nano", seed=seed).model.head.weight for seed in (1, 1, 2))
    assert one.equal(two) and not one.equal(other)
    assert Delta("content", "x").kind == "content"
