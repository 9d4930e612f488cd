"""The chat format: the released conversations byte for byte, every rule, and a parser that says where it stops."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from abyssal.model.text import chat
from abyssal.model.text.chat import ChatFormatError, encode_messages, parse_message_from_completion_text

GOLDEN = Path(__file__).parent / "chat_golden"
BOS, EOS, U, A = chat.BOS, chat.EOS, chat.USER, chat.ASSISTANT
QUESTION = {"role": "user", "content": "Q"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def call(name="f", arguments="{}", id=None):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def golden(name):
    return (GOLDEN / name).read_bytes().decode()


# the released conversations ------------------------------------------------------------------------------------------


def test_golden_tools():
    data = json.loads(golden("test_input_1.json"))
    want = golden("test_output_1.txt")
    assert encode_messages(data["messages"], "thinking", tools=data["tools"]) == want
    data["messages"][0]["tools"] = data["tools"]
    before = json.dumps(data)
    assert encode_messages(data["messages"], "thinking") == want
    assert json.dumps(data) == before, "the caller's messages are not changed"


def test_golden_reasoning_of_earlier_turns_is_dropped():
    messages = json.loads(golden("test_input_2.json"))
    assert encode_messages(messages, "thinking") == golden("test_output_2.txt")


def test_maximum_effort():
    messages = json.loads(golden("test_input_2.json"))
    want = BOS + golden("reasoning_effort_max.txt") + golden("test_output_2.txt").removeprefix(BOS)
    assert encode_messages(messages, "thinking", reasoning_effort="max") == want
    assert encode_messages(messages, "thinking", reasoning_effort="high") == golden("test_output_2.txt")
    chatting = encode_messages(messages, "chat")
    assert encode_messages(messages, "chat", reasoning_effort="max") == chatting and "<think>" not in chatting


@pytest.mark.parametrize("mode", chat.MODES)
def test_golden_completions_parse(mode):
    prompt = golden("test_output_1.txt")
    for part in prompt.split(A)[1:]:
        completion = part.split(EOS)[0].removeprefix("<think>") + EOS
        if mode == "chat":
            completion = completion.split("</think>")[1]
        message = parse_message_from_completion_text(completion, mode)
        assert A + ("<think>" if mode == "thinking" else "</think>") + completion == (
            encode_messages([QUESTION, message], mode).removeprefix(BOS + U + "Q")
        )


# the rules -----------------------------------------------------------------------------------------------------------


def test_the_prompt_ends_where_the_model_goes_on():
    assert encode_messages([QUESTION]) == f"{BOS}{U}Q{A}</think>"
    assert encode_messages([QUESTION], "thinking") == f"{BOS}{U}Q{A}<think>"
    assert encode_messages([QUESTION], "thinking", add_default_bos_token=False) == f"{U}Q{A}<think>"
    assert encode_messages([]) == BOS


def test_reasoning_is_kept_with_tools_and_on_request():
    messages = [QUESTION, {"role": "assistant", "reasoning_content": "R", "content": "1"}, QUESTION]
    kept = f"{U}Q{A}<think>R</think>1{EOS}{U}Q{A}<think>"
    assert encode_messages(messages, "thinking") == f"{BOS}{U}Q{A}</think>1{EOS}{U}Q{A}<think>"
    assert encode_messages(messages, "thinking", drop_thinking=False) == BOS + kept
    assert encode_messages(messages, "thinking", tools=[TOOL]).endswith("invoke tool calls.\n" + kept)
    assert encode_messages(messages, "thinking", tools=[]) == encode_messages(messages, "thinking")
    assert encode_messages(messages, "chat") == f"{BOS}{U}Q{A}</think>1{EOS}{U}Q{A}</think>"


def test_reasoning_after_the_last_question_stays():
    messages = [QUESTION, {"role": "assistant", "reasoning_content": "R", "content": "1"}]
    assert encode_messages(messages, "thinking") == f"{BOS}{U}Q{A}<think>R</think>1{EOS}"
    messages[1]["wo_eos"] = True
    assert encode_messages(messages, "thinking") == f"{BOS}{U}Q{A}<think>R</think>1"


def test_developer_messages_are_questions_and_go_with_the_reasoning():
    developer = {"role": "developer", "content": "D", "response_format": {"type": "object"}}
    form = '\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{"type": "object"}'
    assert encode_messages([developer], "thinking") == f"{BOS}{U}D{form}{A}<think>"
    answer = {"role": "assistant", "content": "1"}
    assert encode_messages([developer, answer, QUESTION], "thinking") == f"{BOS}1{EOS}{U}Q{A}<think>"
    kept = f"{BOS}{U}D{form}{A}</think>1{EOS}{U}Q{A}</think>"
    assert encode_messages([developer, answer, QUESTION], "chat") == kept
    with_tools = encode_messages([developer | {"tools": [TOOL]}, answer, QUESTION], "thinking")
    assert with_tools.startswith(f"{BOS}{U}D\n\n## Tools\n") and form in with_tools and "<think></think>1" in with_tools


def test_system_sections():
    text = encode_messages([{"role": "system", "response_format": {"ä": 1}, "tools": [TOOL, TOOL]}, QUESTION])
    tools, form = text.split("\n\n## Response Format:")
    assert tools.startswith(BOS + "\n\n## Tools\n\n") and tools.endswith("invoke tool calls.\n")
    line = '{"name": "f", "description": "d", "parameters": {"type": "object"}}'
    assert f"Schemas\n\n{line}\n{line}\n\nYou MUST" in tools and '{"ä": 1}' in form


def test_messages_in_a_row_are_one_turn():
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert encode_messages([QUESTION, {"role": "user", "content": blocks}]) == f"{BOS}{U}Q\n\na\n\nb{A}</think>"


def test_results_follow_the_order_of_the_calls():
    asking = {"role": "assistant", "tool_calls": [call(id="x"), call(id="y")]}
    results = [{"role": "tool", "tool_call_id": i, "content": i.upper()} for i in "yx"]
    text = encode_messages([QUESTION, asking, results[0], QUESTION, results[1]])
    assert text.endswith(f"{U}<tool_result>X</tool_result>\n\nQ\n\n<tool_result>Y</tool_result>{A}</think>")
    split = [QUESTION, asking], [results[0], QUESTION, results[1]]
    assert text == encode_messages(split[0]) + encode_messages(split[1], context=split[0])
    blocks = [{"role": "tool", "tool_call_id": "y", "content": [{"type": "text", "text": t} for t in "ab"]}]
    assert "<tool_result>a\n\nb</tool_result>" in encode_messages([QUESTION, asking, *blocks])


def test_calls():
    arguments = {"text": 'a "b"\n<c>', "number": 1.5, "list": ["ü", None], "no": False}
    text = encode_messages(
        [QUESTION, {"role": "assistant", "content": "C", "tool_calls": [call("g", json.dumps(arguments)), call()]}]
    )
    assert text.split("</think>")[1] == (
        "C\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="g">\n'
        '<｜DSML｜parameter name="text" string="true">a "b"\n<c></｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="number" string="false">1.5</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="list" string="false">["ü", null]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="no" string="false">false</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>" + EOS
    )  # fmt: skip
    broken = encode_messages([QUESTION, {"role": "assistant", "tool_calls": [call("g", "{no json")]}])
    assert '<｜DSML｜parameter name="arguments" string="true">{no json</｜DSML｜parameter>' in broken
    parsed = encode_messages([QUESTION, {"role": "assistant", "tool_calls": [call("g", arguments)]}])
    assert parsed in text.replace("C\n\n", "\n\n").replace('\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>', "")


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_tasks_after_the_question(task):
    asked = QUESTION | {"task": task}
    assert encode_messages([asked]) == f"{BOS}{U}Q<｜{task}｜>"
    answer = {"role": "assistant", "content": "no", "reasoning_content": "R"}
    assert encode_messages([asked, answer], "thinking") == f"{BOS}{U}Q<｜{task}｜>no{EOS}"


def test_action_and_title():
    asked, answer = QUESTION | {"task": "action"}, {"role": "assistant", "content": "1"}
    assert encode_messages([asked]) == f"{BOS}{U}Q{A}</think><｜action｜>"
    assert encode_messages([asked, answer], "thinking") == f"{BOS}{U}Q{A}<think><｜action｜>1{EOS}"
    titled = [QUESTION, answer | {"task": "title"}, {"role": "assistant", "content": "T"}]
    assert encode_messages(titled, "thinking") == f"{BOS}{U}Q{A}<think></think>1{EOS}<｜title｜>T{EOS}"


# As the released encoder writes them, which differs from what one would expect.
@pytest.mark.parametrize(
    ("messages", "turn"),
    [
        ([{"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
         f"<tool_result>a\n\n[Unsupported image_url]</tool_result>{A}</think>"),
        ([{"role": "tool", "content": [{"type": "text"}, {}, {"type": "image"}]}],
         f"<tool_result>\n\n[Unsupported None]\n\n[Unsupported image]</tool_result>{A}</think>"),
        ([{"role": "tool", "content": []}], f"<tool_result></tool_result>{A}</think>"),
        ([{"role": "tool"}], f"<tool_result></tool_result>{A}</think>"),
        ([{"role": "tool", "content": None}], f"<tool_result>None</tool_result>{A}</think>"),
        ([{"role": "tool", "content": "r", "task": "query"}], f"<tool_result>r</tool_result>{A}</think>"),
        ([{"role": "tool", "content": "r"}, QUESTION | {"task": "query"}],
         f"<tool_result>r</tool_result>\n\nQ{A}</think>"),
        ([QUESTION, QUESTION | {"task": "title"}], f"Q\n\nQ{A}</think>"),
        ([QUESTION | {"task": "query"}, {"role": "tool", "content": "r", "task": "title"}],
         "Q\n\n<tool_result>r</tool_result><｜query｜>"),
        ([QUESTION | {"task": "query"}, QUESTION | {"task": "domain"}], f"Q{U}Q<｜domain｜>"),
        ([QUESTION | {"content": None}, QUESTION | {"content": ""}], f"\n\n{A}</think>"),
        ([QUESTION, {"role": "system", "content": "S"}, QUESTION], f"QS{U}Q{A}</think>"),
        ([QUESTION, {"role": "latest_reminder", "content": "D"}, QUESTION],
         f"Q{A}</think><｜latest_reminder｜>D{U}Q{A}</think>"),
    ],
)  # fmt: skip
def test_turns_of_odd_messages(messages, turn):
    assert encode_messages(messages) == BOS + U + turn


@pytest.mark.parametrize(
    ("arguments", "name", "is_text", "written"),
    [
        ("", "arguments", "true", ""),
        (" {", "arguments", "true", " {"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "arguments", "true", None),
        ('{"a": ' + "1" * 5000 + "}", "arguments", "true", None),
        ('{"a": 1, "a": -0.0}', "a", "false", "-0.0"),
        ('{"a": 1E2}', "a", "false", "100.0"),
        ('{"a": 1e999}', "a", "false", "1e999"),
        ('{"a": [-1E+400, NaN, "1e999"]}', "a", "false", '[-1E+400, NaN, "1e999"]'),
        ('{"a": "\\u00e4"}', "a", "true", "ä"),
    ],
)
def test_arguments_of_a_history(arguments, name, is_text, written):
    """As the released encoder writes them: text that is no JSON, or in which Python reads none, is one parameter.

    Numbers beyond float64 are as they were spelt (it writes Infinity, which is no JSON).
    """
    text = encode_messages([QUESTION, {"role": "assistant", "tool_calls": [call(arguments=arguments)]}])
    written = arguments if written is None else written
    assert f'<｜DSML｜parameter name="{name}" string="{is_text}">{written}</｜DSML｜parameter>\n</' in text


def test_what_is_nested_too_deeply_to_be_written():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for messages in (
        [{"role": "system", "tools": [{"function": deep}]}],
        [{"role": "system", "response_format": deep}],
        [QUESTION, {"role": "assistant", "tool_calls": [call(arguments={"a": deep})]}],
    ):
        with pytest.raises(ValueError, match="nested too deeply"):
            encode_messages(messages)


def test_reminder():
    reminder = {"role": "latest_reminder", "content": "Monday"}
    assert encode_messages([reminder, QUESTION]) == f"{BOS}<｜latest_reminder｜>Monday{U}Q{A}</think>"


@pytest.mark.parametrize("mode", chat.MODES)
@pytest.mark.parametrize("cut", range(1, 6))
def test_a_context_changes_nothing(mode, cut):
    """What was encoded before, and what follows it: together the whole, wherever reasoning is kept."""
    messages = [
        {"role": "system", "content": "S", "tools": [TOOL]},
        QUESTION,
        {"role": "assistant", "reasoning_content": "R", "tool_calls": [call(id="x")]},
        {"role": "tool", "tool_call_id": "x", "content": "r"},
        {"role": "assistant", "reasoning_content": "R", "content": "1"},
        QUESTION,
    ]
    whole = encode_messages(messages, mode)
    rest = encode_messages(messages[cut:], mode, context=messages[:cut])
    assert whole.endswith(rest) and BOS not in rest


def test_a_dropped_developer_message_of_the_context_takes_nothing_with_it():
    context = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}]
    rest = encode_messages([{"role": "assistant", "content": "1"}, QUESTION], "thinking", context=context)
    assert rest == f"1{EOS}{U}Q{A}<think>"


@pytest.mark.parametrize(
    ("messages", "options", "says"),
    [
        ([{"role": "human", "content": "Q"}], {}, "role 'human'"),
        ([QUESTION | {"task": "rhyme"}], {}, "task 'rhyme'"),
        ([QUESTION | {"tools": [TOOL]}], {}, "has tools, but role 'user'"),
        ([{"role": "system", "tools": [{"name": "f"}]}], {}, "tools with"),
        ([{"role": "system", "tools": [TOOL]}, QUESTION], {"tools": [TOOL]}, "a message has some too"),
        ([{"role": "developer", "content": ""}], {}, "has no content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "blocks of type 'text'"),
        ([{"role": "user", "content": 3}], {}, "content 3"),
        ([{"role": "assistant", "reasoning_content": 3}], {}, "reasoning_content 3"),
        ([{"role": "assistant", "tool_calls": ["f"]}], {}, "tool_calls with 'f'"),
        ([{"role": "assistant", "tool_calls": [call(arguments="[1]")]}], {}, "a JSON object"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], {}, "a name and arguments"),
        ([QUESTION], {"thinking_mode": "think"}, "thinking_mode='think'"),
        ([QUESTION], {"reasoning_effort": "low"}, "reasoning_effort='low'"),
    ],
)
def test_errors_name_what_is_wrong(messages, options, says):
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        encode_messages(messages, **options)


# completions ---------------------------------------------------------------------------------------------------------

PARAMETER = '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>'
CALL = f'<｜DSML｜invoke name="f">\n{PARAMETER}\n</｜DSML｜invoke>\n'
BLOCK = f"\n\n<｜DSML｜tool_calls>\n{CALL}</｜DSML｜tool_calls>"


@pytest.mark.parametrize(
    ("text", "mode", "position", "says"),
    [
        ("hello", "chat", 5, "not ended"),
        ("hello" + EOS + "x", "chat", 5 + len(EOS), "more after the end"),
        ("reason" + EOS, "thinking", 6 + len(EOS), "reasoning is not ended"),
        ("reason" + BLOCK + "</think>" + EOS, "thinking", 6 + len(BLOCK), "reasoning is not ended"),
        ("he<think>llo" + EOS, "chat", 2, "<think> inside"),
        ("r<think></think>x" + EOS, "thinking", 1, "<think> inside"),
        ("ab</think>c</think>" + EOS, "thinking", 11, "</think> inside"),
        (f"a<{chat.DSML}invoke" + EOS, "chat", 2, "inside the text"),
        (BLOCK + "x" + EOS, "chat", len(BLOCK), "expected '<｜end"),
        (BLOCK + EOS + "x", "chat", len(BLOCK + EOS), "more after"),
        (BLOCK.replace("tool_calls>\n", "tool_calls>"), "chat", 2, "expected '<｜DSML｜tool_calls>\\n'"),
        (f"\n\n{chat.CALLS}\n{chat.END_CALLS}" + EOS, "chat", 21, "expected '<｜DSML｜invoke"),
        (BLOCK.replace('string="false"', 'string="no"'), "chat", None, "expected 'false"),
        (BLOCK.replace(">1<", ">one<"), "chat", None, "is no JSON"),
        (BLOCK.replace(">1<", ">NaN<"), "chat", None, "is no JSON"),
        (BLOCK.replace(">1<", "><｜DSML｜<"), "chat", None, "inside a parameter"),
        (BLOCK.replace("</｜DSML｜parameter>\n", "</｜DSML｜parameter>"), "chat", None, "expected '\\n'"),
        (BLOCK.replace("\n</｜DSML｜invoke>", f"\n{PARAMETER}\n</｜DSML｜invoke>"), "chat", None, "second"),
        (BLOCK[:-5], "chat", len(BLOCK) - len(chat.END_CALLS), "expected '<｜DSML｜invoke"),
        (BLOCK[: BLOCK.index("1<")], "chat", BLOCK.index("1<"), "never comes"),
        (BLOCK.replace('name="f"', 'name="f\n"'), "chat", None, "a name that ends"),
    ],
)  # fmt: skip
def test_malformed_completions_say_where(text, mode, position, says):
    with pytest.raises(ChatFormatError) as caught:
        parse_message_from_completion_text(text, mode)
    assert says in str(caught.value)
    assert position is None or caught.value.position == position
    assert 0 <= caught.value.position <= len(text)


def test_unknown_mode():
    with pytest.raises(ValueError, match="thinking_mode='x'"):
        parse_message_from_completion_text("", "x")


def read_and_written(value):
    """The arguments of a completion whose parameter has this JSON: as parsed, and as parsed again after encoding."""
    message = parse_message_from_completion_text(BLOCK.replace(">1<", f">{value}<") + EOS)
    again = encode_messages([QUESTION, message]).split("</think>", 1)[1]
    back = parse_message_from_completion_text(again)
    return [one["tool_calls"][0]["function"]["arguments"] for one in (message, back)]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        *[(name, f"{name.strip('[]')} is no JSON value") for name in ("NaN", "Infinity", "[-Infinity]")],
        ("1" * 4301, "4300"),
        *[(a * 129 + "0" + b * 129, "deeper than 128 levels") for a, b in ("[]", ('{"a":', "}"))],
        *[(a * n + "0" + b * n, "recursion|deeper") for a, b in ("[]", ('{"a":', "}")) for n in (2000, 100_000)],
        *[(text, "surrogates not allowed") for text in ('["\\ud800"]', '{"\\udfff": 1}', '"\\udc00\\ud800"')],
        *[(text, "inside a parameter") for text in ('["\\uff5cDSML\\uff5c"]', '{"｜\\u0044SML｜": 1}')],
    ],
)
def test_a_parameter_that_could_not_be_written_again_is_refused(value, says):
    with pytest.raises(ChatFormatError, match=f'with string="false" is no JSON: .*{says}|{says}') as caught:
        read_and_written(value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value",
    ["1e999", "-1E400", '{"a": [1e309, 1e308]}', "9" * 400 + ".5", "1e308", "-0.0", "-0", "0", "1.0", "1", "1E-400",
     "5e-324", "9" * 4300, " 1 ", "\n[1 ,\t2]\r\n", '{"a":1,"a":[2]}',
     '{"": {"": null}}', '"x"', '"\\u0000\\u2028</think>\\ud83d\\ude00"', "[" * 128 + "]" * 128, "0.1", "1e22", "1e-7"],
)  # fmt: skip
def test_a_parameter_comes_back_from_a_prompt(value):
    read, again = read_and_written(value)
    assert repr(json.loads(read)) == repr(json.loads(again)) and json.loads(read)["a"] == json.loads(value)
    assert "Infinity" not in again


def test_ten_thousand_parameters_come_back_or_are_refused():
    draw = random.Random(4)
    parts = ["1", "-", "0", ".5", "e999", "E-9", "a", "null", "NaN", "[", "]", "{", "}", ",", '"', '"a":', " ", "<"]
    parts += ["9" * 300, "9" * 2200, "[" * 70, "]" * 70, "\\ud800", "\ud800", "｜DSM\\u004c｜", '"\\u003c/think>"']
    good = ['{"a": [1, 2.5, "x"], "b": {"c": null}}', "[[[1e5]]]", '"x"', "-0.5e-3", "[[], {}, [[]]]"]
    came_back = 0
    for _ in range(10_000):
        value = draw.choice(good)
        for _ in range(draw.randint(1, 2)):
            first, last = sorted(draw.randint(0, len(value)) for _ in range(2))
            value = value[:first] + draw.choice(parts) + value[draw.choice((first, last)) :]
        try:
            read, again = read_and_written(value)
        except ChatFormatError as error:
            assert "is no JSON" in str(error) or "inside a parameter" in str(error)
        else:
            assert repr(json.loads(read)) == repr(json.loads(again))
            came_back += 1
    assert 500 < came_back < 9500


def test_calls_parse():
    want = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    for end in ("", EOS):
        got = parse_message_from_completion_text("C" + BLOCK + end)
        assert got == {"role": "assistant", "content": "C", "reasoning_content": "", "tool_calls": [want]}
    for empty in ('name="f">\n\n</', 'name="f">\n</'):
        got = parse_message_from_completion_text(BLOCK.replace(CALL, f"<｜DSML｜invoke {empty}｜DSML｜invoke>\n"))
        assert got["tool_calls"][0]["function"]["arguments"] == "{}"


numbers = ["1e999", "-0.0", "9" * 4301, "[" * 200 + "]" * 200, '"\\ud800"', '["\\uff5cDSML\\uff5c"]', "1E-999", "NaN"]
pieces = st.sampled_from(
    [*(PARAMETER.replace(">1<", f">{number}<") for number in numbers),
     BOS, EOS, "<think>", "</think>", chat.DSML, "\n", "\n\n", chat.CALLS, chat.END_CALLS, chat.INVOKE, "1", "x", CALL,
     ' name="f">\n', chat.END_INVOKE, chat.PARAMETER, ' name="a" string="true">', ' name="a" string="false">',
     chat.END_PARAMETER, PARAMETER, BLOCK]
)  # fmt: skip
free = st.text(st.characters(exclude_characters="｜", exclude_categories=("Cs",)), max_size=20).filter(
    lambda s: "think>" not in s
)
values = st.recursive(st.none() | st.booleans() | st.integers() | free, lambda v: st.lists(v, max_size=3), max_leaves=5)
names = st.text("abc_", min_size=1, max_size=4)


@settings(max_examples=1000, deadline=None)
@given(st.lists(pieces | st.text(max_size=3), max_size=14).map("".join), st.sampled_from(chat.MODES))
@example(BLOCK + EOS, "chat")
def test_any_string_parses_or_says_where(text, mode):
    try:
        message = parse_message_from_completion_text(text, mode)
    except ChatFormatError as error:
        assert 0 <= error.position <= len(text)
        return
    again = encode_messages([QUESTION, message], mode).split(A, 1)[1].removeprefix("<think>")
    again = again.removeprefix("</think>") if mode == "chat" else again
    assert parse_message_from_completion_text(again, mode) == message
    if not message["tool_calls"]:
        assert again == text


def test_ten_thousand_broken_completions_parse_or_say_where():
    """Good completions with pieces cut out, doubled, moved and replaced, one to four times; some are good still."""
    draw = random.Random(9)
    good = [f"hm</think>text{BLOCK}{EOS}", f"{BLOCK}{EOS}", f"a</think>b{EOS}", f"b{EOS}"]
    parts = [*good, chat.DSML, "</think>", "\n", '"', ">", "<", "x", 'string="true"', 'string="false"', "\ud800", ""]
    parsed = 0
    for _ in range(10_000):
        text = draw.choice(good)
        for _ in range(draw.randint(1, 4)):
            first, last = sorted(draw.randint(0, len(text)) for _ in range(2))
            text = text[:first] + draw.choice([draw.choice(parts), text[first:last] * 2, text[last:]]) + text[last:]
        try:
            message = parse_message_from_completion_text(text, draw.choice(chat.MODES))
        except ChatFormatError as error:
            assert 0 <= error.position <= len(text)
        else:
            assert message["role"] == "assistant"
            parsed += 1
    assert 100 < parsed < 9900


@settings(max_examples=300, deadline=None)
@given(
    free,
    free,
    st.lists(st.tuples(names, st.dictionaries(names, values, max_size=3)), max_size=3),
    st.sampled_from(chat.MODES),
)
def test_messages_survive(content, reasoning, calls, mode):
    """A message, its completion, the same message."""
    message = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if mode == "thinking" else "",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls],
    }
    text = encode_messages([QUESTION, message], mode).split(A)[1]
    text = text.removeprefix("<think>" if mode == "thinking" else "</think>")
    got = parse_message_from_completion_text(text, mode)
    for one in got["tool_calls"] + message["tool_calls"]:
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    assert got == message
